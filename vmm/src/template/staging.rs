#![forbid(unsafe_code)]
//! A template in the making: files without a name, which vanish with the process, however it ends.
//!
//! Everything is written to `O_TMPFILE` files. Only when all of it is there are they linked into a
//! directory beside the output, which one rename then turns into the template. A process that is
//! killed before that leaves nothing; one that is killed in the instant of the links leaves a
//! directory named `.NAME.partial-PID` without a manifest, which the next create removes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::error::TemplateError;

/// The place where a template is being made.
#[derive(Debug)]
pub struct Staging {
    out: PathBuf,
    parent: PathBuf,
}

impl Staging {
    /// Checks that `out` does not exist and that its parent does, and removes what an earlier
    /// create that was killed left there.
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
        staging.sweep()?;
        Ok(staging)
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
        let partial = self.parent.join(self.partial_name(std::process::id()));
        fs::create_dir(&partial).map_err(TemplateError::io("make directory", &partial))?;
        self.link_all(&partial, files).inspect_err(|_| {
            let _ = fs::remove_dir_all(&partial);
        })
    }

    fn link_all(&self, partial: &Path, files: &[(&str, &File)]) -> Result<(), TemplateError> {
        // All that takes time comes first: between the first link and the rename a killed process
        // would leave files with names.
        for (name, file) in files {
            finish(file, &partial.join(name))?;
        }
        for (name, file) in files {
            link(file, &partial.join(name))?;
        }
        sync_dir(partial)?;
        let renamed =
            rustix::fs::renameat_with(CWD, partial, CWD, &self.out, RenameFlags::NOREPLACE);
        match renamed {
            Ok(()) => sync_dir(&self.parent),
            Err(Errno::EXIST) => Err(TemplateError::Exists {
                dir: self.out.clone(),
            }),
            Err(errno) => Err(TemplateError::errno("put in place", &self.out)(errno)),
        }
    }

    fn partial_prefix(&self) -> OsString {
        let mut name = OsString::from(".");
        name.push(self.out.file_name().unwrap_or_default());
        name.push(".partial-");
        name
    }

    fn partial_name(&self, pid: u32) -> OsString {
        let mut name = self.partial_prefix();
        name.push(pid.to_string());
        name
    }

    /// Removes directories that a create of the same output left when it was killed while it gave
    /// files their names: those whose process is no more.
    fn sweep(&self) -> Result<(), TemplateError> {
        let prefix = self.partial_prefix();
        let entries = fs::read_dir(&self.parent)
            .map_err(TemplateError::io("list directory", &self.parent))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let pid = name
                .as_encoded_bytes()
                .strip_prefix(prefix.as_encoded_bytes())
                .and_then(|pid| std::str::from_utf8(pid).ok())
                .and_then(|pid| pid.parse::<u32>().ok());
            if let Some(pid) = pid
                && !Path::new(&format!("/proc/{pid}")).exists()
            {
                let path = entry.path();
                tracing::warn!(path = %path.display(), "removing what a killed create left");
                fs::remove_dir_all(&path).map_err(TemplateError::io("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// Puts `bytes` in the place of an existing read-only file, whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), TemplateError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let file = nameless(dir)?;
    (&file)
        .write_all(bytes)
        .map_err(TemplateError::io("write", path))?;
    finish(&file, path)?;
    // A link cannot replace a name, a rename can.
    let mut staged = path.as_os_str().to_owned();
    staged.push(format!(".new-{}", std::process::id()));
    let staged = PathBuf::from(staged);
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
    fn leftovers_of_dead_processes_are_removed_and_others_kept() {
        let dir = tempfile::tempdir().unwrap();
        // No process has this number: it is above the kernel's limit.
        let dead = dir.path().join(".t.partial-4194305");
        let alive = dir
            .path()
            .join(format!(".t.partial-{}", std::process::id()));
        let other = dir.path().join(".u.partial-4194305");
        for path in [&dead, &alive, &other] {
            fs::create_dir(path).unwrap();
        }
        Staging::new(&dir.path().join("t")).unwrap();
        assert!(!dead.exists() && alive.exists() && other.exists());
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
