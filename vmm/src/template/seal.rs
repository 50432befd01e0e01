#![forbid(unsafe_code)]
//! The seal: what a file was when the template was finished, cheap enough to check at every open.
//!
//! A seal finds a file that was replaced, written, truncated or enlarged. A bit that flipped on
//! the disk leaves it intact: chunk checksums (when a page is read) and digests (`pando template
//! verify`) find that.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::TemplateError;

/// Identity of a sealed file. The device number is left out: it may change over a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// Inode number.
    pub inode: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Last modification, whole seconds since 1970.
    pub mtime_s: i64,
    /// Last modification, nanoseconds behind `mtime_s`.
    pub mtime_ns: i64,
}

impl Seal {
    /// The seal that this open file has now.
    pub fn of(file: &File, path: &Path) -> Result<Self, TemplateError> {
        let metadata = file
            .metadata()
            .map_err(TemplateError::io("examine", path))?;
        Ok(Self {
            inode: metadata.ino(),
            bytes: metadata.len(),
            mtime_s: metadata.mtime(),
            mtime_ns: metadata.mtime_nsec(),
        })
    }

    /// Refuses a file of template `dir` that is not as it was sealed, naming what differs. The
    /// size is compared first: it is what a torn copy shows.
    pub fn check(&self, dir: &Path, file: &File, path: &Path) -> Result<(), TemplateError> {
        let now = Self::of(file, path)?;
        let changed = |what, expected: String, actual: String| {
            Err(TemplateError::Changed {
                dir: dir.to_owned(),
                path: path.to_owned(),
                what,
                expected,
                actual,
            })
        };
        if now.bytes != self.bytes {
            return changed(
                "size",
                format!("{} bytes", self.bytes),
                format!("{} bytes", now.bytes),
            );
        }
        if now.inode != self.inode {
            return changed("inode", self.inode.to_string(), now.inode.to_string());
        }
        if (now.mtime_s, now.mtime_ns) != (self.mtime_s, self.mtime_ns) {
            return changed(
                "modification time",
                format!("{}.{:09}", self.mtime_s, self.mtime_ns),
                format!("{}.{:09}", now.mtime_s, now.mtime_ns),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn each_kind_of_change_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram0.mem");
        std::fs::write(&path, b"aspen").unwrap();
        let seal = Seal::of(&File::open(&path).unwrap(), &path).unwrap();
        let check = || {
            seal.check(dir.path(), &File::open(&path).unwrap(), &path)
                .map_err(|error| error.to_string())
        };
        check().unwrap();

        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"x")
            .unwrap();
        assert!(
            check()
                .unwrap_err()
                .contains("its size is 6 bytes, sealed was 5 bytes")
        );

        std::fs::write(&path, b"ASPEN").unwrap();
        assert!(check().unwrap_err().contains("its modification time is"));

        let copy = dir.path().join("copy");
        std::fs::copy(&path, &copy).unwrap();
        std::fs::rename(&copy, &path).unwrap();
        let error = check().unwrap_err();
        assert!(
            error.contains("its inode is") && error.contains("--reseal"),
            "{error}"
        );
    }
}
