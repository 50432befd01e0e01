#![forbid(unsafe_code)]
//! Initial RAM file systems, written in the kernel's own format (cpio `newc`), not compressed: L1
//! would unpack it with emulated instructions.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::packages;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const TEXT: u32 = 0o100_644;

/// An archive that grows entry by entry; parents of a file are made when they are missing.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    seen: BTreeSet<String>,
}

impl Archive {
    /// The guest under test: busybox, an init that takes commands from COM1, and modules of drivers, with
    /// their order in `/modules/order`.
    ///
    /// # Errors
    /// When there is no busybox.
    pub fn guest(modules: &[(String, Vec<u8>)]) -> Result<Self> {
        let mut archive = Self::default();
        archive.host_file(&packages::busybox()?, "/bin/busybox", true)?;
        archive.file("/init", include_bytes!("../../rig/l2-init.sh"), true)?;
        let mut order = String::new();
        for (name, content) in modules {
            archive.file(&format!("/modules/{name}.ko"), content, false)?;
            order.push_str(name);
            order.push('\n');
        }
        archive.file("/modules/order", order.as_bytes(), false)?;
        Ok(archive)
    }

    /// Adds a file with the given content.
    ///
    /// # Errors
    /// When the content is larger than the format can say (4 GiB).
    pub fn file(&mut self, path: &str, content: &[u8], executable: bool) -> Result<()> {
        let path = path.trim_start_matches('/');
        if !self.seen.insert(path.to_owned()) {
            return Ok(());
        }
        for (at, _) in path.match_indices('/') {
            if self.seen.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY, &[])?;
            }
        }
        self.entry(path, if executable { PROGRAM } else { TEXT }, content)
    }

    /// Adds a file of this machine.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn host_file(&mut self, from: &Path, to: &str, executable: bool) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(to, &content, executable)
    }

    /// Adds a program of this machine, without its debug information, and the shared libraries that
    /// it needs, these at the paths where they are here.
    ///
    /// # Errors
    /// When a file cannot be read or `ldd` does not find a library.
    pub fn program(&mut self, from: &Path, to: &str) -> Result<()> {
        for library in libraries(from)? {
            let to = library.to_string_lossy().into_owned();
            self.host_file(&library, &to, true)?;
        }
        let stripped = tempfile::NamedTempFile::new().context("cannot make a temporary file")?;
        let strip = Command::new("strip")
            .arg("-o")
            .arg(stripped.path())
            .arg(from)
            .output();
        // Without binutils the image is larger, and no worse.
        let smaller = strip.is_ok_and(|result| result.status.success());
        self.host_file(if smaller { stripped.path() } else { from }, to, true)
    }

    /// The archive, complete.
    ///
    /// # Errors
    /// None in practice.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let bytes = u32::try_from(content.len()).with_context(|| format!("{name} is too large"))?;
        let name_bytes = u32::try_from(name.len() + 1).context("the name is too long")?;
        self.entries += 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            bytes,
            0,
            0,
            0,
            0,
            name_bytes,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// What `ldd` says that a program loads, the dynamic loader included; nothing for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let result = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd")?;
    let said = String::from_utf8_lossy(&result.stdout).into_owned();
    if said.contains("not found") {
        bail!(
            "ldd misses a library of {}: {}",
            program.display(),
            said.trim()
        );
    }
    // Lines are `name => path (address)`, or `path (address)` for the loader; the vdso has no path.
    Ok(said
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(|path| PathBuf::from(path.trim_end_matches(':')))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_parents_once_and_is_aligned() {
        let mut archive = Archive::default();
        archive.file("/a/b/one", b"1", false).unwrap();
        archive.file("/a/b/two", b"22222", true).unwrap();
        archive.file("/a/b/two", b"again", true).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        // a, a/b, two files, the trailer.
        assert_eq!(text.matches("070701").count(), 5);
        assert!(!text.contains("again"));
    }
}
