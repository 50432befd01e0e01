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

/// As a number of bytes: up to wherever the file ends, now or later.
pub const TO_THE_END: u64 = 0;

/// Whether somebody else has a lock of any part of `file`.
pub fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, 0, TO_THE_END)?;
    // SAFETY: the descriptor is open, and `lock` is a valid structure for the time of the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn flock(kind: i32, offset_bytes: u64, bytes: u64) -> io::Result<libc::flock> {
    let number = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let short = |value: i32| i16::try_from(value).unwrap_or_default();
    Ok(libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: number(offset_bytes)?,
        l_len: number(bytes)?,
        // Locks of an open file want 0.
        l_pid: 0,
    })
}

/// Locks `bytes` bytes of `file` from `offset_bytes` on, without waiting.
pub fn lock_range(
    file: &File,
    kind: LockKind,
    offset_bytes: u64,
    bytes: u64,
) -> io::Result<Locked> {
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    let lock = flock(kind, offset_bytes, bytes)?;
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
        assert!(is_locked(&reader).unwrap() && is_locked(&file.reopen().unwrap()).unwrap());
        drop(writer);
        assert_eq!(lock(&reader, LockKind::Shared, 0), Locked::Yes);
        let second = File::open(file.path()).unwrap();
        assert_eq!(lock(&second, LockKind::Shared, 0), Locked::Yes);
        lock_range(&reader, LockKind::Exclusive, 0, 4096).unwrap_err();
        lock_range(&reader, LockKind::Shared, u64::MAX, 1).unwrap_err();
    }
}
