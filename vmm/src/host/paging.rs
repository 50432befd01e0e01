#![forbid(unsafe_code)]
//! What the pager needs of this host.

use pando_pager::{
    HostFacts, IoPath, PagerError, PoisonMethod, Refusal, UffdAccess, UffdFacts, probe,
};

use super::doctor::{Finding, Grade};
use crate::clone::control::Io;
use crate::clone::give_back::{self, GiveBackError};
use crate::report::chain;
use crate::sys::pagemap::Pagemap;

const UFFD: &str = "userfaultfd";
const UFFD_FEATURES: &str = "uffd features";
const GIVE_BACK: &str = "give-back";
const IO_URING: &str = "io_uring";

/// Fails when this host refuses what clones with a pager need that is told to read in this way.
pub fn require_paging(io: Io) -> Result<(), PagerError> {
    let facts = probe();
    if let Err(refusal) = facts.userfaultfd {
        return Err(PagerError::Userfaultfd(refusal.error));
    }
    match (io, facts.io_uring) {
        (Io::Uring, Err(refusal)) => Err(PagerError::Uring(refusal.error)),
        // `Auto` then reads in another way.
        _ => Ok(()),
    }
}

/// Why this host cannot tell which pages a clone wrote, if it cannot: give-back is off then.
pub fn require_write_tracking() -> Result<(), String> {
    let wp_async = probe()
        .userfaultfd
        .is_ok_and(|facts| facts.features.wp_async());
    let map = Pagemap::of_self().map_err(GiveBackError::Scan);
    match map.and_then(|map| give_back::require(wp_async, &map)) {
        Ok(()) => Ok(()),
        Err(GiveBackError::Off { lack }) => Err(lack.to_owned()),
        Err(error) => Err(chain(&error)),
    }
}

fn write_tracking() -> Finding {
    match require_write_tracking() {
        Ok(()) => Finding::ok(GIVE_BACK, "written pages are told from others"),
        Err(why) => Finding::bad(
            Grade::Warn,
            GIVE_BACK,
            format!("off: {why}"),
            "Linux 6.7 or later; here idle clones keep what they have",
        ),
    }
}

/// Examines userfaultfd and io_uring.
pub(super) fn examine() -> Vec<Finding> {
    let HostFacts {
        userfaultfd,
        io_uring,
    } = probe();
    let mut findings = match &userfaultfd {
        Ok(facts) => vec![access(facts.access), features(facts)],
        Err(refusal) => vec![refused_userfaultfd(refusal)],
    };
    if userfaultfd.is_ok() {
        findings.extend([write_tracking(), io(&io_uring)]);
    }
    findings
}

fn access(access: UffdAccess) -> Finding {
    match access {
        UffdAccess::Device => Finding::ok(UFFD, "through /dev/userfaultfd"),
        UffdAccess::Syscall => Finding::ok(UFFD, "through the system call"),
    }
}

fn refused_userfaultfd(refusal: &Refusal) -> Finding {
    Finding::bad(
        Grade::Fail,
        UFFD,
        said(refusal),
        "give this user /dev/userfaultfd (Linux 6.1): chgrp kvm /dev/userfaultfd; chmod 660 \
         /dev/userfaultfd; or sysctl vm.unprivileged_userfaultfd=1. Engine kernel works without",
    )
}

fn features(facts: &UffdFacts) -> Finding {
    let features = facts.features;
    let offered: Vec<&str> = [
        ("poison", features.poison()),
        ("move", features.move_pages()),
        ("wp_async", features.wp_async()),
        ("minor_shmem", features.minor_shmem()),
        ("thread_id", features.thread_id()),
    ]
    .into_iter()
    .filter_map(|(name, is_there)| is_there.then_some(name))
    .collect();
    let found = format!("{:#x}: {}", features.bits(), offered.join(", "));
    match facts.poison {
        PoisonMethod::Marker => Finding::ok(UFFD_FEATURES, found),
        PoisonMethod::Protect => Finding::bad(
            Grade::Warn,
            UFFD_FEATURES,
            format!("{found}; no poison"),
            "Linux 6.6 or later; here a page that cannot be read is taken away instead",
        ),
    }
}

fn io(io_uring: &Result<IoPath, Refusal>) -> Finding {
    match io_uring {
        Ok(path) => Finding::ok(IO_URING, format!("works, path {path}")),
        Err(refusal) => Finding::bad(
            Grade::Warn,
            IO_URING,
            format!("{}; pages are read by pread", said(refusal)),
            "sysctl kernel.io_uring_disabled=0, and allow io_uring_setup, io_uring_enter and \
             io_uring_register in the container's seccomp profile",
        ),
    }
}

fn said(refusal: &Refusal) -> String {
    match &refusal.sysctl {
        Some((name, value)) => format!("refused: {} ({name} is {value})", refusal.error),
        None => format!("refused: {}", refusal.error),
    }
}
