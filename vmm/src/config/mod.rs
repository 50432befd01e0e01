#![forbid(unsafe_code)]
//! From what was typed to a machine that cannot be wrong: the only place where a machine's
//! parameters are checked against the host.

pub mod file;

use std::path::{Path, PathBuf};

use thiserror::Error;

use self::file::DeviceTable;
use self::file::{BackendTable, Bytes, DiscardWord, KindWord, MachineFile, RomWord};
use crate::arch::x86_64::boot::{BootSource, KernelImage};
use crate::memory::open::{OpenError, fault_of_read_only};
use crate::observe::memory::total_bytes;
use crate::payload;
use crate::spec::{
    BackendKind, BackendOptions, BackendSpec, CpuCount, DeviceFault, DeviceParts, DimmParts,
    DistanceParts, MachineParts, MachineSpec, MemoryParts, NodeParts, OnOffAuto, SpecError,
};

/// The kernel name that means the built-in guest.
pub const EMBEDDED_KERNEL: &str = "embedded";
/// Name of the memory backend of a machine that names none.
pub const BACKEND_ID: &str = "ram0";
/// Kernel command line of a machine that has none.
pub const DEFAULT_APPEND: &str = "console=ttyS0 panic=-1";
/// RAM of a machine that says nothing of it, in bytes.
pub const DEFAULT_RAM_BYTES: u64 = 512 << 20;

/// A machine as it was asked for, unchecked: one backend, no nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineRequest {
    /// A file, or [`EMBEDDED_KERNEL`].
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
}

/// Why a machine cannot be as it was asked for.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// No machine can be like that.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The file of read-only memory.
    #[error(transparent)]
    File(#[from] OpenError),
    /// Nothing to start.
    #[error("no kernel: give --kernel FILE, or kernel = \"FILE\" in the machine file")]
    NoKernel,
    /// This host is too small for it.
    #[error(
        "{wanted_bytes} bytes of memory are more than this host's {host_bytes} bytes: ask for less"
    )]
    MemoryAboveHost {
        /// What was asked for.
        wanted_bytes: u64,
        /// What the host has.
        host_bytes: u64,
    },
}

impl From<&MachineRequest> for MachineFile {
    fn from(request: &MachineRequest) -> Self {
        let mut file = Self {
            kernel: Some(request.kernel.clone()),
            initrd: request.initrd.clone(),
            append: Some(request.append.clone()),
            cpus: Some(request.cpus),
            ..Self::default()
        };
        file.memory.size = Some(Bytes(request.memory_bytes));
        file
    }
}

/// Checks a request against what machines and this host can be.
pub fn resolve(request: &MachineRequest) -> Result<(MachineSpec, BootSource), ConfigError> {
    resolve_file(&request.into())
}

/// Checks a machine file against what machines and this host can be.
pub fn resolve_file(file: &MachineFile) -> Result<(MachineSpec, BootSource), ConfigError> {
    let spec = check_parts(parts(file)?)?;
    let kernel = file.kernel.as_deref().ok_or(ConfigError::NoKernel)?;
    let boot = BootSource {
        kernel: if kernel == Path::new(EMBEDDED_KERNEL) {
            embedded_kernel()
        } else {
            KernelImage::File(kernel.to_owned())
        },
        initrd: file.initrd.clone(),
        append: file
            .append
            .clone()
            .unwrap_or_else(|| DEFAULT_APPEND.to_owned()),
    };
    Ok((spec, boot))
}

/// Checks what was asked for, in whatever words, against what machines and this host can be.
pub fn check_parts(parts: MachineParts) -> Result<MachineSpec, ConfigError> {
    let backends = parts.backends.clone();
    let spec = MachineSpec::from_parts(parts).map_err(|error| {
        let is_rom = |backend: &&BackendSpec| match &error {
            SpecError::RomAsRam { id } => backend.id() == id,
            _ => false,
        };
        match backends.iter().find(is_rom).and_then(fault_of_read_only) {
            Some(fault) => ConfigError::File(fault),
            None => ConfigError::Spec(error),
        }
    })?;
    check_host(&spec)?;
    Ok(spec)
}

/// Refuses a machine with more memory than this host has.
fn check_host(spec: &MachineSpec) -> Result<(), ConfigError> {
    let wanted_bytes = spec.layout().total_bytes();
    match total_bytes() {
        Some(host_bytes) if wanted_bytes > host_bytes => Err(ConfigError::MemoryAboveHost {
            wanted_bytes,
            host_bytes,
        }),
        _ => Ok(()),
    }
}

fn parts(file: &MachineFile) -> Result<MachineParts, SpecError> {
    let cpus = CpuCount::new(file.cpus.unwrap_or(1))?;
    let mut backends = file
        .backend
        .iter()
        .map(backend)
        .collect::<Result<Vec<_>, _>>()?;
    let mut ram_backend = file.memory.backend.clone();
    let nodes_have_ram = file.node.iter().any(|node| node.backend.is_some());
    if ram_backend.is_none() && !nodes_have_ram {
        let bytes = file.memory.size.map_or(DEFAULT_RAM_BYTES, |size| size.0);
        backends.push(BackendSpec::new(BACKEND_ID, bytes)?);
        ram_backend = Some(BACKEND_ID.to_owned());
    }
    Ok(MachineParts {
        cpus,
        backends,
        ram_backend,
        memory: MemoryParts {
            bytes: file.memory.size.map(|size| size.0),
            slots: file.memory.slots,
            max_bytes: file.memory.max.map(|max| max.0),
        },
        nodes: file
            .node
            .iter()
            .map(|node| NodeParts {
                id: node.id,
                cpus: node.cpus.clone(),
                backend: node.backend.clone(),
            })
            .collect(),
        distances: file
            .distance
            .iter()
            .map(|distance| DistanceParts {
                from: distance.from,
                to: distance.to,
                distance: distance.distance,
            })
            .collect(),
        dimms: file
            .dimm
            .iter()
            .map(|dimm| DimmParts {
                id: dimm.id.clone(),
                backend: dimm.backend.clone(),
                node: dimm.node,
                slot: dimm.slot,
                guest_address: dimm.address,
            })
            .collect(),
        pci: file.pci,
        devices: file.device.iter().map(device).collect::<Result<_, _>>()?,
        generation_id: file.vmgenid.unwrap_or(false),
        identity: file.identity(),
    })
}

fn device(table: &DeviceTable) -> Result<DeviceParts, SpecError> {
    DeviceParts::try_from(table).map_err(|reason| SpecError::Device {
        id: table.name().to_owned(),
        reason: DeviceFault::BadParts { reason },
    })
}

fn backend(table: &BackendTable) -> Result<BackendSpec, SpecError> {
    Ok(BackendSpec::from_options(BackendOptions {
        kind: match table.kind {
            KindWord::File => BackendKind::File,
            KindWord::Ram => BackendKind::Ram,
            KindWord::Memfd => BackendKind::Memfd,
        },
        id: table.id.clone(),
        path: table.path.clone(),
        bytes: table.size.0,
        share: table.share,
        readonly: table.readonly,
        rom: match table.rom {
            RomWord::On => OnOffAuto::On,
            RomWord::Off => OnOffAuto::Off,
            RomWord::Auto => OnOffAuto::Auto,
        },
        offset_bytes: table.offset.0,
        align_bytes: table.align.0,
        prealloc: table.prealloc,
        merge: table.merge,
        dump: table.dump,
        discard_data: table.discard_data,
        discards_to_zero: table.discard == DiscardWord::Zero,
        ..BackendOptions::default()
    })?)
}

/// The built-in guest as a kernel.
pub fn embedded_kernel() -> KernelImage {
    KernelImage::Embedded {
        name: payload::NAME.to_owned(),
        bytes: payload::image(),
    }
}
