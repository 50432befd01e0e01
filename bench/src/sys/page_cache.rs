// UNSAFETY: cachestat(2) has no wrapper. Its arguments are two structures of this function.
#![expect(unsafe_code, reason = "a system call without a wrapper")]
//! How much of a file the page cache holds.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The system call, the same number on every architecture (Linux 6.5).
const CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct Range {
    offset: u64,
    /// Zero: up to the end.
    bytes: u64,
}

#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

const _: () = assert!(size_of::<Range>() == 16 && size_of::<Stat>() == 40);

/// Pages of the file that are in the page cache; `None` where the kernel cannot tell.
pub(crate) fn cached_pages(file: &File) -> io::Result<Option<u64>> {
    let range = Range {
        offset: 0,
        bytes: 0,
    };
    let mut stat = Stat::default();
    // SAFETY: both structures have the kernel's layout (asserted above) and live through the call,
    // which reads the first and writes the second.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    if result == 0 {
        return Ok(Some(stat.cached));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOSYS) => Ok(None),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_cached() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 0).unwrap();
        // Kernels before 6.5 cannot tell.
        if let Some(pages) = cached_pages(&file).unwrap() {
            assert_eq!(pages, 2);
        }
    }
}
