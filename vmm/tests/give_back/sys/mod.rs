// UNSAFETY: a userfaultfd of the test's own, with ioctls that no crate has or whose errors it loses,
// and memory that is read and written by volatile access while the kernel changes it underneath.
#![expect(unsafe_code, reason = "raw ioctls on a userfaultfd, and served memory")]
//! Memory that a test serves itself, registered for missing pages and asynchronous write protection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::mm::Advice as Discard;

pub(crate) const PAGE: usize = 4096;

const REGISTER_MISSING_WP: u64 = 3;
const COPY_PROTECTED: u64 = 2;
const WP_ASYNC: u64 = 1 << 15;

const IOC_API: u64 = 0xc018_aa3f;
const IOC_REGISTER: u64 = 0xc020_aa00;
const IOC_WAKE: u64 = 0x8010_aa02;
const IOC_COPY: u64 = 0xc028_aa03;
const IOC_ZEROPAGE: u64 = 0xc020_aa04;
const IOC_WRITEPROTECT: u64 = 0xc018_aa06;

/// A fault that was raised: which page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) page: usize,
    pub(crate) is_write: bool,
}

/// Served memory.
#[derive(Debug)]
pub(crate) struct Served {
    memory: MmapRaw,
    uffd: OwnedFd,
}

impl Served {
    /// Maps `pages`; the first `present` of them are filled by `fill` before they are registered.
    /// `None` where the kernel has no asynchronous write protection.
    pub(crate) fn new(pages: usize, present: usize, fill: impl Fn(usize) -> u64) -> Option<Self> {
        let memory = MmapOptions::new().len(pages * PAGE).map_anon().unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: userfaultfd(2) takes flags by value and returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).unwrap();
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        let served = Self {
            memory: memory.into(),
            // SAFETY: the kernel just returned this descriptor; nobody else knows it.
            uffd: unsafe { OwnedFd::from_raw_fd(fd) },
        };
        for page in 0..present {
            served.store(page, fill(page));
        }
        served.ioctl(IOC_API, &mut [0xaa, WP_ASYNC, 0]).ok()?;
        let bytes = (pages * PAGE) as u64;
        let mut register = [served.address(), bytes, REGISTER_MISSING_WP, 0];
        served.ioctl(IOC_REGISTER, &mut register).unwrap();
        Some(served)
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.as_mut_ptr() as u64
    }

    fn ioctl(&self, number: u64, args: &mut [u64]) -> io::Result<()> {
        // SAFETY: each caller passes as many words as the structure of its ioctl has; all of them
        // consist of 64-bit words. Addresses in them lie in `memory` or in a borrowed page.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), number, args.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The next fault; `None` when there is none now.
    pub(crate) fn fault(&self) -> Option<Fault> {
        let mut message = [0_u8; 32];
        let read = rustix::io::read(&self.uffd, &mut message).ok()?;
        assert_eq!(
            (read, message[0]),
            (32, 0x12),
            "nothing but faults is asked for"
        );
        let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
        let page = usize::try_from(word(16) - self.address()).unwrap() / PAGE;
        let is_write = word(8) & 1 == 1;
        Some(Fault { page, is_write })
    }

    /// Puts `value` and zeros in a missing page and wakes who waits.
    pub(crate) fn install(&self, page: usize, value: u64, protected: bool) -> io::Result<()> {
        let mut bytes = [0_u64; PAGE / 8];
        bytes[0] = value;
        let mode = if protected { COPY_PROTECTED } else { 0 };
        let from = bytes.as_ptr() as u64;
        self.ioctl(IOC_COPY, &mut [self.at(page), from, PAGE as u64, mode, 0])
    }

    /// Maps the zero page at a missing page and wakes who waits.
    pub(crate) fn install_zero(&self, page: usize) -> io::Result<()> {
        self.ioctl(IOC_ZEROPAGE, &mut [self.at(page), PAGE as u64, 0, 0])
    }

    pub(crate) fn wake(&self, page: usize) {
        self.ioctl(IOC_WAKE, &mut [self.at(page), PAGE as u64])
            .unwrap();
    }

    /// Has all present pages count as not written.
    pub(crate) fn protect(&self, pages: std::ops::Range<usize>) {
        let bytes = (pages.len() * PAGE) as u64;
        self.ioctl(IOC_WRITEPROTECT, &mut [self.at(pages.start), bytes, 1])
            .unwrap();
    }

    pub(crate) fn discard(&self, first: usize, count: usize) -> io::Result<()> {
        assert!(first + count <= self.memory.len() / PAGE);
        let start = self.at(first) as *mut _;
        // SAFETY: the range lies in `memory` (asserted), to which no reference exists. That its
        // content goes is the point.
        unsafe { rustix::mm::madvise(start, count * PAGE, Discard::LinuxDontNeed) }?;
        Ok(())
    }

    /// The first word of a page; waits for the pager.
    pub(crate) fn load(&self, page: usize) -> u64 {
        // SAFETY: `at` asserts that the page lies in `memory`; the access is volatile and aligned.
        unsafe { std::ptr::read_volatile(self.at(page) as *const u64) }
    }

    /// Writes the first word of a page; waits for the pager.
    pub(crate) fn store(&self, page: usize, value: u64) {
        // SAFETY: as in `load`.
        unsafe { std::ptr::write_volatile(self.at(page) as *mut u64, value) };
    }

    fn at(&self, page: usize) -> u64 {
        assert!(page < self.memory.len() / PAGE);
        self.address() + (page * PAGE) as u64
    }
}

impl AsFd for Served {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
