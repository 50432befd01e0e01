#![forbid(unsafe_code)]
//! The machine's memory: the files of its backends, open from the start, and the memory made of
//! them, as often as a machine is made.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pando_pager::image::{BackendIndex, Image};
use pando_pager::{Pager, PagerOptions, Serving};
use rustix::fs::{FallocateFlags, fallocate};

use crate::memory::guest::{GuestRam, RamBacking};
use crate::memory::layout::PAGE_BYTES;
use crate::qemu::error::OptionError;
use crate::qemu::link::reason;
use crate::report::one_line;
use crate::spec::{BackendSource, BackendSpec, FileAccess, MachineSpec};

/// What a machine's memory begins as.
#[derive(Debug)]
pub(super) enum Begin<'a> {
    /// What the files hold, whatever that is.
    Files,
    /// What the files hold, proven by an index for each backend; those without one begin as zero.
    Saved(&'a [Option<BackendIndex>]),
    /// Zero.
    Zero,
}

/// Memory of one machine, and the pager that fills it.
#[derive(Debug)]
pub(super) struct Made {
    /// The memory.
    pub(super) ram: GuestRam,
    /// Its pager, where a file is served.
    pub(super) pager: Option<Pager<Serving>>,
}

/// The backends with their files.
#[derive(Debug)]
pub(super) struct Memory {
    spec: MachineSpec,
    files: Vec<Option<File>>,
}

impl Memory {
    /// Opens the files of all backends; those of templates are made.
    pub(super) fn open(spec: &MachineSpec) -> Result<Self, OptionError> {
        Ok(Self {
            spec: spec.clone(),
            files: spec.backends().iter().map(open).collect::<Result<_, _>>()?,
        })
    }

    /// The file of a backend.
    pub(super) fn file(&self, backend: usize) -> Option<&File> {
        self.files.get(backend)?.as_ref()
    }

    /// Takes disk for all of a backend's file now.
    pub(super) fn preallocate(&self, backend: usize) -> Result<(), OptionError> {
        let Some(file) = self.file(backend) else {
            return Ok(());
        };
        let bytes = self.spec.backends()[backend].bytes();
        fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes)
            .map_err(|errno| failed(&std::io::Error::from(errno)))
    }

    /// Makes memory.
    pub(super) fn make(&self, begin: &Begin<'_>) -> Result<Made, OptionError> {
        let mut pager = None;
        let mut backings = Vec::new();
        for (position, backend) in self.spec.backends().iter().enumerate() {
            let proven = match begin {
                Begin::Saved(indexes) => indexes.get(position).and_then(Option::as_ref),
                Begin::Files | Begin::Zero => None,
            };
            let as_file = matches!(begin, Begin::Files) || proven.is_some();
            let backing = match (backend.file(), self.file(position)) {
                (Some(source), Some(file)) if source.access() == FileAccess::Template => {
                    if !as_file {
                        clear(file, backend.bytes())?;
                    }
                    RamBacking::shared(file, backend.bytes()).map_err(|e| failed(&e))?
                }
                (Some(source), Some(file)) if as_file => {
                    let image = image(backend, source.path(), file, proven)?;
                    let pager = match &mut pager {
                        Some(pager) => pager,
                        None => pager.insert(
                            Pager::new(PagerOptions {
                                template: backend.id().to_owned(),
                                ..PagerOptions::default()
                            })
                            .map_err(|e| failed(&e))?,
                        ),
                    };
                    RamBacking::Paged(pager.attach(image).map_err(|e| failed(&e))?)
                }
                _ => RamBacking::anonymous(backend.bytes()).map_err(|e| failed(&e))?,
            };
            backings.push(backing);
        }
        let ram = GuestRam::new(self.spec.layout(), backings).map_err(|e| failed(&e))?;
        let pager = pager
            .map(Pager::serve)
            .transpose()
            .map_err(|e| failed(&e))?;
        Ok(Made { ram, pager })
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> OptionError {
    OptionError::new(format!(
        "unable to map backing store for guest RAM: {}",
        one_line(error)
    ))
}

fn open(backend: &BackendSpec) -> Result<Option<File>, OptionError> {
    let BackendSource::File(source) = backend.source() else {
        return Ok(None);
    };
    let path = source.path();
    let cannot = |error: &std::io::Error| {
        OptionError::new(format!(
            "can't open backing store {} for guest RAM: {}",
            path.display(),
            reason(error)
        ))
    };
    let write = source.access() == FileAccess::Template;
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .create(write)
        .truncate(false)
        .mode(0o644)
        .open(path)
        .map_err(|error| cannot(&error))?;
    let length = file.metadata().map_err(|error| cannot(&error))?.len();
    if length == 0 && write {
        file.set_len(backend.bytes())
            .map_err(|error| cannot(&error))?;
    } else if length < backend.bytes() {
        return Err(OptionError::new(format!(
            "{} backing store size {length:#x} is too small for 'size' option {:#x} plus 'offset' option 0x0",
            backend.id(),
            backend.bytes()
        )));
    }
    Ok(Some(file))
}

fn image(
    backend: &BackendSpec,
    path: &Path,
    file: &File,
    proven: Option<&BackendIndex>,
) -> Result<Image, OptionError> {
    let index = match proven {
        Some(index) => index.clone(),
        None => {
            BackendIndex::scan(file, backend.bytes(), &mut |_, _| ()).map_err(|e| failed(&e))?
        }
    };
    let file = file.try_clone().map_err(|e| failed(&e))?;
    Image::from_file(file, path, backend.id(), index).map_err(|e| failed(&e))
}

/// Makes a template's file all zero.
fn clear(file: &File, bytes: u64) -> Result<(), OptionError> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if fallocate(file, flags, 0, bytes).is_ok() {
        return Ok(());
    }
    let zeros = [0; 64 << 10];
    let mut at = 0;
    while at < bytes {
        let length = usize::try_from((bytes - at).min(zeros.len() as u64)).unwrap_or(0);
        std::os::unix::fs::FileExt::write_all_at(file, &zeros[..length], at)
            .map_err(|e| failed(&e))?;
        at += length as u64;
    }
    Ok(())
}

const _: () = assert!(PAGE_BYTES == 4096);
