#![forbid(unsafe_code)]
//! Making a template: boot with RAM in files, wait until the guest is ready, freeze, seal.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pando_pager::PAGE_BYTES;
use pando_pager::image::{BackendIndex, Index, PageKind};
use rustix::fs::FallocateFlags;
use thiserror::Error;

use super::device_entry::{DeviceEntry, DiskEntry};
use super::error::TemplateError;
use super::identity_entry::IdentityEntry;
use super::load::{Template, scan_ram};
use super::machine_entry::MachineEntry;
use super::manifest::{BackendEntry, FileEntry, HostEntry, Manifest, ManifestFile, format_of};
use super::seal::Seal;
use super::staging::Staging;
use super::{INDEX_FILE, MANIFEST_FILE, STATE_FILE, digest, disk, state_file};
use crate::arch::x86_64::boot::BootSource;
use crate::console::{ConsoleError, GuestConsole};
use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::block::backend::{Disk, DiskError};
use crate::machine::state::MachineState;
use crate::machine::{
    Connections, Machine, MachineError, Marks, Paused, Role, Running, open_consoles, open_taps,
    open_vsock, scratch_folder,
};
use crate::memory::guest::{GuestMemoryError, GuestRam, RamBacking};
use crate::report::exit;
use crate::sandbox::sigbus;
use crate::spec::{DeviceSpec, DiskAccess, MachineSpec};

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
    /// Memory that grows and shrinks.
    #[error(
        "device {id:?} is memory that grows and shrinks, which a template's files cannot have: plug it into the \
         clones, or make the template with `pando qemu`"
    )]
    Growing {
        /// The device.
        id: String,
    },
    /// A backend that has a file of its own.
    #[error(
        "memory backend {id:?} has a file of its own: a template keeps all memory in its own directory; \
         leave kind and path out,or run the machine with `pando run`"
    )]
    OwnFile {
        /// The backend.
        id: String,
    },
    /// The image of a disk.
    #[error("cannot give the template VM its disk {id:?}")]
    Disk {
        /// The disk.
        id: String,
        /// Why not.
        #[source]
        source: DiskError,
    },
    /// Its guest was told of writes that failed.
    #[error(
        "{failed} writes of the template VM to its disk {id:?} failed, and its guest knows: a template of it is of \
         no use; is the file system of the template full? the log says what failed"
    )]
    LostWrites {
        /// The disk.
        id: String,
        /// How many.
        failed: u64,
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
    /// Images of disks, by the ids of their devices.
    disks: Vec<(String, File)>,
    /// The same as its devices have them.
    written: Vec<(String, Disk)>,
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
        let mut devices = spec.devices().iter();
        if let Some(device) = devices.find(|device| device.memory().is_some()) {
            let id = device.id().to_owned();
            return Err(BuildError::Growing { id });
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
        let disks = copy_disks(spec, &staging)?;
        let written = connect_disks(spec, &disks)?;
        let connections = Connections {
            serial: SerialTarget::Fd(serial),
            disks: written.clone(),
            vsock: open_vsock(spec)?,
            nets: open_taps(spec)?,
            consoles: open_consoles(spec)?,
            plugged: Vec::new(),
            generation_id: None,
            marks: Marks::of(spec, Role::Template),
        };
        let machine = Machine::boot(spec, guest_ram, boot, connections)?.resume()?;
        Ok(Self {
            staging,
            spec: spec.clone(),
            ram,
            disks,
            written,
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
        // What its guest has taken out is not there any more.
        let present = paused.handle().devices()?;
        let gone = self.spec.devices().iter();
        let gone = gone.filter(|device| present.iter().all(|id| id != device.id()));
        let spec = gone.fold(self.spec.clone(), |spec, gone| {
            spec.without_device(gone.id())
        });
        let state = paused.save()?;
        // The mapping goes before the files are read: nothing can write them from here on.
        drop(paused);
        for (id, disk) in self.written {
            let failed = disk.failed_writes();
            if failed > 0 {
                return Err(BuildError::LostWrites { id, failed });
            }
        }
        let files = Files {
            ram: &self.ram,
            disks: &self.disks,
        };
        write_template(self.staging, &spec, &files, &state, progress)
    }
}

/// Copies the image of every disk: the template VM writes its own.
fn copy_disks(spec: &MachineSpec, staging: &Staging) -> Result<Vec<(String, File)>, BuildError> {
    let mut copies = Vec::new();
    for device in spec.devices() {
        let Some(parts) = device.disk() else {
            continue;
        };
        let id = device.id().to_owned();
        let wrong = |source| BuildError::Disk {
            id: id.clone(),
            source,
        };
        // Held while it is copied: nobody writes it meanwhile.
        let path = &parts.path;
        let image = Disk::open(path, DiskAccess::Read, &scratch_folder()).map_err(wrong)?;
        let copy = staging.file()?;
        disk::copy(path, image.bytes(), &copy)?;
        copies.push((id, copy));
    }
    Ok(copies)
}

/// The copies as disks.
fn connect_disks(
    spec: &MachineSpec,
    copies: &[(String, File)],
) -> Result<Vec<(String, Disk)>, BuildError> {
    let parts = spec.devices().iter().filter_map(DeviceSpec::disk);
    let disks = parts.zip(copies).map(|(parts, (id, copy))| {
        let path = &parts.path;
        let file = copy
            .try_clone()
            .map_err(TemplateError::io("open again", path))?;
        let access = match parts.access {
            DiskAccess::Read => DiskAccess::Read,
            DiskAccess::Write | DiskAccess::Snapshot => DiskAccess::Write,
        };
        let disk = Disk::from_file(file, path, access, &scratch_folder());
        let disk = disk.map_err(|source| BuildError::Disk {
            id: id.clone(),
            source,
        })?;
        Ok((id.clone(), disk))
    });
    disks.collect()
}

/// What the machine has written.
struct Files<'a> {
    ram: &'a [File],
    disks: &'a [(String, File)],
}

/// The entries of all devices; disks are read for their digests.
fn device_entries(
    spec: &MachineSpec,
    out: &Path,
    disks: &[(String, File)],
) -> Result<Vec<DeviceEntry>, TemplateError> {
    let entries = spec.devices().iter().map(|device| {
        let copy = disks.iter().find(|(id, _)| id == device.id());
        let Some((parts, (id, copy))) = device.disk().zip(copy) else {
            return Ok(DeviceEntry::of(device, None));
        };
        let name = disk_name(id);
        let path = out.join(&name);
        let seal = Seal::of(copy, &path)?;
        let disk = DiskEntry {
            file: name,
            bytes: seal.bytes,
            readonly: parts.access == DiskAccess::Read,
            serial: parts.serial.clone(),
            digest: disk::digest(copy, &path, seal.bytes)?,
            seal,
        };
        Ok(DeviceEntry::of(device, Some(disk)))
    });
    entries.collect()
}

/// The file of a disk.
fn disk_name(id: &str) -> String {
    format!("{id}.disk")
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
    written: &Files<'_>,
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
    for (position, (backend, file)) in spec.backends().iter().zip(written.ram).enumerate() {
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
    let devices = device_entries(spec, &out, written.disks)?;
    let manifest = Manifest::seal(
        &out.join(MANIFEST_FILE),
        ManifestFile {
            format: format_of(spec, &machine, &identity),
            tool: concat!("pando ", env!("CARGO_PKG_VERSION")).to_owned(),
            created_unix_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |t| t.as_secs()),
            cpus: spec.cpus().get(),
            machine,
            identity,
            pci: spec.has_pci() && devices.is_empty(),
            devices,
            generation_id: spec.has_generation_id(),
            backends,
            state: entry(STATE_FILE, &state_handle, &state_bytes)?,
            index: entry(INDEX_FILE, &index, &index_bytes)?,
            host: host_entry(state),
            checksum: String::new(),
        },
    )?;
    let manifest = staging.file_with(&manifest.to_json())?;
    let has = |id: &str| spec.devices().iter().any(|device| device.id() == id);
    let disks = written.disks.iter().filter(|(id, _)| has(id));
    let disks: Vec<_> = disks.map(|(id, file)| (disk_name(id), file)).collect();
    let mut files: Vec<(&str, &File)> = names.iter().map(String::as_str).zip(written.ram).collect();
    files.extend(disks.iter().map(|(name, file)| (name.as_str(), *file)));
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
