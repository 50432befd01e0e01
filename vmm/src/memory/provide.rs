#![forbid(unsafe_code)]
//! All memory of a machine that is described by its backends: each opened, mapped or served.
//!
//! A file that is not to be written is served by a pager in this process, from a descriptor that is
//! open for reading only. It has no index: what the file system has for it is data, the rest zero.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use pando_pager::image::{BackendIndex, Image, ImageError};
use pando_pager::{Idle, Pager, PagerError, PagerOptions, Serving};
use rustix::fs::{FallocateFlags, MemfdFlags};
use thiserror::Error;

use super::guest::{GuestMemoryError, GuestRam, MemoryAdvice, RamBacking};
use super::open::{OpenError, open};
use crate::spec::{BackendSource, BackendSpec, FileAccess, FileSource, MachineSpec};

/// Why a machine cannot have its memory.
#[derive(Debug, Error)]
pub enum ProvideError {
    /// A backend's file.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file that the pager cannot serve.
    #[error("memory backend {id} cannot be served from its file")]
    Image {
        /// The backend.
        id: String,
        /// Why not.
        #[source]
        source: ImageError,
    },
    /// The pager.
    #[error("the pager of the machine's memory cannot start")]
    Pager(#[from] PagerError),
    /// A mapping.
    #[error("cannot give the machine its memory")]
    Memory(#[from] GuestMemoryError),
    /// A file in memory.
    #[error("cannot make memory backend {id} of {bytes} bytes")]
    Memfd {
        /// The backend.
        id: String,
        /// Its size.
        bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Pages that cannot be had now.
    #[error(
        "memory backend {id}: qemu_prealloc_mem: preallocating memory failed: {why}: is the disk full, \
         or memory short?"
    )]
    Prealloc {
        /// The backend.
        id: String,
        /// What the system said.
        why: String,
    },
}

/// The memory of one machine. End the machine, then stop the pager, then drop the rest.
#[derive(Debug)]
pub struct MachineMemory {
    /// What the machine is built on.
    pub ram: GuestRam,
    /// Serves what comes from files that are only read; `None` where nothing does. It serves already.
    pub pager: Option<Pager<Serving>>,
    /// What must outlive the machine.
    pub files: HeldFiles,
}

/// The files of a machine: their descriptors hold their locks, and what was to be dropped from them at
/// the end is dropped with this.
#[derive(Debug, Default)]
pub struct HeldFiles {
    files: Vec<Held>,
}

#[derive(Debug)]
struct Held {
    file: File,
    /// Bytes to drop at the end: offset and length.
    discard: Option<(u64, u64)>,
    /// Its name, where it was made for this machine.
    made: Option<PathBuf>,
}

impl HeldFiles {
    /// Removes what was made for a machine that then could not be.
    fn undo(&self) {
        for path in self.files.iter().filter_map(|held| held.made.as_ref()) {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), "a new and empty file stays: {error}");
            }
        }
    }
}

impl Drop for HeldFiles {
    fn drop(&mut self) {
        for held in &self.files {
            let Some((offset_bytes, bytes)) = held.discard else {
                continue;
            };
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(error) = rustix::fs::fallocate(&held.file, flags, offset_bytes, bytes) {
                tracing::warn!("the content of a backend with discard-data=on stays: {error}");
            }
        }
    }
}

/// Opens and maps every backend of `spec`. Nothing runs yet, and no page of a served file is read but
/// where `prealloc` asks for it.
pub fn provide(spec: &MachineSpec, options: PagerOptions) -> Result<MachineMemory, ProvideError> {
    let mut making = Making {
        options,
        pager: None,
        files: HeldFiles::default(),
    };
    match making.all(spec) {
        Ok((ram, pager)) => Ok(MachineMemory {
            ram,
            pager,
            files: making.files,
        }),
        Err(error) => {
            making.files.undo();
            Err(error)
        }
    }
}

struct Making {
    options: PagerOptions,
    pager: Option<Pager<Idle>>,
    files: HeldFiles,
}

impl Making {
    fn all(
        &mut self,
        spec: &MachineSpec,
    ) -> Result<(GuestRam, Option<Pager<Serving>>), ProvideError> {
        let backings = spec
            .backends()
            .iter()
            .map(|backend| self.backing(backend))
            .collect::<Result<Vec<_>, _>>()?;
        let pager = self.pager.take().map(Pager::<Idle>::serve).transpose()?;
        for (backend, backing) in spec.backends().iter().zip(&backings) {
            advise(backend, backing)?;
        }
        Ok((GuestRam::new(spec.layout(), backings)?, pager))
    }

    fn backing(&mut self, backend: &BackendSpec) -> Result<RamBacking, ProvideError> {
        let bytes = backend.bytes();
        match backend.source() {
            BackendSource::Ram { .. } | BackendSource::Memfd { share: false } => {
                Ok(RamBacking::anonymous(bytes)?)
            }
            BackendSource::Memfd { share: true } => {
                let file = memfd(backend).map_err(|source| ProvideError::Memfd {
                    id: backend.id().to_owned(),
                    bytes,
                    source,
                })?;
                Ok(RamBacking::shared(&file, bytes)?)
            }
            BackendSource::File(source) => self.file_backing(backend, source),
        }
    }

    fn file_backing(
        &mut self,
        backend: &BackendSpec,
        source: &FileSource,
    ) -> Result<RamBacking, ProvideError> {
        let (bytes, offset_bytes) = (backend.bytes(), source.offset_bytes());
        let opened = open(backend, source)?;
        let file = &opened.file;
        let backing = match source.access() {
            FileAccess::Private | FileAccess::Clone if !opened.is_nameless => {
                self.served(backend, source, file)
            }
            FileAccess::Private | FileAccess::Clone => {
                RamBacking::anonymous(bytes).map_err(ProvideError::from)
            }
            FileAccess::Template => {
                RamBacking::shared_from(file, offset_bytes, bytes).map_err(ProvideError::from)
            }
            FileAccess::Rom { .. } => {
                RamBacking::rom(file, offset_bytes, bytes).map_err(ProvideError::from)
            }
        };
        let drops = source.discard_data() && source.access() == FileAccess::Template;
        // Also where it cannot be mapped: what was made for it is then removed again.
        self.files.files.push(Held {
            discard: drops.then_some((offset_bytes, bytes)),
            made: opened.is_new.then(|| source.path().to_owned()),
            file: opened.file,
        });
        backing
    }

    /// Memory that the pager fills from `file`, which is open for reading only.
    fn served(
        &mut self,
        backend: &BackendSpec,
        source: &FileSource,
        file: &File,
    ) -> Result<RamBacking, ProvideError> {
        let refused = |source| ProvideError::Image {
            id: backend.id().to_owned(),
            source,
        };
        let offset_bytes = source.offset_bytes();
        let index = BackendIndex::unsummed(file, offset_bytes, backend.bytes()).map_err(refused)?;
        let again =
            open_again(file).map_err(|source| refused(ImageError::Read { offset: 0, source }))?;
        let image = Image::part_of(again, source.path(), backend.id(), index, offset_bytes)
            .map_err(refused)?;
        let pager = match &mut self.pager {
            Some(pager) => pager,
            None => self.pager.insert(Pager::new(self.options.clone())?),
        };
        Ok(RamBacking::Paged(pager.attach(image)?))
    }
}

/// The same file once more, so that the lock goes with the first: a ring lets go of its files some time
/// after it has ended.
fn open_again(file: &File) -> io::Result<File> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::open(link).or_else(|_| file.try_clone())
}

fn memfd(backend: &BackendSpec) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(backend.id(), MemfdFlags::CLOEXEC)?);
    file.set_len(backend.bytes())?;
    Ok(file)
}

fn advise(backend: &BackendSpec, backing: &RamBacking) -> Result<(), ProvideError> {
    // Merging pages that clones read would let one clone measure what another holds.
    if backend.merge() && matches!(backing, RamBacking::Anonymous(_)) {
        note(backend, "merge", backing.advise(MemoryAdvice::Merge));
    }
    if !backend.dump() {
        let done = backing.advise(MemoryAdvice::LeaveOutOfDumps);
        note(backend, "dump", done);
    }
    if backend.prealloc() {
        let done = backing.advise(MemoryAdvice::Populate);
        done.map_err(|error| ProvideError::Prealloc {
            id: backend.id().to_owned(),
            why: super::open::text_of(&error),
        })?;
    }
    Ok(())
}

/// What a kernel does not know does not keep a machine from running.
fn note(backend: &BackendSpec, option: &str, done: io::Result<()>) {
    if let Err(error) = done {
        tracing::debug!(backend = backend.id(), "{option} has no effect: {error}");
    }
}
