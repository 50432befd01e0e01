#![forbid(unsafe_code)]
//! What a machine is made of, in types that cannot be wrong.
//!
//! Everything here is pure: sizes are checked against what the guest's address map can hold, not
//! against what this host has. [`parts`] is what may be asked for, [`MachineSpec::from_parts`] the one
//! place that says no.

pub mod backend;
mod balloon;
mod console;
mod device;
mod dimm;
mod error;
mod identity;
mod limits;
mod mac;
mod mem;
mod numa;
pub mod parts;
mod pci;
mod pool;
mod role;
mod tap;
mod vhost_user;

use crate::memory::layout::{Placed, RamLayout};
use pool::{Pool, refuse_twice};

pub use backend::{BackendError, BackendKind, BackendOptions, BackendSource, BackendSpec};
pub use backend::{FileAccess, FileSource, OnOffAuto};
pub use balloon::BalloonParts;
pub use console::{ConsoleFault, ConsoleParts, PortParts, PortTarget};
pub use console::{MAX_CONSOLE_PORTS, MAX_PORT_NAME_BYTES, MAX_SOCKET_PATH_BYTES};
pub use device::{DeviceFault, DeviceKind, DeviceParts, DeviceSpec, DiskAccess, DiskParts};
pub use device::{
    FIRST_CID, LAST_CID, LAST_SLOT, MAX_SERIAL_BYTES, MAX_VSOCK_PATH_BYTES, NetParts, VsockParts,
};
pub use dimm::Dimm;
pub use error::{DimmFault, SpecError};
pub use identity::{Identity, MAX_SYSTEM_TEXT_BYTES, SystemTexts, Uuid};
pub use limits::{Limits, MAX_RATE, Rate, RateFault};
pub use mac::MacAddress;
pub use mem::{DEFAULT_BLOCK_BYTES, MAX_BLOCK_BYTES, MemFault, MemParts};
pub use numa::{LOCAL_DISTANCE, Node, Numa, REMOTE_DISTANCE};
pub use parts::{DimmParts, DistanceParts, MachineParts, MemoryParts, NodeParts};
pub use role::{Role, RoleError};
pub use tap::TapSpec;
pub use vhost_user::{VhostUserFunction, VhostUserParts, fault_of_unshared};

/// The most vCPUs that a machine can have.
pub const MAX_CPUS: u8 = 8;
/// The least RAM of a machine in bytes: 4 MiB, room for what a boot writes below the kernel.
pub const MIN_RAM_BYTES: u64 = 4 << 20;
/// The most memory backends of a machine; each takes one or two KVM memory slots.
pub const MAX_BACKENDS: usize = 16;
/// The most NUMA nodes of a machine.
pub const MAX_NODES: u32 = 16;
/// The most slots for memory modules that a machine can have.
pub const MAX_SLOTS: u32 = 256;

/// How many vCPUs a machine has: 1 to [`MAX_CPUS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuCount(u8);

impl CpuCount {
    /// One vCPU.
    pub const ONE: Self = Self(1);

    /// Checks a count.
    pub fn new(cpus: u32) -> Result<Self, SpecError> {
        match u8::try_from(cpus) {
            Ok(count @ 1..=MAX_CPUS) => Ok(Self(count)),
            _ => Err(SpecError::Cpus { cpus }),
        }
    }

    /// The count as a number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u32> for CpuCount {
    type Error = SpecError;

    fn try_from(cpus: u32) -> Result<Self, SpecError> {
        Self::new(cpus)
    }
}

/// A whole machine: proven when it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    cpus: CpuCount,
    /// RAM in the order of its guest addresses, then modules in the order of theirs.
    backends: Vec<BackendSpec>,
    layout: RamLayout,
    numa: Numa,
    dimms: Vec<Dimm>,
    slots: u32,
    max_bytes: u64,
    has_pci: bool,
    devices: Vec<DeviceSpec>,
    has_generation_id: bool,
    identity: Identity,
}

impl MachineSpec {
    /// Describes a machine whose RAM is these backends one behind the other, without nodes.
    pub fn new(cpus: CpuCount, backends: Vec<BackendSpec>) -> Result<Self, SpecError> {
        let bytes = backends
            .iter()
            .fold(0, |sum: u64, backend| sum.saturating_add(backend.bytes()));
        let ram = Ram {
            backends,
            bytes,
            numa: Numa::default(),
        };
        let nothing = (&[][..], &mut [][..]);
        Self::with_dimms(cpus, ram, MemoryParts::default(), nothing, Vec::new())
    }

    /// Checks what was asked for.
    pub fn from_parts(parts: MachineParts) -> Result<Self, SpecError> {
        let MachineParts {
            cpus,
            backends,
            ram_backend,
            memory,
            nodes,
            distances,
            dimms,
            pci,
            mut devices,
            generation_id,
            identity,
        } = parts;
        let mut pool = Pool::new(backends)?;
        let mut ram = match ram_backend {
            Some(id) => one_backend(&mut pool, &id, memory, &nodes)?,
            None => Ram::default(),
        };
        if !nodes.is_empty() {
            let own = &mut ram.backends;
            let numa = Numa::new(cpus, &nodes, &distances, &mut |node, id| {
                own.push(pool.take(id, || format!("node {node}"))?);
                Ok(own.len() - 1)
            })?;
            ram.numa = numa;
            ram.check_nodes(memory.bytes)?;
        } else if let Some(distance) = distances.first() {
            return Err(SpecError::DistanceNode {
                node: distance.from,
            });
        }
        let mut modules = Vec::new();
        for dimm in &dimms {
            modules.push(pool.take_for(dimm)?);
        }
        let mut mems = mem::of_parts(&devices);
        for (device, mem) in &mems {
            modules.push(pool.take_for_memory(device, &mem.backend)?);
        }
        pool.refuse_rest()?;
        let machine = Self::with_dimms(cpus, ram, memory, (&dimms, &mut mems), modules)?;
        let kinds = devices
            .iter_mut()
            .filter_map(|device| match &mut device.kind {
                DeviceKind::Mem(mem) => Some(mem),
                _ => None,
            });
        for (mem, (_, placed)) in kinds.zip(mems) {
            *mem = placed;
        }
        machine
            .with_pci(pci)
            .with_devices(devices)?
            .with_generation_id(generation_id)
            .with_identity(identity)
    }

    fn with_dimms(
        cpus: CpuCount,
        ram: Ram,
        memory: MemoryParts,
        (parts, mems): (&[DimmParts], &mut [(String, MemParts)]),
        modules: Vec<BackendSpec>,
    ) -> Result<Self, SpecError> {
        let Ram {
            mut backends,
            bytes,
            mut numa,
        } = ram;
        let count = backends.len() + modules.len();
        if count > MAX_BACKENDS {
            return Err(SpecError::TooManyBackends { backends: count });
        }
        refuse_twice(&backends)?;
        if let Some(rom) = backends.iter().find(|backend| backend.is_rom()) {
            let id = rom.id().to_owned();
            return Err(SpecError::RomAsRam { id });
        }
        let sizes: Vec<u64> = backends.iter().map(BackendSpec::bytes).collect();
        let alone = RamLayout::new(&sizes)?;
        if bytes < MIN_RAM_BYTES {
            return Err(SpecError::TooSmall { bytes });
        }
        let max_bytes = max_bytes(memory, bytes)?;
        if max_bytes > bytes && numa.nodes().is_empty() {
            numa = Numa::implicit(cpus);
        }
        let room = dimm::Room {
            slots: memory.slots,
            bytes: max_bytes - bytes,
            start: alone.module_area_start(),
            // A machine without a table of nodes is one node.
            nodes: numa.nodes().len().max(1),
        };
        let first = backends.len();
        let (dimms, regions) = room.place_all(first, parts, mems, &modules)?;
        let placed: Vec<Placed> = dimms
            .iter()
            .chain(&regions)
            .map(|dimm| Placed {
                guest_address: dimm.guest_address,
                bytes: dimm.bytes,
            })
            .collect();
        let layout = alone.with_modules(&placed)?;
        backends.extend(modules);
        Ok(Self {
            cpus,
            backends,
            layout,
            numa,
            dimms,
            slots: memory.slots,
            max_bytes,
            has_pci: false,
            devices: Vec::new(),
            has_generation_id: false,
            identity: Identity::default(),
        })
    }

    /// The same machine as somebody else.
    pub fn with_identity(self, identity: Identity) -> Result<Self, SpecError> {
        identity.check()?;
        Ok(Self { identity, ..self })
    }

    /// The same machine with a VM generation ID, or without.
    #[must_use]
    pub fn with_generation_id(self, has_generation_id: bool) -> Self {
        Self {
            has_generation_id,
            ..self
        }
    }

    /// Whether it has a VM generation ID, which is another one in each clone.
    pub fn has_generation_id(&self) -> bool {
        self.has_generation_id
    }

    /// How many vCPUs.
    pub fn cpus(&self) -> CpuCount {
        self.cpus
    }

    /// The memory backends: RAM, lowest guest address first, and behind it the modules in the order in
    /// which they were given.
    pub fn backends(&self) -> &[BackendSpec] {
        &self.backends
    }

    /// Where the memory lies in the guest.
    pub fn layout(&self) -> RamLayout {
        self.layout.clone()
    }

    /// NUMA nodes.
    pub fn numa(&self) -> &Numa {
        &self.numa
    }

    /// Memory modules, in the order in which they were given.
    pub fn dimms(&self) -> &[Dimm] {
        &self.dimms
    }

    /// Slots for memory modules.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// RAM without modules, in bytes.
    pub fn ram_bytes(&self) -> u64 {
        let ram = self.layout.ram_segments();
        ram.map(|segment| segment.bytes).sum()
    }

    /// RAM and all modules that there is room for, in bytes.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// The node of each backend, where the guest is told of nodes.
    pub fn node_of_backend(&self, backend: usize) -> u32 {
        let dimm = self.dimms.iter().find(|dimm| dimm.backend == backend);
        let node = || {
            (0..)
                .zip(self.numa.nodes())
                .find_map(|(id, node)| (node.backend == Some(backend)).then_some(id))
        };
        let mut mems = self.devices.iter();
        let mem = mems.find(|device| self.memory_backend_of(device) == Some(backend));
        let mem = || Some(mem?.memory()?.node);
        dimm.map(Dimm::node).or_else(mem).or_else(node).unwrap_or(0)
    }

    /// The parts that this machine was, or could have been, made of.
    pub fn to_parts(&self) -> MachineParts {
        let id = |backend: usize| self.backends[backend].id().to_owned();
        let nodes: &[Node] = if self.numa.was_asked_for() {
            self.numa.nodes()
        } else {
            &[]
        };
        let has_own_ram = nodes.iter().any(|node| node.backend.is_some());
        let numbers = || 0..u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        let pairs = numbers().flat_map(|from| numbers().map(move |to| (from, to)));
        let distance = |(from, to): (u32, u32)| {
            let at = |node| usize::try_from(node).unwrap_or(usize::MAX);
            DistanceParts {
                from,
                to,
                distance: self.numa.distance(at(from), at(to)).into(),
            }
        };
        MachineParts {
            cpus: self.cpus,
            backends: self.backends.clone(),
            ram_backend: (!has_own_ram).then(|| id(0)),
            memory: MemoryParts {
                bytes: Some(self.ram_bytes()),
                slots: self.slots,
                max_bytes: (self.max_bytes > self.ram_bytes()).then_some(self.max_bytes),
            },
            nodes: numbers()
                .zip(nodes)
                .map(|(number, node)| NodeParts {
                    id: Some(number),
                    cpus: node.cpus.iter().map(|&cpu| cpu.into()).collect(),
                    backend: node.backend.map(id),
                })
                .collect(),
            distances: pairs
                .filter(|(from, to)| from != to)
                .map(distance)
                .collect(),
            dimms: self
                .dimms
                .iter()
                .map(|dimm| DimmParts {
                    id: dimm.id.clone(),
                    backend: id(dimm.backend),
                    node: dimm.node,
                    slot: Some(dimm.slot),
                    guest_address: Some(dimm.guest_address),
                })
                .collect(),
            pci: self.has_pci,
            devices: self.devices.iter().map(DeviceSpec::to_parts).collect(),
            generation_id: self.has_generation_id,
            identity: self.identity.clone(),
        }
    }
}

/// RAM without modules.
#[derive(Default)]
struct Ram {
    backends: Vec<BackendSpec>,
    bytes: u64,
    numa: Numa,
}

impl Ram {
    /// Nodes that have memory make up all RAM.
    fn check_nodes(&mut self, asked: Option<u64>) -> Result<(), SpecError> {
        let nodes = self.numa.nodes().iter();
        let own = nodes.filter_map(|node| self.backends.get(node.backend?));
        let nodes_bytes = own.fold(0, |sum: u64, backend| sum.saturating_add(backend.bytes()));
        let asked_bytes = asked.unwrap_or(self.bytes.max(nodes_bytes));
        if nodes_bytes != asked_bytes {
            return Err(SpecError::NodeSizes {
                nodes_bytes,
                asked_bytes,
            });
        }
        self.bytes = nodes_bytes;
        Ok(())
    }
}

/// All RAM in one backend.
fn one_backend(
    pool: &mut Pool,
    id: &str,
    memory: MemoryParts,
    nodes: &[NodeParts],
) -> Result<Ram, SpecError> {
    if let Some((node, _)) = (0..).zip(nodes).find(|(_, node)| node.backend.is_some()) {
        return Err(SpecError::RamTwice {
            id: id.to_owned(),
            node,
        });
    }
    let backend = pool.take(id, || "the machine".to_owned())?;
    let bytes = backend.bytes();
    match memory.bytes {
        Some(asked_bytes) if asked_bytes != bytes => Err(SpecError::RamSize {
            id: id.to_owned(),
            bytes,
            asked_bytes,
        }),
        _ => Ok(Ram {
            backends: vec![backend],
            bytes,
            numa: Numa::default(),
        }),
    }
}

fn max_bytes(memory: MemoryParts, bytes: u64) -> Result<u64, SpecError> {
    let MemoryParts {
        slots, max_bytes, ..
    } = memory;
    if slots > MAX_SLOTS {
        return Err(SpecError::TooManySlots { slots });
    }
    match max_bytes {
        Some(max_bytes) if max_bytes < bytes => Err(SpecError::MaxBelowRam { max_bytes, bytes }),
        Some(max_bytes) if max_bytes == bytes && slots > 0 => {
            Err(SpecError::SlotsWithoutRoom { bytes })
        }
        None if slots > 0 => Err(SpecError::SlotsWithoutRoom { bytes }),
        other => Ok(other.unwrap_or(bytes)),
    }
}

#[cfg(test)]
mod tests;
