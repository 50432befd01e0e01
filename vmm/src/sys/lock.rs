// UNSAFETY: fcntl(2) takes the lock as a structure by address; it is a local one.
#![expect(unsafe_code, reason = "fcntl takes a struct flock by address")]
//! Locks of a part of a file that belong to an open file, not to a process: two files that one process
//! has open exclude each other too, and the kernel lets go with the last descriptor.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What a lock is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// For reading, beside other readers. The file must be open for reading.
    Shared,
    /// For writing, alone. The file must be open for writing.
    Exclusive,
}

/// What came of asking for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locked {
    /// It is had until `file` is closed.
    Yes,
    /// Somebody else has one that excludes it.
    Busy,
}

/// Locks `bytes` bytes of `file` from `offset_bytes` on, without waiting.
pub fn lock_range(
    file: &File,
    kind: LockKind,
    offset_bytes: u64,
    bytes: u64,
) -> io::Result<Locked> {
    let number = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    let short = |value: i32| i16::try_from(value).unwrap_or_default();
    let lock = libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: number(offset_bytes)?,
        l_len: number(bytes)?,
        // Locks of an open file want 0.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and `lock` is a valid structure for the time of the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 {
        return Ok(Locked::Yes);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(Locked::Busy),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_open_files_of_one_process_exclude_each_other() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = file.reopen().unwrap();
        let reader = File::open(file.path()).unwrap();
        let lock = |file: &File, kind, offset| lock_range(file, kind, offset, 4096).unwrap();
        assert_eq!(lock(&writer, LockKind::Exclusive, 0), Locked::Yes);
        assert_eq!(lock(&reader, LockKind::Shared, 0), Locked::Busy);
        assert_eq!(lock(&reader, LockKind::Shared, 4096), Locked::Yes);
        drop(writer);
        assert_eq!(lock(&reader, LockKind::Shared, 0), Locked::Yes);
        let second = File::open(file.path()).unwrap();
        assert_eq!(lock(&second, LockKind::Shared, 0), Locked::Yes);
        lock_range(&reader, LockKind::Exclusive, 0, 4096).unwrap_err();
        lock_range(&reader, LockKind::Shared, u64::MAX, 1).unwrap_err();
    }
}
