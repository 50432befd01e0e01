#![forbid(unsafe_code)]
//! The image of a disk: a raw file, or one that is shared with others and what was written over it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Access, FallocateFlags};
use rustix::io::Errno;
use thiserror::Error;

use super::layer::Layered;
use super::request::{Extent, SECTOR_BYTES};
use crate::spec::DiskAccess;
use crate::sys::lock::{LockKind, Locked, TO_THE_END, lock_range};

/// What is written at once where the file system knows no zeros.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why an image cannot be a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open the disk image {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is no file.
    #[error("the disk image {} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Its size is no number of sectors.
    #[error(
        "the disk image {} has {bytes} bytes: a raw image has a positive multiple of {SECTOR_BYTES}",
        path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// There is nowhere for what the guest writes.
    #[error(
        "what the guest writes over {} cannot be kept in {}: set TMPDIR to a directory that is writable",
        path.display(), folder.display()
    )]
    Folder {
        /// The image.
        path: PathBuf,
        /// Where the file of a layer would be made.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another machine has it.
    #[error(
        "the disk image {} is in use by another machine: give each its own copy, or share it read-only",
        path.display()
    )]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

/// An image that was opened and is as a disk must be. A copy is the same disk: for a machine that is made
/// anew by a reset, and has what the one before has written.
#[derive(Debug, Clone)]
pub struct Disk {
    image: Image,
    bytes: u64,
    writes: Arc<Writes>,
}

/// What became of writes, of all copies of a disk.
#[derive(Debug, Default)]
struct Writes {
    /// Something may not be on the host's disk yet.
    are_pending: AtomicBool,
    /// How many failed, for want of room or for worse.
    failed: AtomicU64,
}

#[derive(Debug, Clone)]
enum Image {
    /// Nobody here writes it.
    ReadOnly(Arc<File>),
    /// Nor this, which is in no file.
    Memory(Arc<[u8]>),
    /// What the guest writes goes there.
    Writable(Arc<File>),
    /// What the guest writes goes elsewhere.
    Layered(Arc<Mutex<Layered>>),
}

impl Disk {
    /// Opens an image. Until the disk goes nobody else can write it, and where this machine writes it
    /// nobody else can have it. What a snapshot's guest writes goes to a file in `folder`.
    pub fn open(path: &Path, access: DiskAccess, folder: &Path) -> Result<Self, DiskError> {
        let open = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let facts = std::fs::metadata(path).map_err(open)?;
        // Before it is opened: opening a FIFO would wait for its other end.
        if !facts.is_file() {
            return Err(DiskError::NotAFile {
                path: path.to_owned(),
            });
        }
        let is_writer = access == DiskAccess::Write;
        let file = File::options()
            .read(true)
            .write(is_writer)
            .open(path)
            .map_err(open)?;
        let kind = if is_writer {
            LockKind::Exclusive
        } else {
            LockKind::Shared
        };
        hold(&file, path, kind)?;
        Self::from_file(file, path, access, folder)
    }

    /// An image that the caller has opened, for reading, and for writing where the guest writes it.
    pub fn from_file(
        file: File,
        path: &Path,
        access: DiskAccess,
        folder: &Path,
    ) -> Result<Self, DiskError> {
        let bytes = checked_bytes(&file, path)?;
        let image = match access {
            DiskAccess::Write => Image::Writable(Arc::new(file)),
            DiskAccess::Read => Image::ReadOnly(Arc::new(file)),
            DiskAccess::Snapshot => {
                // Found now, as far as asking tells, and not by the guest's first write.
                rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(
                    |errno| DiskError::Folder {
                        path: path.to_owned(),
                        folder: folder.to_owned(),
                        source: errno.into(),
                    },
                )?;
                let layered = Layered::new(file, bytes, folder);
                Image::Layered(Arc::new(Mutex::new(layered)))
            }
        };
        Ok(Self {
            image,
            bytes,
            writes: Arc::default(),
        })
    }

    /// A disk that has these bytes, whole sectors, and cannot be written.
    pub fn of_bytes(content: Vec<u8>) -> Self {
        Self {
            bytes: content.len() as u64,
            image: Image::Memory(content.into()),
            writes: Arc::default(),
        }
    }

    /// How many writes, discards and flushes have failed: the guest was told, and what it made of that is in
    /// its memory and on its disk.
    pub fn failed_writes(&self) -> u64 {
        self.writes.failed.load(Ordering::Relaxed)
    }

    /// Whether something was written that ends with this process.
    pub fn has_own_layer(&self) -> bool {
        matches!(&self.image, Image::Layered(layered) if lock(layered).has_layer())
    }

    /// Whether something was written that the host may still lose.
    pub fn has_pending_writes(&self) -> bool {
        self.writes.are_pending.load(Ordering::SeqCst)
    }

    /// The file that has all of an extent to be read, for who reads it by itself.
    pub(super) fn file_to_read(&self, extent: Extent) -> Option<Arc<File>> {
        match &self.image {
            Image::ReadOnly(file) | Image::Writable(file) => Some(Arc::clone(file)),
            Image::Layered(layered) => lock(layered).file_of(extent),
            Image::Memory(_) => None,
        }
    }

    /// The file that is written, for who writes or flushes it by itself, and says so: [`Self::written`],
    /// [`Self::begin_flush`].
    pub(super) fn file_to_write(&self) -> Option<Arc<File>> {
        match &self.image {
            Image::Writable(file) => Some(Arc::clone(file)),
            Image::ReadOnly(_) | Image::Memory(_) | Image::Layered(_) => None,
        }
    }

    /// What is written until now will be durable.
    pub(super) fn begin_flush(&self) {
        self.writes.are_pending.store(false, Ordering::SeqCst);
    }

    /// A flush has failed.
    pub(super) fn flush_failed(&self) {
        self.writes.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that something is written, and whether that failed.
    pub(super) fn written(&self, done: io::Result<()>) -> io::Result<()> {
        if !self.is_readonly() {
            // One that failed may have been done in part.
            self.writes.are_pending.store(true, Ordering::SeqCst);
            let failed = u64::from(done.is_err());
            self.writes.failed.fetch_add(failed, Ordering::Relaxed);
        }
        done
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nobody can write it.
    pub fn is_readonly(&self) -> bool {
        matches!(self.image, Image::ReadOnly(_) | Image::Memory(_))
    }

    /// Fills `buffer` from `offset` on.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match &self.image {
            Image::ReadOnly(file) | Image::Writable(file) => file.read_exact_at(buffer, offset),
            Image::Memory(content) => read_memory(content, offset, buffer),
            Image::Layered(layered) => lock(layered).read_at(offset, buffer),
        }
    }

    /// Writes `bytes` from `offset` on.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let done = match &self.image {
            Image::ReadOnly(_) | Image::Memory(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Image::Writable(file) => file.write_all_at(bytes, offset),
            Image::Layered(layered) => lock(layered).write_at(offset, bytes),
        };
        self.written(done)
    }

    /// Returns when everything that was written will survive the host's end. What a clone writes
    /// ends with the clone: there is nothing to do.
    pub fn flush(&self) -> io::Result<()> {
        self.begin_flush();
        match &self.image {
            Image::Writable(file) => file.sync_data().inspect_err(|_| self.flush_failed()),
            Image::ReadOnly(_) | Image::Memory(_) | Image::Layered(_) => Ok(()),
        }
    }

    /// Gives back the storage of an extent, whose content is not needed any more.
    pub fn discard(&mut self, extent: Extent) -> io::Result<()> {
        let done = match &self.image {
            Image::ReadOnly(_) | Image::Memory(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            // A hint: a file system that cannot may leave it.
            Image::Writable(file) => punch(file, extent).map(|_| ()),
            Image::Layered(layered) => lock(layered).zero(extent),
        };
        self.written(done)
    }

    /// Makes an extent zero, and gives back its storage where that `may_free` it.
    pub fn zero(&mut self, extent: Extent, may_free: bool) -> io::Result<()> {
        let done = match &self.image {
            Image::ReadOnly(_) | Image::Memory(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Image::Layered(layered) => lock(layered).zero(extent),
            Image::Writable(file) => make_zero(file, extent, may_free),
        };
        self.written(done)
    }
}

/// Takes an image for this process: until the descriptor and its copies are closed nobody else can write
/// it, and where it is taken to be written nobody else can have it.
pub fn hold(file: &File, path: &Path, kind: LockKind) -> Result<(), DiskError> {
    let path = || path.to_owned();
    match lock_range(file, kind, 0, TO_THE_END) {
        Ok(Locked::Yes) => Ok(()),
        Ok(Locked::Busy) => Err(DiskError::Busy { path: path() }),
        Err(source) => Err(DiskError::Open {
            path: path(),
            source,
        }),
    }
}

fn read_memory(content: &[u8], offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let start = usize::try_from(offset).ok();
    let range = start.and_then(|start| Some(start..start.checked_add(buffer.len())?));
    match range.and_then(|range| content.get(range)) {
        Some(bytes) => {
            buffer.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn make_zero(file: &File, extent: Extent, may_free: bool) -> io::Result<()> {
    if may_free && punch(file, extent)? {
        return Ok(());
    }
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, extent)? {
        true => Ok(()),
        false => write_zeros(file, extent),
    }
}

fn lock(layered: &Mutex<Layered>) -> MutexGuard<'_, Layered> {
    layered.lock().unwrap_or_else(PoisonError::into_inner)
}

fn punch(file: &File, extent: Extent) -> io::Result<bool> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, extent)
}

/// Whether the file system can.
fn fallocate(file: &File, flags: FallocateFlags, extent: Extent) -> io::Result<bool> {
    if extent.bytes == 0 {
        return Ok(true);
    }
    match rustix::fs::fallocate(file, flags, extent.offset, extent.bytes) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Writes zeros, for file systems that know nothing better.
pub(super) fn write_zeros(file: &File, extent: Extent) -> io::Result<()> {
    let mut offset = extent.offset;
    let end = extent.offset + extent.bytes;
    while offset < end {
        let length = usize::try_from(end - offset).map_or(ZEROS.len(), |n| n.min(ZEROS.len()));
        file.write_all_at(ZEROS.get(..length).unwrap_or(&ZEROS), offset)?;
        offset += length as u64;
    }
    Ok(())
}

fn checked_bytes(file: &File, path: &Path) -> Result<u64, DiskError> {
    let facts = file.metadata().map_err(|source| DiskError::Open {
        path: path.to_owned(),
        source,
    })?;
    let bytes = facts.len();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(DiskError::Size {
            path: path.to_owned(),
            bytes,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn open(path: &Path, access: DiskAccess) -> Result<Disk, DiskError> {
        Disk::open(path, access, &std::env::temp_dir())
    }

    #[test]
    fn an_image_is_whole_sectors_of_a_file() {
        let message = |path: &Path| open(path, DiskAccess::Read).unwrap_err().to_string();
        assert!(message(image(0).path()).contains("has 0 bytes"));
        assert!(message(image(1000).path()).contains("has 1000 bytes"));
        assert!(message(Path::new("/dev")).contains("not a regular file"));
        assert!(message(Path::new("/nowhere")).contains("cannot open"));
        assert_eq!(
            open(image(1024).path(), DiskAccess::Write).unwrap().bytes(),
            1024
        );
        let nowhere = Path::new("/nowhere");
        let image = image(1024);
        let error = Disk::open(image.path(), DiskAccess::Snapshot, nowhere).unwrap_err();
        assert!(
            error.to_string().contains("in /nowhere: set TMPDIR"),
            "{error}"
        );
    }

    #[test]
    fn one_writes_or_many_read() {
        let file = image(4096);
        let writer = open(file.path(), DiskAccess::Write).unwrap();
        let busy = open(file.path(), DiskAccess::Read).unwrap_err();
        assert!(matches!(busy, DiskError::Busy { .. }), "{busy}");
        drop(writer);
        let _readers = [(); 2].map(|()| open(file.path(), DiskAccess::Read).unwrap());
        let busy = open(file.path(), DiskAccess::Write).unwrap_err();
        assert!(matches!(busy, DiskError::Busy { .. }), "{busy}");
    }

    #[test]
    fn a_copy_is_the_same_disk_and_keeps_it_from_others() {
        let file = image(1 << 20);
        for access in [DiskAccess::Write, DiskAccess::Snapshot] {
            let mut disk = open(file.path(), access).unwrap();
            let copy = disk.clone();
            assert!(!copy.has_own_layer());
            disk.write_at(8192, &[9; 512]).unwrap();
            assert_eq!(copy.has_own_layer(), access == DiskAccess::Snapshot);
            drop(disk);
            let mut found = [0; 512];
            copy.read_at(8192, &mut found).unwrap();
            assert_eq!(found, [9; 512], "{access:?}");
            let other = open(file.path(), DiskAccess::Write);
            assert!(matches!(other, Err(DiskError::Busy { .. })), "{access:?}");
        }
    }

    #[test]
    fn what_is_written_is_read_and_what_is_zeroed_is_zero() {
        let file = image(1 << 20);
        let mut disk = open(file.path(), DiskAccess::Write).unwrap();
        disk.write_at(512, &[7; 8192]).unwrap();
        disk.zero(
            Extent {
                offset: 1024,
                bytes: 4096,
            },
            false,
        )
        .unwrap();
        disk.zero(
            Extent {
                offset: 6144,
                bytes: 512,
            },
            true,
        )
        .unwrap();
        disk.discard(Extent {
            offset: 0,
            bytes: 0,
        })
        .unwrap();
        disk.flush().unwrap();
        let mut back = vec![0; 8704];
        disk.read_at(0, &mut back).unwrap();
        let is_seven = |at: usize| match at {
            0..512 | 1024..5120 | 6144..6656 => 0,
            _ => 7,
        };
        let expected: Vec<u8> = (0..8704).map(is_seven).collect();
        assert_eq!(back, expected);
        assert!(disk.read_at(1 << 20, &mut [0]).is_err());
        drop(disk);
        let mut disk = open(file.path(), DiskAccess::Read).unwrap();
        disk.write_at(0, &[1]).unwrap_err();
        disk.zero(
            Extent {
                offset: 0,
                bytes: 512,
            },
            true,
        )
        .unwrap_err();
        disk.discard(Extent {
            offset: 0,
            bytes: 512,
        })
        .unwrap_err();
    }
}
