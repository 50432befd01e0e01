#![forbid(unsafe_code)]
//! The machine's memory: the files of its backends, open and locked from the start, and the memory
//! made of them, as often as a machine is made.

use std::fs::File;

use pando_pager::{Pager, PagerOptions, Serving};
use rustix::fs::{FallocateFlags, fallocate};

use crate::memory::guest::{GuestRam, RamBacking};
use crate::memory::open::OpenedFile;
use crate::memory::provide::{Begin, HeldFiles};
use crate::qemu::error::OptionError;
use crate::qemu::link::reason;
use crate::report::one_line;
use crate::spec::{FileAccess, MachineSpec};
use crate::sys::lock::{LockKind, Locked, lock_range};

/// Memory of one machine, and the pager that fills it.
#[derive(Debug)]
pub struct Made {
    /// The memory.
    pub(super) ram: GuestRam,
    /// Its pager, where a file is served.
    pub(super) pager: Option<Pager<Serving>>,
}

/// The backends with their files.
#[derive(Debug)]
pub(super) struct Memory {
    spec: MachineSpec,
    files: HeldFiles,
}

impl Memory {
    /// Opens the files of all backends; those of templates are made.
    pub(super) fn open(spec: &MachineSpec) -> Result<Self, OptionError> {
        Ok(Self {
            spec: spec.clone(),
            files: HeldFiles::open(spec).map_err(|error| refused(&error))?,
        })
    }

    /// The file of a backend; `None` where it has none, or one without a name.
    pub(super) fn file(&self, backend: usize) -> Option<&File> {
        self.files.named(backend)
    }

    /// Files of templates are written by this machine alone (`Exclusive`), or may be read by clones
    /// (`Shared`).
    pub(super) fn lock(&self, kind: LockKind) -> Result<(), OptionError> {
        for (position, backend) in self.spec.backends().iter().enumerate() {
            let template = backend
                .file()
                .filter(|source| source.access() == FileAccess::Template);
            let Some((source, file)) = template.zip(self.file(position)) else {
                continue;
            };
            let locked = lock_range(file, kind, source.offset_bytes(), backend.bytes());
            if matches!(locked, Ok(Locked::Busy)) {
                return Err(OptionError::new(format!(
                    "memory backend {}: clones run on {}, which this machine would write: end them first",
                    backend.id(),
                    source.path().display()
                )));
            }
        }
        Ok(())
    }

    /// Takes disk for all of a backend's file now.
    pub(super) fn preallocate(&self, backend: usize) -> Result<(), OptionError> {
        let spec = &self.spec.backends()[backend];
        let template = spec
            .file()
            .filter(|source| source.access() == FileAccess::Template);
        let Some((source, file)) = template.zip(self.file(backend)) else {
            return Ok(());
        };
        fallocate(
            file,
            FallocateFlags::KEEP_SIZE,
            source.offset_bytes(),
            spec.bytes(),
        )
        .map_err(|errno| {
            OptionError::new(format!(
                "qemu_prealloc_mem: preallocating memory failed: {}",
                reason(&errno.into())
            ))
        })
    }

    /// The machine is to have one backend more.
    pub(super) fn insert(&mut self, spec: &MachineSpec, position: usize, file: Option<OpenedFile>) {
        if let Some(backend) = spec.backends().get(position) {
            self.files.insert(position, backend, file);
        }
        self.spec = spec.clone();
    }

    /// The machine is to have one backend less, whose file this is.
    pub(super) fn remove(&mut self, spec: &MachineSpec, position: usize) -> Option<OpenedFile> {
        self.spec = spec.clone();
        self.files.remove(position)
    }

    /// Memory of a backend that comes while the machine is there, and its pager, where its file is served.
    pub(super) fn make_one(
        &self,
        position: usize,
    ) -> Result<(RamBacking, Option<Pager<Serving>>), OptionError> {
        let backend = self.spec.backends().get(position);
        let backend = backend.ok_or_else(|| OptionError::new("there is no such memory backend"))?;
        let begin = match self.spec.is_growing(position) {
            true => Begin::Zero,
            false => Begin::Files,
        };
        let made = self.files.make_one(position, backend, begin);
        made.map_err(|error| refused(&error))
    }

    /// Makes memory.
    pub(super) fn make(&self, begin: Begin<'_>) -> Result<Made, OptionError> {
        let (ram, pager) = self
            .files
            .make(&self.spec, begin, PagerOptions::default())
            .map_err(|error| refused(&error))?;
        Ok(Made { ram, pager })
    }
}

/// An error whose further lines are advice.
fn refused(error: &(dyn std::error::Error + 'static)) -> OptionError {
    let text = one_line(error);
    let mut lines = text.lines();
    let first = OptionError::new(lines.next().unwrap_or_default());
    lines.fold(first, OptionError::hint)
}
