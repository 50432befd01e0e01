// UNSAFETY: ioctls of userfaultfd that the `userfaultfd` crate has not (POISON, probing) or whose
// errno it loses (COPY), and the mapping's address handed to the crate's calls. Every address
// given to the kernel comes from a `ServedMapping` that is borrowed for the call, or lies in memory
// that its owner registered with the userfaultfd that it sent: the kernel fills missing pages of
// such memory and nothing else.
#![expect(unsafe_code, reason = "raw ioctls on the userfaultfd")]
//! userfaultfd: made by the crate, filled through a typed binding that keeps every errno.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use userfaultfd::{FeatureFlags, IoctlFlags, RegisterMode, Uffd, UffdBuilder};

use super::features::UffdFeatures;
use super::mmap::{Addressed, ServedMapping};
use crate::page::PageRange;

const DEVICE: &str = "/dev/userfaultfd";
const API: u64 = 0xaa;

#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgs {
    destination: u64,
    source: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

/// ZEROPAGE and POISON share this shape.
#[repr(C)]
struct RangeArgs {
    start: u64,
    bytes: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct ProtectArgs {
    start: u64,
    bytes: u64,
    mode: u64,
}

const fn ioctl_number(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xaa << 8 | number
}

const READ_WRITE: u64 = 3;
const IOC_NEW: u64 = ioctl_number(0, 0x00, 0);
const IOC_API: u64 = ioctl_number(READ_WRITE, 0x3f, size_of::<ApiArgs>());
const IOC_COPY: u64 = ioctl_number(READ_WRITE, 0x03, size_of::<CopyArgs>());
const IOC_ZEROPAGE: u64 = ioctl_number(READ_WRITE, 0x04, size_of::<RangeArgs>());
const IOC_WRITEPROTECT: u64 = ioctl_number(READ_WRITE, 0x06, size_of::<ProtectArgs>());
const IOC_POISON: u64 = ioctl_number(READ_WRITE, 0x08, size_of::<RangeArgs>());
const REGISTER_MISSING_WP: u64 = 3;
const COPY_WRITE_PROTECTED: u64 = 2;
const PROTECT: u64 = 1;

const _: () = assert!(size_of::<ApiArgs>() == 24);
const _: () = assert!(size_of::<CopyArgs>() == 40);
const _: () = assert!(size_of::<RangeArgs>() == 32);
const _: () = assert!(size_of::<ProtectArgs>() == 24);
const _: () = assert!(IOC_WRITEPROTECT == 0xc018_aa06);
const _: () = assert!(IOC_NEW == 0xaa00);
const _: () = assert!(IOC_API == 0xc018_aa3f);
const _: () = assert!(IOC_COPY == 0xc028_aa03);
const _: () = assert!(IOC_ZEROPAGE == 0xc020_aa04);
const _: () = assert!(IOC_POISON == 0xc020_aa08);

/// How the kernel let this process have a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdAccess {
    /// Through `/dev/userfaultfd`: file permission is all that it takes.
    Device,
    /// Through the system call: a capability, or `vm.unprivileged_userfaultfd`.
    Syscall,
}

/// What an install ioctl said: how many bytes it handled, and the errno if it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) done_bytes: i64,
    pub(crate) errno: Option<Errno>,
}

/// Which features the kernel offers and how one gets a userfaultfd: asked of a throw-away one.
/// Kernel faults must be served too (KVM raises them), so user-mode-only is never asked for.
pub(crate) fn probe() -> io::Result<(UffdAccess, UffdFeatures)> {
    let (access, fd) = open_raw()?;
    Ok((access, handshake(&fd, 0)?))
}

/// A userfaultfd as this process gets it.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Non-blocking, close-on-exec, sends no event but faults. Non-blocking even for a ring:
    /// io_uring waits for the fd instead, and poll() on a blocking one gives POLLERR.
    pub(crate) uffd: Uffd,
    /// Whether it can POISON.
    pub(crate) poison: bool,
    /// Whether writes to its memory are tracked: asked for, and the kernel can.
    pub(crate) tracking: Tracking,
}

/// Whether the kernel is to know which installed pages were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tracking {
    /// No.
    Off,
    /// Yes: pages are installed write-protected, and the kernel lifts that at the first write.
    On,
}

impl Tracking {
    /// On where it `is_wanted`.
    pub(crate) fn wanted(is_wanted: bool) -> Self {
        if is_wanted { Self::On } else { Self::Off }
    }
}

/// Makes a userfaultfd with all that this kernel has of POISON and `tracking`.
pub(crate) fn open(tracking: Tracking) -> io::Result<Opened> {
    let make = |features: u64| {
        UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(FeatureFlags::from_bits_retain(features))
            .create()
    };
    let opened = |uffd, features: u64| Opened {
        uffd,
        poison: features & UffdFeatures::POISON != 0,
        tracking: Tracking::wanted(features & UffdFeatures::WP_ASYNC != 0),
    };
    let wanted = match tracking {
        Tracking::Off => UffdFeatures::POISON,
        Tracking::On => UffdFeatures::POISON | UffdFeatures::WP_ASYNC,
    };
    // The handshake refuses a feature that the kernel has not: asking for it is the probe. The
    // kernels that can track writes can POISON.
    for features in [wanted, UffdFeatures::POISON, 0] {
        if let Ok(uffd) = make(features) {
            return Ok(opened(uffd, features));
        }
    }
    // The crate does not try the system call when the device exists and may not be opened.
    let features = probe()?.1.bits() & wanted;
    let (_, fd) = open_raw()?;
    handshake(&fd, features)?;
    Ok(opened(uffd_from(fd), features))
}

/// A second descriptor of the same userfaultfd.
pub(crate) fn duplicate(uffd: &Uffd) -> io::Result<OwnedFd> {
    uffd.as_fd().try_clone_to_owned()
}

/// Registers `pages` of `mapping` for missing faults, and for write protection if writes are to be
/// tracked. The names of the ioctls that the pager needs and the kernel does not offer on it: none,
/// or it cannot be served.
pub(crate) fn register(
    uffd: &Uffd,
    mapping: &ServedMapping,
    pages: PageRange,
    tracking: Tracking,
) -> io::Result<Vec<&'static str>> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let start = mapping.address_of(pages).ok_or_else(outside)?;
    let length = usize::try_from(pages.bytes()).map_err(|_| outside())?;
    let mode = match tracking {
        Tracking::Off => RegisterMode::MISSING,
        Tracking::On => RegisterMode::from_bits_retain(REGISTER_MISSING_WP),
    };
    let offered = uffd
        .register_with_mode(start as *mut _, length, mode)
        .map_err(io::Error::other)?;
    Ok(missing_ioctls(offered))
}

fn missing_ioctls(offered: IoctlFlags) -> Vec<&'static str> {
    let needed = [
        (IoctlFlags::COPY, "UFFDIO_COPY"),
        (IoctlFlags::ZEROPAGE, "UFFDIO_ZEROPAGE"),
        (IoctlFlags::WAKE, "UFFDIO_WAKE"),
    ];
    let missing = needed.iter().filter(|(flag, _)| !offered.contains(*flag));
    missing.map(|&(_, name)| name).collect()
}

pub(super) fn uffd_from(fd: OwnedFd) -> Uffd {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is a userfaultfd, owned, and given away here.
    unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) }
}

fn open_raw() -> io::Result<(UffdAccess, OwnedFd)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = OpenOptions::new().read(true).write(true).open(DEVICE);
    if let Ok(device) = device {
        // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a new descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
        if fd >= 0 {
            return Ok((UffdAccess::Device, owned(fd)));
        }
    }
    // SAFETY: userfaultfd(2) takes flags by value and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((UffdAccess::Syscall, owned(fd)))
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel just returned this descriptor to us; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn handshake(fd: &OwnedFd, features: u64) -> io::Result<UffdFeatures> {
    let mut args = ApiArgs {
        api: API,
        features,
        ioctls: 0,
    };
    // SAFETY: `args` has the layout of `struct uffdio_api` (asserted above) and lives through the
    // call; UFFDIO_API writes only to it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_API, &raw mut args) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UffdFeatures(args.features))
}

/// What is wrong with a range that does not lie in the mapping: as the kernel would say it.
const OUTSIDE: Answer = Answer {
    done_bytes: 0,
    errno: Some(Errno::INVAL),
};

/// Copies `source` into missing `pages` and wakes who waits for them.
pub(crate) fn copy(
    uffd: BorrowedFd<'_>,
    memory: &impl Addressed,
    pages: PageRange,
    source: &[u8],
    tracking: Tracking,
) -> Answer {
    let address = memory.address_of(pages);
    let (Some(destination), true) = (address, source.len() as u64 == pages.bytes()) else {
        return OUTSIDE;
    };
    // `copied` starts at 0: kernels before 6.15 leave it untouched on some failures.
    let mut args = CopyArgs {
        destination,
        source: source.as_ptr() as u64,
        bytes: pages.bytes(),
        mode: match tracking {
            Tracking::Off => 0,
            Tracking::On => COPY_WRITE_PROTECTED,
        },
        copied: 0,
    };
    // SAFETY: `args` has the layout of `struct uffdio_copy` (asserted above). The kernel reads
    // `source`, borrowed here with exactly that length, and fills only missing pages that are
    // registered with this userfaultfd: see the top of this file.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), IOC_COPY, &raw mut args) };
    answer(result, args.copied)
}

/// Maps the zero page at missing `pages` and wakes who waits for them.
pub(crate) fn zero(uffd: BorrowedFd<'_>, memory: &impl Addressed, pages: PageRange) -> Answer {
    range_ioctl(uffd, memory, pages, IOC_ZEROPAGE)
}

/// Marks missing `pages` as unreadable and wakes who waits for them: SIGBUS.
pub(crate) fn poison(uffd: BorrowedFd<'_>, memory: &impl Addressed, pages: PageRange) -> Answer {
    range_ioctl(uffd, memory, pages, IOC_POISON)
}

fn range_ioctl(
    uffd: BorrowedFd<'_>,
    memory: &impl Addressed,
    pages: PageRange,
    number: u64,
) -> Answer {
    let Some(start) = memory.address_of(pages) else {
        return OUTSIDE;
    };
    let mut args = RangeArgs {
        start,
        bytes: pages.bytes(),
        mode: 0,
        done: 0,
    };
    // SAFETY: `args` has the layout of `struct uffdio_zeropage` and `struct uffdio_poison`
    // (asserted above); both fill only missing pages that are registered with this userfaultfd:
    // see the top of this file.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), number, &raw mut args) };
    answer(result, args.done)
}

/// Write-protects `pages` that are there, registered for tracking: the kernel knows when they are
/// written from now on.
pub(crate) fn protect(
    uffd: BorrowedFd<'_>,
    memory: &impl Addressed,
    pages: PageRange,
) -> io::Result<()> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut args = ProtectArgs {
        start: memory.address_of(pages).ok_or_else(outside)?,
        bytes: pages.bytes(),
        mode: PROTECT,
    };
    // SAFETY: `args` has the layout of `struct uffdio_writeprotect` (asserted above). It changes no
    // byte of memory; a write to it takes the protection off again.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), IOC_WRITEPROTECT, &raw mut args) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn answer(result: libc::c_int, done_bytes: i64) -> Answer {
    let errno = (result < 0).then(|| {
        let code = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Errno::from_raw_os_error(code)
    });
    Answer { done_bytes, errno }
}

/// Wakes who waits for `pages`; they look again.
pub(crate) fn wake(uffd: &Uffd, memory: &impl Addressed, pages: PageRange) {
    let Some(start) = memory.address_of(pages) else {
        return;
    };
    let length = usize::try_from(pages.bytes()).unwrap_or(0);
    if let Err(error) = uffd.wake(start as *mut _, length) {
        // Only a range that is no longer registered can fail, and then nobody waits there.
        tracing::debug!(%pages, %error, "nobody to wake");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ioctl_that_is_not_offered_is_named() {
        let all = IoctlFlags::COPY | IoctlFlags::ZEROPAGE | IoctlFlags::WAKE;
        assert!(missing_ioctls(all).is_empty());
        // What hugetlbfs offers.
        let huge = IoctlFlags::COPY | IoctlFlags::WAKE;
        assert_eq!(missing_ioctls(huge), ["UFFDIO_ZEROPAGE"]);
        let none = ["UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_WAKE"];
        assert_eq!(missing_ioctls(IoctlFlags::empty()), none);
        let mapping = ServedMapping::new(4096).unwrap();
        let whole = PageRange::single(crate::page::PageIndex::default());
        for tracking in [Tracking::Off, Tracking::On] {
            let opened = open(tracking).unwrap();
            let missing = register(&opened.uffd, &mapping, whole, opened.tracking).unwrap();
            assert!(missing.is_empty());
        }
    }
}
