// UNSAFETY: one ioctl that the `userfaultfd` crate offers only for newer kernels than it is built
// for. It takes an address of the client's own memory and changes neither content nor presence.
#![expect(unsafe_code, reason = "UFFDIO_WRITEPROTECT on a client's userfaultfd")]
//! A userfaultfd that somebody else made: proven before it is used.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use userfaultfd::Uffd;

use super::mmap::Addressed;
use super::userfaultfd::{Tracking, uffd_from};
use crate::page::{PAGE_BYTES, PageRange};

#[repr(C)]
struct ProtectArgs {
    start: u64,
    bytes: u64,
    mode: u64,
}

const IOC_WRITEPROTECT: u64 = 0xc018_aa06;
const DONT_WAKE: u64 = 2;
const _: () = assert!(size_of::<ProtectArgs>() == 24);

/// What is wrong with a userfaultfd, and what the kernel said.
pub(crate) type Wrong = (&'static str, io::Error);

/// Takes `fd` as the userfaultfd that `memory` is registered with; `page` is one of its pages. Who
/// waits for that page is woken, and asks again.
pub(crate) fn adopt(
    fd: OwnedFd,
    memory: &impl Addressed,
    page: PageRange,
    tracking: Tracking,
) -> Result<Uffd, Wrong> {
    let flags = fcntl_getfl(&fd).map_err(|errno| ("its flags cannot be read", errno.into()))?;
    // A blocking one would stop the whole shard; poll() on it gives POLLERR.
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
        .map_err(|errno| ("it cannot be made non-blocking", errno.into()))?;
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let start = memory
        .address_of(page)
        .ok_or_else(|| ("it has no such page", outside()))?;
    let uffd = uffd_from(fd);
    // Any other file says ENOTTY, one without a handshake EINVAL.
    uffd.wake(start as *mut _, usize::try_from(page.bytes()).unwrap_or(0))
        .map_err(|error| {
            let source = io::Error::other(error);
            ("it is no userfaultfd that made its handshake", source)
        })?;
    if tracking == Tracking::On {
        tracks(&uffd, start).map_err(|error| {
            let what = "its memory is not registered for write protection";
            (what, error)
        })?;
    }
    Ok(uffd)
}

/// Whether the page at `start` is registered for write protection: lifting it there, which does no
/// harm, is an error elsewhere.
fn tracks(uffd: &Uffd, start: u64) -> io::Result<()> {
    let mut args = ProtectArgs {
        start,
        bytes: PAGE_BYTES,
        mode: DONT_WAKE,
    };
    // SAFETY: `args` has the layout of `struct uffdio_writeprotect` (asserted above). The mode lifts
    // the protection of one page: it can be written to, as its owner may anyway.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), IOC_WRITEPROTECT, &raw mut args) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
