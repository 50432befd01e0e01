#![forbid(unsafe_code)]
//! The state file itself: opened, its header written and proven.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use pando_pager::image::frame::{Frame, FrameError, HEADER_BYTES};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::address::StateAddress;
use super::state::SavedMachine;
use crate::memory::layout::PAGE_BYTES;
use crate::qemu::link::reason;
use crate::sys::lock::{LockKind, Locked, TO_THE_END, lock_range};

/// The version of the body that this build writes and reads. Version 1 said nothing of nodes, modules
/// and, in its beginnings, of memory that the guest only reads.
pub const FORMAT: u32 = 2;
const FRAME: Frame = Frame {
    magic: *b"PANDOMG\0",
    version: FORMAT,
};
/// Most bytes of a body: page indexes of 1 TiB; a bound on what is read into memory.
pub const MAX_BODY_BYTES: u64 = 1 << 30;

/// A state file, open at the place where the state begins.
#[derive(Debug)]
pub struct StateFile {
    /// The file.
    pub file: File,
    /// What messages call it.
    pub path: PathBuf,
    /// Where in it the state begins, in bytes.
    pub offset_bytes: u64,
    /// Whether places in it can be chosen.
    pub can_seek: bool,
    /// Whether it is a file on disk: what is in it comes at once.
    pub is_regular: bool,
}

/// Opens `address` to save to. `fds` gives the descriptors of `getfd`.
pub fn create(
    address: &StateAddress,
    fds: &mut dyn FnMut(&str) -> Option<OwnedFd>,
) -> Result<StateFile, String> {
    match address {
        StateAddress::File { path, offset_bytes } => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(|error| {
                    format!("Could not create '{}': {}", path.display(), reason(&error))
                })?;
            // Memory of a machine is locked, and so is a state that somebody else writes or reads.
            if lock_range(&file, LockKind::Exclusive, 0, TO_THE_END).is_ok_and(is_busy) {
                return Err(format!(
                    "Could not create '{}': it is the memory of a machine that is there, or a state that is being \
                     saved or loaded: name another file",
                    path.display()
                ));
            }
            file.set_len(*offset_bytes).map_err(|error| {
                format!(
                    "failed to truncate migration file to offset {offset_bytes:x}: {}",
                    reason(&error)
                )
            })?;
            at(file, path, *offset_bytes)
        }
        StateAddress::Fd(name) => descriptor(name, true, fds),
    }
}

/// Opens `address` to load from.
pub fn open(
    address: &StateAddress,
    fds: &mut dyn FnMut(&str) -> Option<OwnedFd>,
) -> Result<StateFile, String> {
    match address {
        StateAddress::File { path, offset_bytes } => {
            let failed = |error: io::Error| {
                format!("Could not open '{}': {}", path.display(), reason(&error))
            };
            // A FIFO would wait for a writer without NONBLOCK, and with it all monitors.
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map_err(failed)?;
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(format!(
                    "Could not open '{}': it is no regular file: name one, or pass a descriptor as fd:NAME",
                    path.display()
                ));
            }
            if lock_range(&file, LockKind::Shared, 0, TO_THE_END).is_ok_and(is_busy) {
                return Err(format!(
                    "Could not open '{}': somebody still writes it: wait until its migration is completed",
                    path.display()
                ));
            }
            at(file, path, *offset_bytes)
        }
        StateAddress::Fd(name) => descriptor(name, false, fds),
    }
}

fn is_busy(locked: Locked) -> bool {
    locked == Locked::Busy
}

fn at(mut file: File, path: &Path, offset_bytes: u64) -> Result<StateFile, String> {
    file.seek(SeekFrom::Start(offset_bytes)).map_err(|error| {
        format!(
            "Unable to seek to offset {offset_bytes:#x} in '{}': {}",
            path.display(),
            reason(&error)
        )
    })?;
    Ok(StateFile {
        file,
        path: path.to_owned(),
        offset_bytes,
        can_seek: true,
        is_regular: true,
    })
}

/// A descriptor that a client passed, or one that this process was started with.
fn descriptor(
    name: &str,
    write: bool,
    fds: &mut dyn FnMut(&str) -> Option<OwnedFd>,
) -> Result<StateFile, String> {
    let passed = fds(name).map(File::from);
    let file = match passed {
        Some(file) => file,
        // A FIFO would wait for its other end.
        None if name.bytes().all(|c| c.is_ascii_digit()) && !name.is_empty() => OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{name}"))
            .map_err(|error| format!("fd {name} cannot be used: {}", reason(&error)))?,
        None => return Err(format!("File descriptor named '{name}' has not been found")),
    };
    let is_regular = file.metadata().is_ok_and(|facts| facts.is_file());
    if !is_regular {
        // The thread that reads or writes it may wait.
        let _ = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK));
    }
    let mut state = StateFile {
        path: PathBuf::from(format!("fd:{name}")),
        offset_bytes: 0,
        can_seek: false,
        is_regular,
        file,
    };
    if let Ok(offset) = state.file.stream_position() {
        state.offset_bytes = offset;
        state.can_seek = true;
    }
    Ok(state)
}

/// Why a state could not be read. The first line of what QEMU prints, and what it ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// What is wrong.
    pub lines: Vec<String>,
    /// The error in QEMU's words.
    pub errno: &'static str,
}

impl LoadError {
    /// Something that cannot be so.
    pub fn invalid(line: impl Into<String>) -> Self {
        Self {
            lines: vec![line.into()],
            errno: "Invalid argument",
        }
    }

    /// Something that cannot be read.
    pub fn io(line: impl Into<String>) -> Self {
        Self {
            lines: vec![line.into()],
            errno: "Input/output error",
        }
    }

    /// The same with another line behind it.
    #[must_use]
    pub fn and(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }

    /// What `query-migrate` says.
    pub fn summary(&self) -> String {
        format!("load of migration failed: {}", self.errno)
    }
}

impl StateFile {
    /// Writes header and body; RAM comes behind. Returns where that begins.
    pub fn write_head(&mut self, saved: &SavedMachine) -> io::Result<u64> {
        let body = postcard::to_stdvec(saved).map_err(io::Error::other)?;
        let mut head = FRAME.encode(&body);
        let end = ram_offset(self.offset_bytes, head.len() as u64);
        let length = usize::try_from(end - self.offset_bytes).map_err(io::Error::other)?;
        head.resize(length, 0);
        self.file.write_all(&head)?;
        Ok(end)
    }

    /// Proves header and body. Returns where RAM begins; the file is at that place.
    pub fn read_head(&mut self) -> Result<(SavedMachine, u64), LoadError> {
        let not_ours = || LoadError::invalid("Not a migration stream");
        let name = self.path.display().to_string();
        let cut = |what: &str| {
            LoadError::io(format!(
                "error while loading state section id 0(ram): {name} is cut: {what}"
            ))
        };
        let mut head = Vec::with_capacity(HEADER_BYTES);
        Read::by_ref(&mut self.file)
            .take(HEADER_BYTES as u64)
            .read_to_end(&mut head)
            .map_err(|error| LoadError::io(format!("cannot read {name}: {}", reason(&error))))?;
        match FRAME.body(&head) {
            Err(FrameError::Magic) => return Err(not_ours()),
            Err(FrameError::TooShort { .. }) if head.len() < FRAME.magic.len() => {
                return Err(not_ours());
            }
            Err(FrameError::TooShort { .. }) => return Err(cut("its header is not whole")),
            Err(FrameError::Length { expected, .. }) if expected <= MAX_BODY_BYTES => {
                let read = Read::by_ref(&mut self.file)
                    .take(expected)
                    .read_to_end(&mut head);
                if read.is_err() {
                    return Err(cut("its body cannot be read"));
                }
            }
            Ok(_) => (),
            Err(error) => return Err(LoadError::invalid(format!("{name}: {error}"))),
        }
        let body = FRAME.body(&head).map_err(|error| match error {
            FrameError::Length { .. } => cut(&error.to_string()),
            _ => LoadError::invalid(format!("{name} is damaged: {error}")),
        })?;
        let saved = postcard::from_bytes(body).map_err(|error| {
            LoadError::invalid(format!(
                "{name} is damaged: its body cannot be decoded: {error}"
            ))
        })?;
        let end = ram_offset(self.offset_bytes, head.len() as u64);
        let padding = end - self.offset_bytes - head.len() as u64;
        io::copy(
            &mut Read::by_ref(&mut self.file).take(padding),
            &mut io::sink(),
        )
        .map_err(|_| cut("it ends behind its body"))?;
        Ok((saved, end))
    }
}

fn ram_offset(begin: u64, head_bytes: u64) -> u64 {
    (begin + head_bytes).next_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::migration::state::SavedTopology;
    use proptest::prelude::*;

    fn saved() -> SavedMachine {
        SavedMachine {
            kind: "pc-q35-10.0".into(),
            cpus: 1,
            status: "paused".into(),
            has_program: true,
            uuid: None,
            ignore_shared: true,
            mapped_ram: false,
            backends: Vec::new(),
            topology: SavedTopology::default(),
            machine: vec![1, 2, 3],
        }
    }

    fn state_of(bytes: &[u8]) -> StateFile {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        at(file, Path::new("state"), 0).unwrap()
    }

    fn encoded() -> Vec<u8> {
        let mut state = state_of(b"");
        assert_eq!(state.write_head(&saved()).unwrap(), 4096);
        state.file.rewind().unwrap();
        let mut bytes = Vec::new();
        state.file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_head_comes_back_and_damage_is_named() {
        let good = encoded();
        assert_eq!(state_of(&good).read_head().unwrap(), (saved(), 4096));
        let lines = |bytes: &[u8]| state_of(bytes).read_head().unwrap_err().lines;
        assert_eq!(lines(b""), ["Not a migration stream"]);
        assert_eq!(lines(b"garbagegarbage"), ["Not a migration stream"]);
        assert!(lines(&good[..20])[0].contains("its header is not whole"));
        assert!(lines(&good[..40])[0].contains("is cut"));
        let mut newer = good.clone();
        newer[8] = 9;
        assert!(lines(&newer)[0].contains("has version 9"));
        let mut older = good.clone();
        older[8] = 1;
        assert!(lines(&older)[0].contains("has version 1"));
        let mut flipped = good;
        flipped[40] ^= 1;
        assert!(lines(&flipped)[0].contains("is damaged: its checksum"));
    }

    #[test]
    fn an_offset_that_no_file_has_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::fs::write(&path, encoded()).unwrap();
        let address = StateAddress::File {
            path,
            offset_bytes: u64::MAX,
        };
        let error = open(&address, &mut |_| None).unwrap_err();
        assert!(error.contains("0xffffffffffffffff"), "{error}");
        create(&address, &mut |_| None).unwrap_err();
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert!(state_of(&bytes).read_head().is_err());
        }

        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>) {
            let _ = state_of(&FRAME.encode(&body)).read_head();
        }
    }
}
