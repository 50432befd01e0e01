#![forbid(unsafe_code)]
//! Memory that grows and shrinks (virtio-mem): its backend, its node, and how much of it the guest is to have.
//! Texts are QEMU's where it has one.

use thiserror::Error;

use super::MachineSpec;
use super::backend::{BackendSpec, FileAccess};
use super::device::{DeviceKind, DeviceParts, DeviceSpec};

/// What is plugged at once, unless another size is asked for: a large page.
pub const DEFAULT_BLOCK_BYTES: u64 = 2 << 20;
/// The greatest block.
pub const MAX_BLOCK_BYTES: u64 = 1 << 30;

/// Memory that grows and shrinks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemParts {
    /// Its backend.
    pub backend: String,
    /// How much of it the guest is to have, in bytes.
    pub requested_bytes: u64,
    /// What is plugged at once, in bytes; without it, [`DEFAULT_BLOCK_BYTES`].
    pub block_bytes: Option<u64>,
    /// The node that it belongs to.
    pub node: u32,
    /// Whether what is plugged is taken from the host at once.
    pub prealloc: bool,
    /// Its first guest physical address; without it, the first that fits.
    pub guest_address: Option<u64>,
    /// How much there can be of it, in bytes: as much as its backend has, whatever is said here.
    pub bytes: u64,
}

/// Why memory cannot grow and shrink in this way.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MemFault {
    /// No such backend.
    #[error("memdev: Device '{backend}' not found")]
    NoBackend {
        /// The one asked for.
        backend: String,
    },
    /// Somebody has the backend.
    #[error("'memdev' property specifies a busy memdev: {backend}")]
    Busy {
        /// The one asked for.
        backend: String,
    },
    /// The backend is taken from the host at once.
    #[error(
        "'memdev' property specifies a memdev with preallocation enabled: {backend}. Instead, specify \
         'prealloc=on' for the virtio-mem device."
    )]
    Prealloc {
        /// The backend.
        backend: String,
    },
    /// The backend is a template's: what is unplugged could not be discarded.
    #[error(
        "ram_block_discard_range: Discarding RAM with readonly files is not supported\n\
         Unexpected error discarding RAM: Operation not permitted"
    )]
    Templated,
    /// A block of no size that blocks have.
    #[error(
        "'block-size' property has to be a power of two from 0x200000 to 0x40000000, not {block_bytes:#x}"
    )]
    Block {
        /// The size asked for.
        block_bytes: u64,
    },
    /// Parts of blocks.
    #[error("backend memory size must be multiple of {block_bytes:#x}")]
    Size {
        /// The size of a block.
        block_bytes: u64,
    },
    /// Parts of blocks.
    #[error("'requested-size' property has to be multiples of 'block-size' ({block_bytes:#x})")]
    RequestedBlocks {
        /// The size of a block.
        block_bytes: u64,
    },
    /// More than there is.
    #[error("'requested-size' cannot exceed the memory backend size({bytes:#x})")]
    Requested {
        /// The size of the backend.
        bytes: u64,
    },
    /// No such node.
    #[error("'node' property has value '{node}', which exceedsthe number of numa nodes: {nodes}")]
    Node {
        /// The one asked for.
        node: u32,
        /// How many there are.
        nodes: usize,
    },
    /// A machine without room for memory that comes.
    #[error(
        "the configuration is not prepared for memory devices (e.g., for memory hotplug), consider specifying the \
         maxmem option"
    )]
    NoRoom,
}

impl MemParts {
    /// What is plugged at once, in bytes.
    pub fn block(&self) -> u64 {
        self.block_bytes.unwrap_or(DEFAULT_BLOCK_BYTES)
    }

    /// Whether so much of it can be asked for.
    pub fn check_requested(&self, requested_bytes: u64) -> Result<(), MemFault> {
        let block_bytes = self.block();
        if requested_bytes > self.bytes {
            return Err(MemFault::Requested { bytes: self.bytes });
        }
        if !requested_bytes.is_multiple_of(block_bytes) {
            return Err(MemFault::RequestedBlocks { block_bytes });
        }
        Ok(())
    }

    /// Checks it with its backend, in a machine of so many nodes.
    pub(super) fn check(&mut self, backend: &BackendSpec, nodes: usize) -> Result<(), MemFault> {
        let block_bytes = self.block();
        if backend.prealloc() {
            let backend = backend.id().to_owned();
            return Err(MemFault::Prealloc { backend });
        }
        let is_own = |access| access == FileAccess::Template;
        if backend.file().is_some_and(|file| !is_own(file.access())) {
            return Err(MemFault::Templated);
        }
        let sizes = DEFAULT_BLOCK_BYTES..=MAX_BLOCK_BYTES;
        if !block_bytes.is_power_of_two() || !sizes.contains(&block_bytes) {
            return Err(MemFault::Block { block_bytes });
        }
        self.bytes = backend.bytes();
        if !self.bytes.is_multiple_of(block_bytes) {
            return Err(MemFault::Size { block_bytes });
        }
        if usize::try_from(self.node).is_ok_and(|node| node >= nodes) {
            let node = self.node;
            return Err(MemFault::Node { node, nodes });
        }
        // A size that is no blocks is that first, as with QEMU.
        if !self.requested_bytes.is_multiple_of(block_bytes) {
            return Err(MemFault::RequestedBlocks { block_bytes });
        }
        self.check_requested(self.requested_bytes)
    }
}

/// The memory devices among some.
pub(super) fn of_parts(devices: &[DeviceParts]) -> Vec<(String, MemParts)> {
    let mems = devices.iter().filter_map(|device| match &device.kind {
        DeviceKind::Mem(mem) => Some((device.id.clone().unwrap_or_default(), mem.clone())),
        _ => None,
    });
    mems.collect()
}

impl MachineSpec {
    /// The place among the backends of a memory device's.
    pub fn memory_backend_of(&self, device: &DeviceSpec) -> Option<usize> {
        let mem = device.memory()?;
        self.backends
            .iter()
            .position(|backend| backend.id() == mem.backend)
    }

    /// Whether a backend grows and shrinks.
    pub fn is_growing(&self, backend: usize) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|device| self.memory_backend_of(device) == Some(backend))
    }

    /// The same machine with one memory device more, on a backend of its own.
    pub fn with_memory_device(
        &self,
        backend: BackendSpec,
        part: DeviceParts,
    ) -> Result<Self, super::SpecError> {
        let mut parts = self.to_parts();
        parts.backends.push(backend);
        parts.devices.push(part);
        Self::from_parts(parts)
    }

    /// The same machine, where so much of a memory device is asked for.
    pub fn with_requested(&self, id: &str, bytes: u64) -> Result<Self, MemFault> {
        let mut spec = self.clone();
        let mut devices = spec.devices.iter_mut();
        if let Some(device) = devices.find(|device| device.id() == id) {
            device.request_memory(bytes)?;
        }
        Ok(spec)
    }
}
