#![forbid(unsafe_code)]
//! Opens the file of a memory backend as QEMU does, and refuses early where QEMU would crash, hang or
//! run a machine that cannot work. Every text contains QEMU's where it has one.
//!
//! | the file | template | private | clone, read-only memory |
//! |---|---|---|---|
//! | is missing | made, of the size needed | the same | refused |
//! | is empty | made as long as needed | the same | refused |
//! | is too short | refused | refused | refused |
//! | is longer | used as it is | the same | the same |
//! | is a directory | a file without a name in it | the same | refused |
//!
//! A file that this call made is removed again when the call fails.

mod error;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

pub use error::OpenError;
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};

use super::layout::PAGE_BYTES;
use crate::spec::{BackendSpec, FileAccess, FileSource};
use crate::sys::lock::{LockKind, Locked, lock_range};

/// What QEMU advises where a private backend may not be opened for writing.
const READONLY_HINT: &str = "\nConsider opening the backing store read-only but still creating \
     writable RAM using '-object memory-backend-file,readonly=on,rom=off...' (see \"VM templating\" \
     documentation)";
/// Magic number of hugetlbfs.
const HUGETLBFS_MAGIC: u64 = 0x958f_4588;

/// The file of a backend, open as its access says: for writing only where it is a template.
#[derive(Debug)]
pub struct OpenedFile {
    /// The file; its descriptor holds a lock of the backend's part of it.
    pub file: File,
    /// Whether it has no name: it was to be in a directory.
    pub is_nameless: bool,
    /// Whether this call made it.
    pub is_new: bool,
}

/// Opens the file of `backend`, which is `source`.
pub fn open(backend: &BackendSpec, source: &FileSource) -> Result<OpenedFile, OpenError> {
    let opening = Opening {
        id: backend.id(),
        bytes: backend.bytes(),
        align_bytes: backend.align_bytes(),
        source,
    };
    match source.access() {
        FileAccess::Template | FileAccess::Private => opening.writable(),
        FileAccess::Clone | FileAccess::Rom { .. } => opening.read_only(),
    }
}

/// What is wrong with the file of memory that is only read, if anything is. For a refusal of such memory
/// that would hide it: QEMU speaks of the file first. Files that opening could make or change are not
/// looked at.
pub fn fault_of_read_only(backend: &BackendSpec) -> Option<OpenError> {
    let is_read =
        |file: &&FileSource| matches!(file.access(), FileAccess::Clone | FileAccess::Rom { .. });
    let source = backend.file().filter(is_read)?;
    open(backend, source).err()
}

struct Opening<'a> {
    id: &'a str,
    bytes: u64,
    align_bytes: u64,
    source: &'a FileSource,
}

impl Opening<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn end_bytes(&self) -> u64 {
        self.source.offset_bytes() + self.bytes
    }

    fn is_private(&self) -> bool {
        self.source.access() == FileAccess::Private
    }

    fn refused(&self, error: &io::Error) -> OpenError {
        OpenError::Open {
            path: self.path().to_owned(),
            why: text_of(error),
            hint: "",
        }
    }

    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> OpenError {
        let path = self.path().to_owned();
        move |source| OpenError::Io {
            what,
            path: path.clone(),
            source,
        }
    }

    fn read_only(&self) -> Result<OpenedFile, OpenError> {
        let file = open_reading(self.path()).map_err(|error| self.refused(&error))?;
        self.check_kind(&file)?;
        if self.length(&file)? == 0 {
            return Err(OpenError::Empty {
                id: self.id.to_owned(),
                path: self.path().to_owned(),
            });
        }
        self.check(&file)?;
        self.lock(&file, LockKind::Shared)?;
        Ok(OpenedFile {
            file,
            is_nameless: false,
            is_new: false,
        })
    }

    fn writable(&self) -> Result<OpenedFile, OpenError> {
        let (file, made) = match self.existing() {
            Ok(file) => (file, Made::Nothing),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                (self.nameless()?, Made::Nameless)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (self.create()?, Made::Named),
            Err(error) => return Err(self.not_opened(&error)),
        };
        let finished = self.finish(file, made);
        if finished.is_err() && made == Made::Named {
            // It was empty, and nobody else had it.
            let _ = fs::remove_file(self.path());
        }
        finished
    }

    /// The file that is there: open for writing where it is a template or still empty.
    fn existing(&self) -> io::Result<File> {
        if self.is_private() && fs::metadata(self.path())?.len() > 0 {
            if fs::metadata(self.path())?.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            // QEMU opens it for writing. Who may not do that is told so, and nobody does it.
            rustix::fs::accessat(CWD, self.path(), Access::WRITE_OK, AtFlags::EACCESS)?;
            return open_reading(self.path());
        }
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.path())
    }

    fn create(&self) -> Result<File, OpenError> {
        let created = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(self.path());
        created.map_err(|error| match error.kind() {
            // It is there and it is not: a link to nothing, which QEMU tries to open for ever.
            io::ErrorKind::AlreadyExists => OpenError::Dangling {
                path: self.path().to_owned(),
            },
            _ => self.refused(&error),
        })
    }

    fn nameless(&self) -> Result<File, OpenError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(self.path(), flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|errno| self.refused(&errno.into()))
    }

    fn not_opened(&self, error: &io::Error) -> OpenError {
        let may_not = error.kind() == io::ErrorKind::PermissionDenied;
        let hint = if self.is_private() && may_not && open_reading(self.path()).is_ok() {
            READONLY_HINT
        } else {
            ""
        };
        OpenError::Open {
            path: self.path().to_owned(),
            why: text_of(error),
            hint,
        }
    }

    /// Makes an empty file long enough, and proves any other.
    fn finish(&self, mut file: File, made: Made) -> Result<OpenedFile, OpenError> {
        self.check_kind(&file)?;
        let is_empty = self.length(&file)? == 0;
        if is_empty && is_regular(&file) {
            self.check_pages(&file)?;
            file.set_len(self.end_bytes())
                .map_err(self.io("make long enough"))?;
        } else if !is_empty {
            self.check(&file)?;
        }
        let is_nameless = made == Made::Nameless;
        if self.is_private() && !is_nameless {
            // Whatever it was opened for until here: from here on it is only read.
            file = open_reading(self.path()).map_err(|error| self.refused(&error))?;
            self.lock(&file, LockKind::Shared)?;
        } else if is_regular(&file) {
            self.lock(&file, LockKind::Exclusive)?;
        }
        Ok(OpenedFile {
            file,
            is_nameless,
            is_new: made == Made::Named,
        })
    }

    fn length(&self, file: &File) -> Result<u64, OpenError> {
        Ok(file.metadata().map_err(self.io("examine"))?.len())
    }

    /// Directories, and what holds no memory. A device is for the kernel to judge where memory is to be
    /// shared with it.
    fn check_kind(&self, file: &File) -> Result<(), OpenError> {
        let facts = file.metadata().map_err(self.io("examine"))?;
        let kind = facts.file_type();
        if kind.is_dir() {
            let error = io::Error::from_raw_os_error(libc::EISDIR);
            return Err(self.refused(&error));
        }
        // The one device that is memory when it is mapped.
        let is_zero = kind.is_char_device() && facts.rdev() == rustix::fs::makedev(1, 5);
        let is_template = is_zero && self.source.access() == FileAccess::Template;
        let what = if kind.is_fifo() {
            "a FIFO"
        } else if kind.is_socket() {
            "a socket"
        } else if !kind.is_file() && !is_template {
            "a device (ftruncate: Invalid argument)"
        } else {
            return Ok(());
        };
        Err(OpenError::NotAFile {
            path: self.path().to_owned(),
            what,
        })
    }

    fn check(&self, file: &File) -> Result<(), OpenError> {
        self.check_pages(file)?;
        let actual_bytes = self.length(file)?;
        if actual_bytes < self.end_bytes() {
            return Err(OpenError::TooSmall {
                id: self.id.to_owned(),
                path: self.path().to_owned(),
                actual_bytes,
                bytes: self.bytes,
                offset_bytes: self.source.offset_bytes(),
            });
        }
        Ok(())
    }

    /// On hugetlbfs everything is a multiple of its pages.
    fn check_pages(&self, file: &File) -> Result<(), OpenError> {
        let facts = rustix::fs::fstatfs(file).map_err(|errno| self.io("examine")(errno.into()))?;
        let is_huge = u64::try_from(facts.f_type).is_ok_and(|magic| magic == HUGETLBFS_MAGIC);
        let page_bytes = u64::try_from(facts.f_bsize).unwrap_or(PAGE_BYTES);
        if !is_huge || page_bytes == 0 {
            return Ok(());
        }
        [
            ("alignment", self.align_bytes),
            ("offset", self.source.offset_bytes()),
            ("size", self.bytes),
        ]
        .into_iter()
        .find(|(_, value)| value % page_bytes != 0)
        .map_or(Ok(()), |(what, value)| {
            Err(OpenError::PageSize {
                id: self.id.to_owned(),
                path: self.path().to_owned(),
                what,
                value,
                page_bytes,
            })
        })
    }

    fn lock(&self, file: &File, kind: LockKind) -> Result<(), OpenError> {
        match lock_range(file, kind, self.source.offset_bytes(), self.bytes) {
            Ok(Locked::Yes) => Ok(()),
            Ok(Locked::Busy) => Err(OpenError::InUse {
                id: self.id.to_owned(),
                path: self.path().to_owned(),
                who: match kind {
                    LockKind::Shared => "the machine that is its template",
                    LockKind::Exclusive => "another machine, or another backend of this one",
                },
            }),
            // Some file systems have no locks. The rest of what keeps a template safe does not need one.
            Err(error) => {
                tracing::debug!(path = %self.path().display(), "it cannot be locked: {error}");
                Ok(())
            }
        }
    }
}

/// What had to be made before there was a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Nothing,
    Named,
    Nameless,
}

fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|facts| facts.is_file())
}

/// Opens for reading and nothing else. A FIFO would wait for a writer without NONBLOCK.
fn open_reading(path: &Path) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    // io_uring takes the flag at its word where a file system cannot answer at once.
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

/// What the system said, without the number that Rust adds.
pub(super) fn text_of(error: &io::Error) -> String {
    let text = error.to_string();
    let known = error
        .raw_os_error()
        .map(|code| format!(" (os error {code})"));
    known
        .and_then(|suffix| text.strip_suffix(&suffix).map(str::to_owned))
        .unwrap_or(text)
}

#[cfg(test)]
mod tests;
