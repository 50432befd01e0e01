#![forbid(unsafe_code)]
//! A RAM file that is proven openable and cannot be written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl};

use super::{BackendIndex, ImageError};
use crate::page::PageCount;

/// One template RAM file with its index. The descriptor is open for reading only, and no code
/// outside this crate can get at it: a clone has no way to write its template.
#[derive(Debug)]
pub struct Image {
    file: Arc<File>,
    path: PathBuf,
    id: String,
    index: BackendIndex,
}

impl Image {
    /// Opens `path` read-only as backend `id`. Refused: anything but a regular file, and a file
    /// whose size is not exactly what the index says.
    pub fn open(path: &Path, id: &str, index: BackendIndex) -> Result<Self, ImageError> {
        // Without NONBLOCK a FIFO in the file's place would hang the open.
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nonblock)
            .open(path)
            .map_err(|source| ImageError::Open {
                path: path.to_owned(),
                source,
            })?;
        Self::from_file(file, path, id, index)
    }

    /// Takes a file that the caller opened; its access mode must be read-only. `path` is what
    /// messages call it.
    pub fn from_file(
        file: File,
        path: &Path,
        id: &str,
        index: BackendIndex,
    ) -> Result<Self, ImageError> {
        let path = path.to_owned();
        let flags = fcntl_getfl(&file).map_err(|errno| ImageError::Read {
            offset: 0,
            source: errno.into(),
        })?;
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
            return Err(ImageError::Writable { path });
        }
        let facts = file
            .metadata()
            .map_err(|source| ImageError::Read { offset: 0, source })?;
        if !facts.is_file() {
            return Err(ImageError::NotAFile { path });
        }
        if facts.len() != index.pages().bytes() {
            return Err(ImageError::Size {
                path,
                expected: index.pages().bytes(),
                actual: facts.len(),
            });
        }
        Ok(Self {
            file: Arc::new(file),
            path,
            id: id.to_owned(),
            index,
        })
    }

    /// Id of the memory backend.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Size of the memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.index.pages().bytes()
    }

    /// Where the file was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What each page is.
    pub fn index(&self) -> &BackendIndex {
        &self.index
    }

    pub(crate) fn pages(&self) -> PageCount {
        self.index.pages()
    }

    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index_of(bytes: u64) -> BackendIndex {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        BackendIndex::scan(&file, bytes, &mut |_, _| ()).unwrap()
    }

    #[test]
    fn an_image_can_only_be_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let writable = file.reopen().unwrap();
        let error = Image::from_file(writable, file.path(), "ram", index_of(8192)).unwrap_err();
        assert!(error.to_string().ends_with("open it read-only"), "{error}");
        let image = Image::open(file.path(), "ram", index_of(8192)).unwrap();
        assert_eq!((image.id(), image.bytes()), ("ram", 8192));
        assert_eq!(image.path(), file.path());
        let flags = fcntl_getfl(image.file()).unwrap();
        assert!(!flags.intersects(OFlags::WRONLY | OFlags::RDWR));
    }

    #[test]
    fn other_files_and_sizes_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let text = |path: &Path| {
            Image::open(path, "ram", index_of(4096))
                .unwrap_err()
                .to_string()
        };
        assert!(text(directory.path()).ends_with("is not a regular file"));
        let file = directory.path().join("ram.mem");
        assert!(text(&file).starts_with("cannot open memory file"));
        std::fs::write(&file, [0; 5000]).unwrap();
        assert!(text(&file).contains("5000 bytes where its index says 4096"));
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(text(&fifo).ends_with("is not a regular file"));
    }
}
