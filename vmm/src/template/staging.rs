#![forbid(unsafe_code)]
//! A template in the making: files without a name, which vanish with the process, however it ends.
//!
//! Everything is written to `O_TMPFILE` files. Only when all of it is there are they linked into a
//! directory beside the output, which one rename then turns into the template. A process that is
//! killed before that leaves nothing; one that is killed in the instant of the links leaves a
//! directory named `.NAME.partial-PID-RANDOM` without a manifest, which the next create removes.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use super::error::TemplateError;
use super::scratch::{LockedDir, SUFFIX_BYTES};

/// What most file systems allow for a name, where one does not say.
const NAME_MAX_BYTES: u64 = 255;

/// The place where a template is being made.
#[derive(Debug)]
pub struct Staging {
    out: PathBuf,
    parent: PathBuf,
}

impl Staging {
    /// Checks that `out` does not exist, that its parent does and that there is room for its name
    /// in the making, and removes what an earlier create that was killed left there.
    pub fn new(out: &Path) -> Result<Self, TemplateError> {
        if out.symlink_metadata().is_ok() {
            return Err(TemplateError::Exists {
                dir: out.to_owned(),
            });
        }
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let staging = Self {
            out: out.to_owned(),
            parent,
        };
        staging.check_place()?;
        LockedDir::sweep(&staging.parent, &staging.partial_prefix())?;
        Ok(staging)
    }

    fn check_place(&self) -> Result<(), TemplateError> {
        if matches!(self.parent.try_exists(), Ok(false)) {
            return Err(self.impossible(format!(
                "the directory {} does not exist: make it first",
                self.parent.display()
            )));
        }
        let max_bytes = rustix::fs::statvfs(&self.parent)
            .map(|facts| facts.f_namemax)
            .ok()
            .filter(|&bytes| bytes > 0)
            .unwrap_or(NAME_MAX_BYTES);
        let name_bytes = self.out.file_name().map_or(0, OsStr::len);
        // While it is made the name has this much more.
        let added_bytes = self.partial_prefix().len() - name_bytes + SUFFIX_BYTES;
        let max_bytes = usize::try_from(max_bytes)
            .unwrap_or(usize::MAX)
            .saturating_sub(added_bytes);
        if name_bytes > max_bytes {
            return Err(self.impossible(format!(
                "its name has {name_bytes} bytes: choose one of at most {max_bytes}"
            )));
        }
        Ok(())
    }

    fn impossible(&self, reason: String) -> TemplateError {
        TemplateError::Output {
            dir: self.out.clone(),
            reason,
        }
    }

    /// Where the finished template will be.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// A new file without a name, readable and writable, on the file system of the output.
    pub fn file(&self) -> Result<File, TemplateError> {
        nameless(&self.parent)
    }

    /// A new file without a name that holds `bytes`.
    pub fn file_with(&self, bytes: &[u8]) -> Result<File, TemplateError> {
        let mut file = self.file()?;
        file.write_all(bytes)
            .map_err(TemplateError::io("write a file in", &self.parent))?;
        Ok(file)
    }

    /// Makes `file` this long.
    pub fn set_bytes(&self, file: &File, bytes: u64) -> Result<(), TemplateError> {
        match rustix::fs::ftruncate(file, bytes) {
            Ok(()) => Ok(()),
            Err(Errno::FBIG) => Err(self.impossible(format!(
                "a RAM file of {bytes} bytes is more than the limit of file sizes (ulimit -f) or \
                 the file system allows: raise the limit, choose another disk, or give the VM less \
                 memory"
            ))),
            Err(errno) => Err(TemplateError::errno("size a RAM file in", &self.parent)(
                errno,
            )),
        }
    }

    /// Takes `bytes` of disk for `file` now, so that a full disk is found before the guest runs.
    pub fn reserve(&self, file: &File, bytes: u64) -> Result<(), TemplateError> {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(()),
            Err(Errno::NOSPC | Errno::FBIG) => {
                let free_bytes = rustix::fs::statvfs(&self.parent)
                    .map_or(0, |space| space.f_bavail.saturating_mul(space.f_frsize));
                Err(TemplateError::DiskFull {
                    dir: self.parent.clone(),
                    needed_bytes: bytes,
                    free_bytes,
                })
            }
            Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(TemplateError::errno(
                "reserve room for RAM in",
                &self.parent,
            )(errno)),
        }
    }

    /// Gives the files their names, makes them read-only and puts the directory in its place.
    /// The last of `files` is the manifest: without it the directory is no template.
    pub fn commit(self, files: &[(&str, &File)]) -> Result<(), TemplateError> {
        let partial = LockedDir::create(&self.parent, &self.partial_prefix())?;
        // All that takes time comes first: between the first link and the rename a killed process
        // would leave files with names.
        for (name, file) in files {
            finish(file, &partial.path().join(name))?;
        }
        for (name, file) in files {
            link(file, &partial.path().join(name))?;
        }
        sync_dir(partial.path())?;
        partial.place(&self.out)?;
        sync_dir(&self.parent)
    }

    fn partial_prefix(&self) -> OsString {
        let mut name = OsString::from(".");
        name.push(self.out.file_name().unwrap_or_default());
        name.push(".partial-");
        name
    }
}

/// What the name of a new `file` begins with in the instant before it takes the place of the old.
pub(super) fn replacement_prefix(file: &str) -> String {
    format!("{file}.new-")
}

/// Puts `bytes` in the place of a read-only file, whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), TemplateError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let file = nameless(dir)?;
    (&file)
        .write_all(bytes)
        .map_err(TemplateError::io("write", path))?;
    finish(&file, path)?;
    // A link cannot replace a name, a rename can.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = dir.join(format!(
        "{}{}",
        replacement_prefix(&name),
        std::process::id()
    ));
    link(&file, &staged)?;
    fs::rename(&staged, path)
        .map_err(TemplateError::io("put in place", path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&staged);
        })?;
    sync_dir(dir)
}

fn nameless(dir: &Path) -> Result<File, TemplateError> {
    rustix::fs::open(
        dir,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    )
    .map(File::from)
    .map_err(TemplateError::errno("make a file without a name in", dir))
}

/// Makes a file read-only and durable.
fn finish(file: &File, path: &Path) -> Result<(), TemplateError> {
    rustix::fs::fchmod(file, Mode::RUSR | Mode::RGRP | Mode::ROTH)
        .map_err(TemplateError::errno("make read-only", path))?;
    file.sync_all()
        .map_err(TemplateError::io("write to disk", path))
}

/// Gives a file that has no name this one.
fn link(file: &File, path: &Path) -> Result<(), TemplateError> {
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, nameless, CWD, path, AtFlags::SYMLINK_FOLLOW)
        .map_err(TemplateError::errno("give a name to", path))
}

fn sync_dir(dir: &Path) -> Result<(), TemplateError> {
    File::open(dir)
        .and_then(|handle| handle.sync_all())
        .map_err(TemplateError::io("write to disk", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_has_a_name_until_the_commit() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("t");
        let staging = Staging::new(&out).unwrap();
        let ram = staging.file_with(b"ram").unwrap();
        let manifest = staging.file_with(b"{}").unwrap();
        assert!(names(dir.path()).is_empty());
        staging
            .commit(&[("ram0.mem", &ram), ("manifest.json", &manifest)])
            .unwrap();
        assert_eq!(names(dir.path()), ["t"]);
        assert_eq!(names(&out), ["manifest.json", "ram0.mem"]);
        assert!(
            fs::metadata(out.join("ram0.mem"))
                .unwrap()
                .permissions()
                .readonly()
        );
    }

    #[test]
    fn an_output_that_exists_is_refused_early_and_late() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("t");
        let staging = Staging::new(&out).unwrap();
        let manifest = staging.file_with(b"{}").unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("mine"), b"keep").unwrap();
        let late = staging.commit(&[("manifest.json", &manifest)]).unwrap_err();
        assert!(matches!(late, TemplateError::Exists { .. }), "{late}");
        assert_eq!(names(dir.path()), ["t"], "nothing half-made is left");
        assert_eq!(names(&out), ["mine"]);
        assert!(matches!(
            Staging::new(&out),
            Err(TemplateError::Exists { .. })
        ));
    }

    #[test]
    fn leftovers_of_this_output_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(".t.partial-1-00000001");
        let other = dir.path().join(".u.partial-1-00000001");
        for path in [&left, &other] {
            fs::create_dir(path).unwrap();
        }
        Staging::new(&dir.path().join("t")).unwrap();
        assert!(!left.exists() && other.exists());
    }

    #[test]
    fn a_place_that_cannot_be_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let message = |path: &str| {
            Staging::new(&dir.path().join(path))
                .unwrap_err()
                .to_string()
        };
        assert!(message("none/t").contains("/none does not exist: make it first"));
        let error = message(&"x".repeat(230));
        assert!(
            error.contains("its name has 230 bytes: choose one of at most 229"),
            "{error}"
        );
        let longest = dir.path().join("x".repeat(229));
        let staging = Staging::new(&longest).unwrap();
        let file = staging.file_with(b"{}").unwrap();
        staging.commit(&[("manifest.json", &file)]).unwrap();
        assert!(longest.join("manifest.json").exists());
    }

    #[test]
    fn a_disk_without_room_is_said_with_the_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(&dir.path().join("t")).unwrap();
        let file = staging.file().unwrap();
        let error = staging.reserve(&file, 1 << 50).unwrap_err().to_string();
        assert!(
            error.contains("its RAM needs 1125899906842624 bytes"),
            "{error}"
        );
    }
}
