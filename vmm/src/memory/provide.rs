#![forbid(unsafe_code)]
//! All memory of a machine that is described by its backends: each opened, mapped or served.
//!
//! A file that is not to be written is served by a pager in this process, from a descriptor that is
//! open for reading only. It has no index: what the file system has for it is data, the rest zero.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use pando_pager::image::{BackendIndex, Image, ImageError};
use pando_pager::{Idle, Pager, PagerError, PagerOptions, Serving};
use rustix::fs::{FallocateFlags, MemfdFlags};
use thiserror::Error;

use super::discard::DiscardGate;
use super::guest::{GuestMemoryError, GuestRam, MemoryAdvice, RamBacking};
use super::open::{OpenError, OpenedFile, open};
use crate::spec::{BackendSource, BackendSpec, FileAccess, FileSource, MachineSpec};

/// How much of a file is written as zero at once, where it cannot be made a hole.
const CLEAR_BYTES: usize = 64 << 10;

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
    /// A file that cannot be made zero.
    #[error("cannot clear the file of memory backend {id}")]
    Clear {
        /// The backend.
        id: String,
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

/// What the memory of a machine begins as.
#[derive(Debug, Clone, Copy)]
pub enum Begin<'a> {
    /// What the files hold, whatever that is.
    Files,
    /// What the files of backends with an index hold, proven by it as it is read. The others begin as
    /// zero.
    Proven(&'a [Option<BackendIndex>]),
    /// Zero. What was in the file of a template is gone.
    Zero,
}

/// The files of a machine: their descriptors hold their locks, and what was to be dropped from them at
/// the end is dropped with this.
#[derive(Debug, Default)]
pub struct HeldFiles {
    /// One place for each backend, in the machine's order.
    files: Vec<Option<Held>>,
}

#[derive(Debug)]
struct Held {
    opened: OpenedFile,
    /// Bytes to drop at the end: offset and length.
    discard: Option<(u64, u64)>,
    /// Its name, where it was made for this machine.
    made: Option<PathBuf>,
}

impl HeldFiles {
    /// Opens the files of all backends. What was made for a machine that then cannot be is removed.
    pub fn open(spec: &MachineSpec) -> Result<Self, OpenError> {
        let mut held = Self::default();
        for backend in spec.backends() {
            match backend.file().map(|source| hold(backend, source)) {
                None => held.files.push(None),
                Some(Ok(file)) => held.files.push(Some(file)),
                Some(Err(error)) => {
                    held.undo();
                    return Err(error);
                }
            }
        }
        Ok(held)
    }

    /// The file of a backend; `None` where it has none, or one without a name.
    pub fn named(&self, backend: usize) -> Option<&File> {
        let held = self.files.get(backend)?.as_ref()?;
        (!held.opened.is_nameless).then_some(&held.opened.file)
    }

    /// Takes in the file of a backend that comes; those from `position` on are counted one higher.
    pub fn insert(&mut self, position: usize, backend: &BackendSpec, file: Option<OpenedFile>) {
        let drops = backend
            .file()
            .is_some_and(|source| source.discard_data() && source.access() == FileAccess::Template);
        let range = (backend.file()).map(|source| (source.offset_bytes(), backend.bytes()));
        let held = file.map(|opened| Held {
            discard: range.filter(|_| drops),
            made: None,
            opened,
        });
        self.files.insert(position.min(self.files.len()), held);
    }

    /// Gives the file of a backend that goes; those behind it are counted one lower.
    pub fn remove(&mut self, position: usize) -> Option<OpenedFile> {
        if position >= self.files.len() {
            return None;
        }
        self.files.remove(position).map(|held| held.opened)
    }

    /// Memory of one backend that comes while its machine is there; with a pager of its own where a file is
    /// served. That must be there as long as anything may touch the memory.
    pub fn make_one(
        &self,
        position: usize,
        backend: &BackendSpec,
        begin: Begin<'_>,
    ) -> Result<(RamBacking, Option<Pager<Serving>>), ProvideError> {
        let mut making = Making {
            files: self,
            begin,
            options: PagerOptions::default(),
            pager: None,
        };
        let mut backing = making.backing(position, backend)?;
        let pager = making.serve(
            backend.discards_to_zero(),
            std::slice::from_mut(&mut backing),
        )?;
        advise(backend, &backing)?;
        Ok((backing, pager))
    }

    /// Maps or serves the memory of every backend: as often as a machine is made, but only when the one
    /// before has ended. Nothing runs yet, and no page of a served file is read but where `prealloc`
    /// asks for it.
    pub fn make(
        &self,
        spec: &MachineSpec,
        begin: Begin<'_>,
        options: PagerOptions,
    ) -> Result<(GuestRam, Option<Pager<Serving>>), ProvideError> {
        let mut making = Making {
            files: self,
            begin,
            options,
            pager: None,
        };
        let mut backings = (0..)
            .zip(spec.backends())
            .map(|(position, backend)| {
                making.begin = match begin {
                    // Nothing is plugged at first, whatever a file holds.
                    Begin::Files if spec.is_growing(position) => Begin::Zero,
                    other => other,
                };
                making.backing(position, backend)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let discards = spec.backends().iter().any(BackendSpec::discards_to_zero);
        let pager = making.serve(discards, &mut backings)?;
        for (backend, backing) in spec.backends().iter().zip(&backings) {
            advise(backend, backing)?;
        }
        let ram = GuestRam::new(spec.layout(), backings)?;
        Ok((ram.with_gate(DiscardGate::of(spec)), pager))
    }

    /// Removes what was made for a machine that then could not be.
    fn undo(&self) {
        let made = self.files.iter().flatten();
        for path in made.filter_map(|held| held.made.as_ref()) {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), "a new and empty file stays: {error}");
            }
        }
    }
}

impl Drop for HeldFiles {
    fn drop(&mut self) {
        for held in self.files.iter().flatten() {
            let Some((offset_bytes, bytes)) = held.discard else {
                continue;
            };
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let file = &held.opened.file;
            if let Err(error) = rustix::fs::fallocate(file, flags, offset_bytes, bytes) {
                tracing::warn!("the content of a backend with discard-data=on stays: {error}");
            }
        }
    }
}

fn hold(backend: &BackendSpec, source: &FileSource) -> Result<Held, OpenError> {
    let opened = open(backend, source)?;
    let drops = source.discard_data() && source.access() == FileAccess::Template;
    Ok(Held {
        discard: drops.then_some((source.offset_bytes(), backend.bytes())),
        made: opened.is_new.then(|| source.path().to_owned()),
        opened,
    })
}

/// Opens and maps every backend of `spec`. Nothing runs yet, and no page of a served file is read but
/// where `prealloc` asks for it.
pub fn provide(spec: &MachineSpec, options: PagerOptions) -> Result<MachineMemory, ProvideError> {
    let files = HeldFiles::open(spec)?;
    match files.make(spec, Begin::Files, options) {
        Ok((ram, pager)) => Ok(MachineMemory { ram, pager, files }),
        Err(error) => {
            files.undo();
            Err(error)
        }
    }
}

struct Making<'a> {
    files: &'a HeldFiles,
    begin: Begin<'a>,
    options: PagerOptions,
    pager: Option<Pager<Idle>>,
}

impl Making<'_> {
    /// Starts the pager, where one is needed for these.
    fn serve(
        &mut self,
        discards: bool,
        backings: &mut [RamBacking],
    ) -> Result<Option<Pager<Serving>>, PagerError> {
        if discards && let Some(pager) = &mut self.pager {
            // Whose may be is the gate's to say.
            let served = backings.iter_mut().filter_map(RamBacking::served);
            pager.allow_discards(served)?;
        }
        self.pager.take().map(Pager::<Idle>::serve).transpose()
    }

    fn backing(
        &mut self,
        position: usize,
        backend: &BackendSpec,
    ) -> Result<RamBacking, ProvideError> {
        let bytes = backend.bytes();
        let held = self.files.files.get(position).and_then(Option::as_ref);
        match (backend.source(), held) {
            (BackendSource::File(source), Some(held)) => {
                self.file_backing(position, backend, source, &held.opened)
            }
            (BackendSource::Memfd { share: true }, _) => {
                let file = memfd(backend).map_err(|source| ProvideError::Memfd {
                    id: backend.id().to_owned(),
                    bytes,
                    source,
                })?;
                Ok(RamBacking::shared(&file, bytes)?)
            }
            _ => Ok(RamBacking::anonymous(bytes)?),
        }
    }

    fn file_backing(
        &mut self,
        position: usize,
        backend: &BackendSpec,
        source: &FileSource,
        opened: &OpenedFile,
    ) -> Result<RamBacking, ProvideError> {
        let (bytes, offset_bytes) = (backend.bytes(), source.offset_bytes());
        let file = &opened.file;
        let proof = match self.begin {
            Begin::Proven(indexes) => indexes.get(position).and_then(Option::as_ref),
            Begin::Files | Begin::Zero => None,
        };
        let as_file = matches!(self.begin, Begin::Files) || proof.is_some();
        match source.access() {
            FileAccess::Private | FileAccess::Clone if as_file && !opened.is_nameless => {
                self.served(backend, source, file, proof)
            }
            // What the file holds is of no interest, or there is nothing in it.
            FileAccess::Private | FileAccess::Clone => Ok(RamBacking::anonymous(bytes)?),
            FileAccess::Template => {
                if !as_file {
                    clear(file, offset_bytes, bytes).map_err(|source| ProvideError::Clear {
                        id: backend.id().to_owned(),
                        source,
                    })?;
                }
                Ok(RamBacking::shared_from(file, offset_bytes, bytes)?)
            }
            FileAccess::Rom { .. } => Ok(RamBacking::rom(file, offset_bytes, bytes)?),
        }
    }

    /// Memory that the pager fills from `file`, which is open for reading only.
    fn served(
        &mut self,
        backend: &BackendSpec,
        source: &FileSource,
        file: &File,
        proof: Option<&BackendIndex>,
    ) -> Result<RamBacking, ProvideError> {
        let refused = |source| ProvideError::Image {
            id: backend.id().to_owned(),
            source,
        };
        let offset_bytes = source.offset_bytes();
        let index = match proof {
            Some(index) => index.clone(),
            None => BackendIndex::unsummed(file, offset_bytes, backend.bytes()).map_err(refused)?,
        };
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

/// Makes a part of a file all zero.
fn clear(file: &File, offset_bytes: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if rustix::fs::fallocate(file, flags, offset_bytes, bytes).is_ok() {
        return Ok(());
    }
    let zeros = [0; CLEAR_BYTES];
    let end = offset_bytes + bytes;
    let mut at = offset_bytes;
    while at < end {
        let length = usize::try_from(end - at).map_or(CLEAR_BYTES, |left| left.min(CLEAR_BYTES));
        file.write_all_at(&zeros[..length], at)?;
        at += length as u64;
    }
    Ok(())
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
