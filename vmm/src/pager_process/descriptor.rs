#![forbid(unsafe_code)]
//! Proves that a descriptor that somebody sent is what it should be, by what the kernel says of it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl};
use thiserror::Error;

use crate::clone::closing::close_elsewhere;

/// Features that make a userfaultfd of no use here: events other than faults, which stop every
/// ioctl until they are read (one even makes descriptors), and SIGBUS in place of messages.
const UNWANTED_FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 7;
/// Most bytes of what the kernel says of a descriptor that are looked at.
const MAX_INFO_BYTES: u64 = 4096;

/// Why a descriptor is refused.
#[derive(Debug, Error)]
pub enum WrongDescriptor {
    /// More or fewer than the order takes.
    #[error(
        "{count} descriptors came with it where {expected} are needed (to attach: a userfaultfd and a pidfd, and a map of discarded pages where there is to be one)"
    )]
    Count {
        /// How many came.
        count: usize,
        /// How many it takes.
        expected: usize,
    },
    /// Something else.
    #[error("its descriptor is no {kind}")]
    Kind {
        /// What it should be.
        kind: &'static str,
    },
    /// A userfaultfd on which nothing was agreed.
    #[error("its userfaultfd was not made ready (UFFDIO_API)")]
    Handshake,
    /// A userfaultfd that sends other messages than faults, or none.
    #[error("its userfaultfd has features {features:#x}, of which {unwanted:#x} cannot be served")]
    Features {
        /// All of them.
        features: u64,
        /// Those that are in the way.
        unwanted: u64,
    },
    /// The kernel does not say.
    #[error("its descriptor cannot be examined")]
    Examine(#[source] io::Error),
}

/// The userfaultfd and the pidfd that come with an order to serve a client, and a map of discarded pages if it
/// `has_map`. What is refused is closed without waiting for it.
pub fn prove(
    descriptors: Vec<OwnedFd>,
    has_map: bool,
) -> Result<(OwnedFd, OwnedFd, Option<OwnedFd>), WrongDescriptor> {
    let (descriptors, map) = with_map(descriptors, has_map, 2)?;
    let [uffd, pidfd] = exactly(descriptors)?;
    let proven = prove_uffd(uffd.as_fd()).and_then(|()| prove_pidfd(pidfd.as_fd()));
    match proven {
        Ok(()) => Ok((uffd, pidfd, map)),
        Err(error) => {
            close_elsewhere(vec![uffd, pidfd]);
            Err(error)
        }
    }
}

/// The userfaultfd that comes alone, or with a map of discarded pages; the same.
pub fn prove_one(
    descriptors: Vec<OwnedFd>,
    has_map: bool,
) -> Result<(OwnedFd, Option<OwnedFd>), WrongDescriptor> {
    let (descriptors, map) = with_map(descriptors, has_map, 1)?;
    let [uffd] = exactly(descriptors)?;
    match prove_uffd(uffd.as_fd()) {
        Ok(()) => Ok((uffd, map)),
        Err(error) => {
            close_elsewhere(vec![uffd]);
            Err(error)
        }
    }
}

/// Takes the map off the end of what came, behind so many others.
fn with_map(
    mut descriptors: Vec<OwnedFd>,
    has_map: bool,
    others: usize,
) -> Result<(Vec<OwnedFd>, Option<OwnedFd>), WrongDescriptor> {
    if !has_map {
        return Ok((descriptors, None));
    }
    let count = descriptors.len();
    let map = descriptors.pop().filter(|_| count == others + 1);
    let Some(map) = map else {
        close_elsewhere(descriptors);
        let expected = others + 1;
        return Err(WrongDescriptor::Count { count, expected });
    };
    let seals = SealFlags::SHRINK | SealFlags::GROW;
    if fcntl_get_seals(&map).is_ok_and(|found| found.contains(seals)) {
        return Ok((descriptors, Some(map)));
    }
    descriptors.push(map);
    close_elsewhere(descriptors);
    let kind = "file in memory that can neither shrink nor grow";
    Err(WrongDescriptor::Kind { kind })
}

/// Proves that nothing came with a message that takes nothing; the same.
pub fn none(descriptors: Vec<OwnedFd>) -> Result<(), WrongDescriptor> {
    exactly::<0>(descriptors).map(|_| ())
}

fn exactly<const N: usize>(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; N], WrongDescriptor> {
    let count = descriptors.len();
    <[OwnedFd; N]>::try_from(descriptors).map_err(|descriptors| {
        close_elsewhere(descriptors);
        WrongDescriptor::Count { count, expected: N }
    })
}

/// Proves a userfaultfd that sends faults and nothing else, and makes it non-blocking.
fn prove_uffd(fd: BorrowedFd<'_>) -> Result<(), WrongDescriptor> {
    let kind = "userfaultfd";
    let info = info(fd, kind)?;
    let api = field(&info, "API:").ok_or(WrongDescriptor::Kind { kind })?;
    // Version, what was agreed on, what the kernel has.
    let features = api.split(':').nth(1);
    let features = features.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let features = features.ok_or(WrongDescriptor::Kind { kind })?;
    if features == 0 {
        return Err(WrongDescriptor::Handshake);
    }
    let unwanted = features & UNWANTED_FEATURES;
    if unwanted != 0 {
        return Err(WrongDescriptor::Features { features, unwanted });
    }
    let examine = |errno: rustix::io::Errno| WrongDescriptor::Examine(errno.into());
    let flags = fcntl_getfl(fd).map_err(examine)?;
    fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(examine)
}

/// Proves a pidfd.
fn prove_pidfd(fd: BorrowedFd<'_>) -> Result<(), WrongDescriptor> {
    let kind = "pidfd";
    match field(&info(fd, kind)?, "Pid:") {
        Some(_) => Ok(()),
        None => Err(WrongDescriptor::Kind { kind }),
    }
}

/// What the kernel says of a descriptor of this kind. It writes all of that before any of it can be
/// read, and of some kinds without end: what it is comes first.
fn info(fd: BorrowedFd<'_>, kind: &'static str) -> Result<String, WrongDescriptor> {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let link = link.map_err(WrongDescriptor::Examine)?;
    // A pidfd has a file system of its own since Linux 6.9.
    let begins = [format!("anon_inode:[{kind}]"), format!("{kind}:[")];
    let is_kind = |begin: &String| link.to_string_lossy().starts_with(begin.as_str());
    if !begins.iter().any(is_kind) {
        return Err(WrongDescriptor::Kind { kind });
    }
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let mut text = String::new();
    let info = File::open(path).map_err(WrongDescriptor::Examine)?;
    info.take(MAX_INFO_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(WrongDescriptor::Examine)?;
    if text.len() as u64 > MAX_INFO_BYTES {
        // More than is said of any that is looked for.
        text.clear();
    }
    Ok(text)
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_pager::Registration;
    use rustix::process::{PidfdFlags, getpid, pidfd_open};

    fn own_pidfd() -> OwnedFd {
        pidfd_open(getpid(), PidfdFlags::empty()).unwrap()
    }

    fn uffd() -> OwnedFd {
        let registration = Registration::new().unwrap();
        registration.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn what_a_client_needs_is_taken_and_nothing_else() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        prove(vec![uffd(), own_pidfd()], false).unwrap();
        let refused = |descriptors| prove(descriptors, false).unwrap_err().to_string();
        assert!(refused(vec![]).contains("0 descriptors"));
        assert!(refused(vec![uffd()]).contains("1 descriptors"));
        assert!(refused(vec![uffd(), own_pidfd(), null()]).contains("3 descriptors"));
        assert!(refused(vec![null(), own_pidfd()]).contains("no userfaultfd"));
        assert!(refused(vec![own_pidfd(), uffd()]).contains("no userfaultfd"));
        assert!(refused(vec![uffd(), null()]).contains("no pidfd"));
        assert!(refused(vec![uffd(), uffd()]).contains("no pidfd"));
    }

    #[test]
    fn a_map_is_the_last_and_cannot_change_its_size() {
        let map = || registration_map().unwrap();
        let both = prove(vec![uffd(), own_pidfd(), map()], true).unwrap();
        assert!(both.2.is_some());
        assert!(prove_one(vec![uffd(), map()], true).unwrap().1.is_some());
        let refused = |descriptors| prove(descriptors, true).unwrap_err().to_string();
        assert!(refused(vec![uffd(), own_pidfd()]).contains("2 descriptors"));
        assert!(refused(vec![]).contains("0 descriptors"));
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(refused(vec![uffd(), own_pidfd(), null]).contains("neither shrink nor grow"));
        prove(vec![uffd(), own_pidfd(), map()], false).unwrap_err();
    }

    fn registration_map() -> Option<OwnedFd> {
        use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("map", flags).ok()?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).ok()?;
        Some(file)
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        let info = "pos:\t0\nAPI:\taa:80004000:80000000000001ff\n";
        assert_eq!(field(info, "API:"), Some("aa:80004000:80000000000001ff"));
        assert_eq!(field(info, "Pid:"), None);
    }
}
