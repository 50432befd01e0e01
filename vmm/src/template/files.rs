#![forbid(unsafe_code)]
//! Opening the files of a template: regular files only, and no more of them than is expected.

use std::fs::{self, File, FileType};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use super::error::TemplateError;

/// Opens a file for reading; one that is missing counts as damage.
pub(super) fn open(path: &Path) -> Result<File, TemplateError> {
    open_if_there(path)?.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => TemplateError::damaged(path, "it is missing"),
        _ => TemplateError::io("open", path)(error),
    })
}

/// Opens a file for reading and refuses one that is not regular; what the system says about any
/// other is the inner error.
pub(super) fn open_if_there(path: &Path) -> Result<io::Result<File>, TemplateError> {
    // Opening a FIFO waits for a writer, who may never come.
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let facts = match &opened {
        Ok(file) => file.metadata(),
        // A socket cannot be opened at all.
        Err(_) => fs::metadata(path),
    };
    if let Ok(facts) = facts
        && !facts.is_file()
    {
        return Err(TemplateError::damaged(
            path,
            format!("it is {}, not a regular file", kind(facts.file_type())),
        ));
    }
    if let Ok(file) = &opened {
        // io_uring takes the flag at its word where a file system cannot answer at once.
        rustix::fs::fcntl_setfl(file, OFlags::empty())
            .map_err(TemplateError::errno("open", path))?;
    }
    Ok(opened)
}

/// Reads a whole file of at most `max_bytes` bytes.
pub(super) fn read(file: &File, path: &Path, max_bytes: u64) -> Result<Vec<u8>, TemplateError> {
    // A guess, for its room alone: what is believed is what was read.
    let length = file.metadata().map_or(0, |facts| facts.len());
    // One more, to see the end: it is read at once, not bit by bit.
    let room = usize::try_from(length.min(max_bytes)).map_or(0, |bytes| bytes.saturating_add(1));
    let mut bytes = Vec::with_capacity(room);
    file.take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(TemplateError::io("read", path))?;
    if bytes.len() as u64 > max_bytes {
        return Err(TemplateError::damaged(
            path,
            format!("it has more than {max_bytes} bytes"),
        ));
    }
    Ok(bytes)
}

fn kind(file: FileType) -> &'static str {
    if file.is_dir() {
        "a directory"
    } else if file.is_fifo() {
        "a FIFO"
    } else if file.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, mkfifoat};

    #[test]
    fn what_is_no_regular_file_is_named_and_never_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let message = || open(&path).unwrap_err().to_string();
        assert!(message().contains("f is damaged: it is missing"));
        mkfifoat(CWD, &path, Mode::RUSR).unwrap();
        assert!(message().contains("it is a FIFO, not a regular file"));
        fs::remove_file(&path).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(message().contains("it is a socket"));
        drop(socket);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(message().contains("it is a device"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(message().contains("it is a directory"));
    }

    #[test]
    fn a_regular_file_is_read_up_to_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"aspen").unwrap();
        let file = open(&path).unwrap();
        let flags = rustix::fs::fcntl_getfl(&file).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        assert_eq!(read(&file, &path, 5).unwrap(), b"aspen");
        let error = read(&open(&path).unwrap(), &path, 4).unwrap_err();
        assert!(error.to_string().contains("more than 4 bytes"), "{error}");
    }
}
