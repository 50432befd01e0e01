// UNSAFETY: the tests play the guest: they touch served memory by raw address.
#![expect(unsafe_code, reason = "volatile access to served memory")]
//! Served memory as a guest touches it.

use pando_pager::CloneMemory;
use rustix::fs::{MemfdFlags, memfd_create};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

fn address(memory: &CloneMemory, page: u64) -> *mut u8 {
    assert!((page + 1) * 4096 <= memory.bytes());
    let offset = usize::try_from(page).unwrap() * PAGE;
    memory.host_address().wrapping_add(offset)
}

/// All bytes of a page; faults it in.
pub(crate) fn read_page(memory: &CloneMemory, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    // SAFETY: the page lies in the mapping (asserted), which is borrowed; no reference to it
    // exists anywhere, and the tests give each page to one writer.
    unsafe { std::ptr::copy_nonoverlapping(address(memory, page), bytes.as_mut_ptr(), PAGE) };
    bytes
}

/// The first eight bytes of a page; faults it in.
pub(crate) fn read_word(memory: &CloneMemory, page: u64) -> u64 {
    // SAFETY: as in `read_page`; pages are aligned for a word.
    unsafe { std::ptr::read_volatile(address(memory, page).cast()) }
}

/// Writes the first eight bytes of a page; faults it in.
pub(crate) fn write_word(memory: &CloneMemory, page: u64, word: u64) {
    // SAFETY: as in `read_page`.
    unsafe { std::ptr::write_volatile(address(memory, page).cast(), word) };
}

/// A page as the kernel reads it for a system call: where the page cannot be had, that is an
/// error and no signal.
pub(crate) fn try_read_page(memory: &CloneMemory, page: u64) -> io::Result<[u8; PAGE]> {
    let file = std::fs::File::from(memfd_create("page", MemfdFlags::CLOEXEC)?);
    // SAFETY: write(2) only reads the page, which lies in the mapping (asserted); if it cannot,
    // it says so.
    let written = unsafe { libc::write(file.as_raw_fd(), address(memory, page).cast(), PAGE) };
    if written < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut bytes = [0; PAGE];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Makes these pages a kernel mapping apart from their neighbours.
pub(crate) fn split_mapping(memory: &CloneMemory, first: u64, pages: usize) {
    let (start, length) = (address(memory, first), pages * PAGE);
    assert!(first * 4096 + length as u64 <= memory.bytes());
    // SAFETY: the pages lie in the mapping (asserted); their content is not touched.
    let result = unsafe { libc::madvise(start.cast(), length, libc::MADV_SEQUENTIAL) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Maps something else over a page: nothing that can be read.
pub(crate) fn map_over(memory: &CloneMemory, page: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let start = address(memory, page).cast();
    // SAFETY: the page lies in the mapping (asserted), whose owner unmaps what is there now
    // with the rest; no reference to it exists.
    let result = unsafe { libc::mmap(start, PAGE, libc::PROT_NONE, flags, -1, 0) };
    assert_eq!(result, start, "{}", io::Error::last_os_error());
}

/// Throws a page away, as a balloon would.
pub(crate) fn discard_page(memory: &CloneMemory, page: u64) {
    // SAFETY: the page lies in the mapping (asserted) and no reference to it exists.
    let result = unsafe { libc::madvise(address(memory, page).cast(), PAGE, libc::MADV_DONTNEED) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
