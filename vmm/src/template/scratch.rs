#![forbid(unsafe_code)]
//! Directories that belong to a process for as long as it lives, and are found when it was killed.
//!
//! The owner holds an exclusive `flock` on the directory itself. The kernel lets go of it with the
//! process, however that ends, and it counts across PID namespaces; a process number does neither.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags, flock};
use rustix::io::Errno;

use super::error::TemplateError;

/// Most bytes that a name has behind its prefix: a process number, `-`, 8 hex digits.
pub const SUFFIX_BYTES: usize = 7 + 1 + 8;
/// Most names that are tried: each try fails only where a sweep came in between.
const MAX_ATTEMPTS: u32 = 16;

/// A directory that this process has made, removed when dropped.
#[derive(Debug)]
pub struct LockedDir {
    path: PathBuf,
    is_placed: bool,
    /// Held open for its lock.
    _lock: File,
}

impl LockedDir {
    /// Makes the directory `PREFIX` + process number + `-` + 8 random hex digits in `parent`.
    pub fn create(parent: &Path, prefix: &OsStr) -> Result<Self, TemplateError> {
        for _ in 0..MAX_ATTEMPTS {
            let path = parent.join(new_name(prefix)?);
            match fs::create_dir(&path) {
                Ok(()) => (),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(TemplateError::io("make directory", &path)(error)),
            }
            if let Some(lock) = lock(&path)? {
                return Ok(Self {
                    path,
                    is_placed: false,
                    _lock: lock,
                });
            }
        }
        Err(TemplateError::errno(
            "make a directory of its own in",
            parent,
        )(Errno::EXIST))
    }

    /// Removes the directories of this prefix in `parent` whose process is no more. What cannot be
    /// removed is left to the next sweep: it stands in nobody's way.
    pub fn sweep(parent: &Path, prefix: &OsStr) -> Result<(), TemplateError> {
        let entries = fs::read_dir(parent).map_err(TemplateError::io("list directory", parent))?;
        for entry in entries.flatten() {
            if !is_ours(&entry.file_name(), prefix) {
                continue;
            }
            let path = entry.path();
            // Held while it is removed, so that two sweeps do not meet.
            if let Ok(Some(_lock)) = lock(&path) {
                tracing::warn!(path = %path.display(), "removing what a killed process left");
                if let Err(error) = fs::remove_dir_all(&path) {
                    tracing::warn!(path = %path.display(), "cannot remove it: {error}");
                }
            }
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its final name, which must be free; it is no longer removed then.
    pub fn place(mut self, name: &Path) -> Result<(), TemplateError> {
        match rustix::fs::renameat_with(CWD, &self.path, CWD, name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                self.is_placed = true;
                Ok(())
            }
            Err(Errno::EXIST) => Err(TemplateError::Exists {
                dir: name.to_owned(),
            }),
            Err(errno) => Err(TemplateError::errno("put in place", name)(errno)),
        }
    }
}

impl Drop for LockedDir {
    fn drop(&mut self) {
        if !self.is_placed {
            // Nothing more can be done about what cannot be removed; the next sweep tries again.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn new_name(prefix: &OsStr) -> Result<OsString, TemplateError> {
    let mut random = [0; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(
        TemplateError::errno("find a random name like", Path::new(prefix)),
    )?;
    let mut name = prefix.to_owned();
    name.push(format!(
        "{}-{:08x}",
        std::process::id(),
        u32::from_ne_bytes(random)
    ));
    Ok(name)
}

/// Whether a name is one that [`new_name`] makes.
fn is_ours(name: &OsStr, prefix: &OsStr) -> bool {
    let is_digits = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_hexdigit);
    name.as_encoded_bytes()
        .strip_prefix(prefix.as_encoded_bytes())
        .and_then(|rest| {
            let dash = rest.iter().position(|&byte| byte == b'-')?;
            Some(is_digits(&rest[..dash]) && is_digits(&rest[dash + 1..]))
        })
        .unwrap_or(false)
}

/// The lock of a directory; `None` where another process has it, or where the directory is gone or
/// another one by the time it is had.
fn lock(path: &Path) -> Result<Option<File>, TemplateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let handle = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(handle) => File::from(handle),
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(TemplateError::errno("open", path)(errno)),
    };
    match flock(&handle, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => (),
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(errno) => return Err(TemplateError::errno("lock", path)(errno)),
    }
    let locked = handle
        .metadata()
        .map_err(TemplateError::io("examine", path))?;
    let is_there = fs::symlink_metadata(path)
        .is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()));
    Ok(is_there.then_some(handle))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = ".t.partial-";

    fn create(parent: &Path) -> LockedDir {
        LockedDir::create(parent, OsStr::new(PREFIX)).unwrap()
    }

    #[test]
    fn only_what_nobody_holds_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let held = create(dir.path());
        fs::write(held.path().join("f"), b"x").unwrap();
        let left = [
            format!("{PREFIX}1-0000abcd"),
            format!("{PREFIX}{}-1", std::process::id()),
        ]
        .map(|name| dir.path().join(name));
        let foreign = [
            format!("{PREFIX}1"),
            format!("{PREFIX}mine-1"),
            format!("{PREFIX}1.partial-1-1"),
            ".u.partial-1-1".to_owned(),
        ]
        .map(|name| dir.path().join(name));
        for path in left.iter().chain(&foreign) {
            fs::create_dir(path).unwrap();
            fs::write(path.join("f"), b"x").unwrap();
        }
        LockedDir::sweep(dir.path(), OsStr::new(PREFIX)).unwrap();
        assert!(held.path().join("f").exists());
        assert!(left.iter().all(|path| !path.exists()));
        assert!(foreign.iter().all(|path| path.exists()));
    }

    #[test]
    fn it_vanishes_unless_it_was_placed() {
        let dir = tempfile::tempdir().unwrap();
        let path = create(dir.path()).path().to_owned();
        assert!(!path.exists());
        let out = dir.path().join("out");
        create(dir.path()).place(&out).unwrap();
        assert!(out.exists());
        let late = create(dir.path()).place(&out).unwrap_err();
        assert!(matches!(late, TemplateError::Exists { .. }), "{late}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_name_is_no_longer_than_it_says() {
        let name = new_name(OsStr::new(PREFIX)).unwrap();
        assert!(name.len() <= PREFIX.len() + SUFFIX_BYTES);
        assert!(is_ours(&name, OsStr::new(PREFIX)));
    }

    #[test]
    fn sweeps_and_creates_at_once_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let held = create(dir.path());
                        fs::write(held.path().join("f"), b"x").unwrap();
                        LockedDir::sweep(dir.path(), OsStr::new(PREFIX)).unwrap();
                        assert!(held.path().join("f").exists());
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
