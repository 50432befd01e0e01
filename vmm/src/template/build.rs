#![forbid(unsafe_code)]
//! Making a template: boot with RAM in files, wait until the guest is ready, freeze, seal.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pando_pager::PAGE_BYTES;
use pando_pager::image::{BackendIndex, Index, PageKind};
use rustix::fs::FallocateFlags;
use thiserror::Error;

use super::error::TemplateError;
use super::identity_entry::IdentityEntry;
use super::load::{Template, scan_ram};
use super::machine_entry::MachineEntry;
use super::manifest::{BackendEntry, FileEntry, HostEntry, Manifest, ManifestFile, format_of};
use super::seal::Seal;
use super::staging::Staging;
use super::{INDEX_FILE, MANIFEST_FILE, STATE_FILE, digest, state_file};
use crate::arch::x86_64::boot::BootSource;
use crate::console::{ConsoleError, GuestConsole};
use crate::device::legacy::console::SerialTarget;
use crate::machine::state::MachineState;
use crate::machine::{Machine, MachineError, Paused, Running};
use crate::memory::guest::{GuestMemoryError, GuestRam, RamBacking};
use crate::report::exit;
use crate::sandbox::sigbus;
use crate::spec::MachineSpec;

/// Why a template could not be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The files.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The guest's RAM.
    #[error("cannot give the template VM its memory")]
    Memory(#[from] GuestMemoryError),
    /// The machine.
    #[error("the template VM failed")]
    Machine(#[from] MachineError),
    /// A backend that has a file of its own.
    #[error(
        "memory backend {id:?} has a file of its own: a template keeps all memory in its own directory; \
         leave kind and path out,or run the machine with `pando run`"
    )]
    OwnFile {
        /// The backend.
        id: String,
    },
    /// The guest's console.
    #[error("the template VM did not become ready")]
    NotReady(#[from] ConsoleError),
}

/// What must hold before the template VM is frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// COM1 has shown this text.
    Serial(String),
    /// This much time has passed.
    After(Duration),
}

/// A template VM that runs, with its RAM in files that have no name yet.
#[derive(Debug)]
pub struct TemplateVm {
    staging: Staging,
    spec: MachineSpec,
    ram: Vec<File>,
    machine: Machine<Running>,
    /// Its COM1.
    pub console: GuestConsole,
}

impl TemplateVm {
    /// Boots the machine. `reserve` takes disk for all its RAM now.
    pub fn boot(
        out: &Path,
        spec: &MachineSpec,
        boot: &BootSource,
        reserve: bool,
    ) -> Result<Self, BuildError> {
        if let Some(backend) = spec.backends().iter().find(|b| b.file().is_some()) {
            let id = backend.id().to_owned();
            return Err(BuildError::OwnFile { id });
        }
        let staging = Staging::new(out)?;
        if !reserve {
            sigbus::explain(&disk_full(out), exit::FAILED.into());
        }
        let mut ram = Vec::new();
        let mut backings = Vec::new();
        for backend in spec.backends() {
            let file = staging.file()?;
            staging.set_bytes(&file, backend.bytes())?;
            if reserve {
                staging.reserve(&file, backend.bytes())?;
            }
            backings.push(RamBacking::shared(&file, backend.bytes())?);
            ram.push(file);
        }
        let guest_ram = GuestRam::new(spec.layout(), backings)?;
        let (console, serial) = GuestConsole::pair()?;
        let machine = Machine::boot(spec, guest_ram, boot, SerialTarget::Fd(serial))?.resume()?;
        Ok(Self {
            staging,
            spec: spec.clone(),
            ram,
            machine,
            console,
        })
    }

    /// Waits until the guest is ready; `on_line` sees what it prints.
    pub fn wait_ready(
        &mut self,
        ready: &Ready,
        timeout: Duration,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<(), BuildError> {
        match ready {
            Ready::Serial(text) => Ok(self.console.wait_for(text, timeout, on_line)?),
            Ready::After(delay) => Ok(self.console.drain_for(*delay, on_line)?),
        }
    }

    /// Stops the machine, saves what is not RAM, seals the files and gives them their names.
    /// `progress` gets the backend and the offset reached in its RAM file.
    pub fn freeze(self, progress: &mut dyn FnMut(usize, u64)) -> Result<Template, BuildError> {
        let paused: Machine<Paused> = self.machine.pause()?;
        let state = paused.save()?;
        // The mapping goes before the files are read: nothing can write them from here on.
        drop(paused);
        write_template(self.staging, &self.spec, &self.ram, &state, progress)
    }
}

/// What SIGBUS means while RAM is in files without reserved disk.
fn disk_full(out: &Path) -> String {
    format!(
        "the disk of {} is full, the template VM cannot write its RAM: free some, choose another \
         disk, or leave --no-reserve out to know beforehand",
        out.display()
    )
}

fn write_template(
    staging: Staging,
    spec: &MachineSpec,
    ram: &[File],
    state: &MachineState,
    progress: &mut dyn FnMut(usize, u64),
) -> Result<Template, BuildError> {
    let out: PathBuf = staging.out().to_owned();
    let names: Vec<String> = spec
        .backends()
        .iter()
        .map(|b| format!("{}.mem", b.id()))
        .collect();
    let mut indexes = Vec::new();
    let mut backends = Vec::new();
    for (position, (backend, file)) in spec.backends().iter().zip(ram).enumerate() {
        let path = out.join(&names[position]);
        let on_offset = &mut |offset| progress(position, offset);
        let (found, _) = scan_ram(file, &path, backend.bytes(), on_offset)?;
        punch_zeros(file, &path, &found)?;
        let (index, digest) = scan_ram(file, &path, backend.bytes(), on_offset)?;
        backends.push(BackendEntry {
            id: backend.id().to_owned(),
            file: names[position].clone(),
            bytes: backend.bytes(),
            guest_address: guest_address(spec, position),
            digest,
            seal: Seal::of(file, &path)?,
        });
        indexes.push((backend.id().to_owned(), index));
    }
    let index_bytes = Index::new(indexes).encode();
    let index = staging.file_with(&index_bytes)?;
    let state_bytes = state_file::encode(&out.join(STATE_FILE), state)?;
    let state_handle = staging.file_with(&state_bytes)?;
    let entry = |name: &str, file: &File, bytes: &[u8]| -> Result<FileEntry, TemplateError> {
        Ok(FileEntry {
            file: name.to_owned(),
            digest: digest::of_bytes(bytes),
            seal: Seal::of(file, &out.join(name))?,
        })
    };
    let (machine, identity) = (MachineEntry::of(spec), IdentityEntry::of(spec));
    let manifest = Manifest::seal(
        &out.join(MANIFEST_FILE),
        ManifestFile {
            format: format_of(&machine, &identity),
            tool: concat!("pando ", env!("CARGO_PKG_VERSION")).to_owned(),
            created_unix_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |t| t.as_secs()),
            cpus: spec.cpus().get(),
            machine,
            identity,
            backends,
            state: entry(STATE_FILE, &state_handle, &state_bytes)?,
            index: entry(INDEX_FILE, &index, &index_bytes)?,
            host: host_entry(state),
            checksum: String::new(),
        },
    )?;
    let manifest = staging.file_with(&manifest.to_json())?;
    let mut files: Vec<(&str, &File)> = names.iter().map(String::as_str).zip(ram).collect();
    files.extend([
        (STATE_FILE, &state_handle),
        (INDEX_FILE, &index),
        (MANIFEST_FILE, &manifest),
    ]);
    staging.commit(&files)?;
    Ok(Template::open(&out)?)
}

fn host_entry(state: &MachineState) -> HostEntry {
    HostEntry {
        cpuid: state
            .cpuid()
            .iter()
            .map(|e| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx])
            .collect(),
        msrs: state.msr_numbers(),
        tsc_khz: state.tsc_khz,
    }
}

fn guest_address(spec: &MachineSpec, backend: usize) -> u64 {
    spec.layout()
        .segments()
        .iter()
        .find(|segment| segment.backend == backend)
        .map_or(0, |segment| segment.guest_address)
}

/// Gives the disk back what the guest never wrote, or wrote as zero. Where the file system cannot,
/// the file stays as large as it is.
fn punch_zeros(file: &File, path: &Path, index: &BackendIndex) -> Result<(), TemplateError> {
    for (pages, kind) in index.runs() {
        if kind == PageKind::Data {
            continue;
        }
        let punched = rustix::fs::fallocate(
            file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            pages.start().get() * PAGE_BYTES,
            pages.count().get() * PAGE_BYTES,
        );
        match punched {
            Ok(()) => (),
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
            Err(errno) => return Err(TemplateError::errno("make sparse", path)(errno)),
        }
    }
    Ok(())
}
