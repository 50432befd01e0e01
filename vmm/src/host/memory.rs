#![forbid(unsafe_code)]
//! What this host can say about memory of clones, and take back of it.

use super::doctor::{Finding, Grade};
use crate::clone::cgroup::CloneGroups;
use crate::clone::give_back::require;
use crate::report::chain;
use crate::sys::pagemap::Pagemap;

/// Examines it.
pub(super) fn examine() -> Vec<Finding> {
    let map = Pagemap::of_self();
    vec![page_accounting(&map), give_back(&map), clone_cgroups()]
}

fn page_accounting(map: &std::io::Result<Pagemap>) -> Finding {
    const WHAT: &str = "page accounting";
    match map.as_ref().map(Pagemap::can_scan) {
        Ok(Ok(true)) => Finding::ok(WHAT, "exact: the kernel has PAGEMAP_SCAN"),
        Ok(Ok(false)) => Finding::bad(
            Grade::Warn,
            WHAT,
            "sums only: the kernel has no PAGEMAP_SCAN",
            "use Linux 6.7 or later to tell zero and clean pages of clones from others",
        ),
        Ok(Err(error)) => unreadable(WHAT, &error),
        Err(error) => unreadable(WHAT, error),
    }
}

fn unreadable(what: &'static str, error: &std::io::Error) -> Finding {
    Finding::bad(
        Grade::Warn,
        what,
        format!("page maps cannot be read: {error}"),
        "mount /proc without hidepid, and see that no sandbox keeps /proc/self/pagemap from this process",
    )
}

fn give_back(map: &std::io::Result<Pagemap>) -> Finding {
    const WHAT: &str = "give-back";
    let wp_async = pando_pager::probe()
        .userfaultfd
        .is_ok_and(|facts| facts.features.wp_async());
    let map = match map {
        Ok(map) => map,
        Err(error) => return unreadable(WHAT, error),
    };
    match require(wp_async, map) {
        Ok(()) => Finding::ok(WHAT, "clean pages of idle clones can be found"),
        Err(error) => Finding::bad(
            Grade::Warn,
            WHAT,
            chain(&error),
            "use Linux 6.7 or later; all but `--give-back` works without",
        ),
    }
}

fn clone_cgroups() -> Finding {
    const WHAT: &str = "clone cgroups";
    match CloneGroups::new() {
        Ok(groups) => match groups.accounting() {
            Ok(()) => Finding::ok(WHAT, "can be made, and account memory"),
            // Where version 1 has the controllers, nothing can be done while the host runs.
            Err(why) => Finding::ok(
                WHAT,
                format!("can be made, but do not account memory: {why}"),
            ),
        },
        Err(error) => Finding::bad(
            Grade::Warn,
            WHAT,
            chain(&error),
            "run pando as root, or with systemd-run --user --scope -p Delegate=yes; all but `--cgroups` works \
             without",
        ),
    }
}
