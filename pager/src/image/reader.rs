#![forbid(unsafe_code)]
//! A RAM file that is proven openable and cannot be written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl};

use super::{BackendIndex, ImageError};
use crate::page::{ByteOffset, PAGE_BYTES, PageCount, PageRange};

/// One template RAM file with its index. The descriptor is open for reading only, and no code
/// outside this crate can get at it: a clone has no way to write its template.
#[derive(Debug)]
pub struct Image {
    file: Arc<File>,
    path: PathBuf,
    id: String,
    index: BackendIndex,
    /// Where in the file the first page is, in bytes.
    offset_bytes: u64,
}

impl Image {
    /// In a fork: closes the file. The rest is left as it is: to free it would copy its pages first.
    pub(crate) fn close(self) {
        let Self {
            file,
            path,
            id,
            index,
            offset_bytes: _,
        } = self;
        drop(file);
        std::mem::forget((path, id, index));
    }

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
        let image = Self::part_of(file, path, id, index, 0)?;
        let actual = image
            .file
            .metadata()
            .map_err(|source| ImageError::Read { offset: 0, source })?
            .len();
        if actual != image.bytes() {
            return Err(ImageError::Size {
                path: image.path,
                expected: image.index.pages().bytes(),
                actual,
            });
        }
        Ok(image)
    }

    /// Takes the part of a file that begins at `offset_bytes`, a whole number of pages. The file may
    /// be longer than the part.
    pub fn part_of(
        file: File,
        path: &Path,
        id: &str,
        index: BackendIndex,
        offset_bytes: u64,
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
        let end = offset_bytes.checked_add(index.pages().bytes());
        if end.is_none_or(|end| facts.len() < end) || !offset_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(ImageError::Size {
                path,
                expected: offset_bytes.saturating_add(index.pages().bytes()),
                actual: facts.len(),
            });
        }
        Ok(Self {
            offset_bytes,
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

    /// Where in the file these pages begin.
    pub(crate) fn offset_of(&self, pages: PageRange) -> ByteOffset {
        ByteOffset::new(self.offset_bytes.saturating_add(pages.offset().get()))
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
    fn a_part_of_a_file_begins_where_it_is_told_to() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 5 * 4096]).unwrap();
        let part = |offset, bytes| {
            let file = File::open(file.path()).unwrap();
            let index = BackendIndex::unsummed(&file, offset, bytes)?;
            Image::part_of(file, Path::new("ram"), "ram", index, offset)
        };
        let image = part(8192, 8192).unwrap();
        let page = PageRange::single(crate::page::PageIndex::new(1));
        assert_eq!(image.offset_of(page).get(), 12288);
        assert!(part(8192, 4 * 4096).is_err() && part(100, 4096).is_err());
        part(u64::MAX - 4095, 4096).unwrap_err();
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
