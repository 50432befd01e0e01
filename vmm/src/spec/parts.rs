#![forbid(unsafe_code)]
//! A machine as it was asked for, in parts that refer to each other by id: unchecked. All that a
//! command line, a file or a monitor says ends up here; [`MachineSpec::from_parts`] is where it is
//! accepted or refused.
//!
//! [`MachineSpec::from_parts`]: super::MachineSpec::from_parts

use super::{BackendSpec, CpuCount, DeviceKind, DeviceParts, Identity};

/// All that a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineParts {
    /// How many vCPUs.
    pub cpus: CpuCount,
    /// Memory backends. Each must be used by exactly one of what follows.
    pub backends: Vec<BackendSpec>,
    /// The backend that is all RAM, where no node has one (`-machine memory-backend=`).
    pub ram_backend: Option<String>,
    /// Sizes (`-m`).
    pub memory: MemoryParts,
    /// NUMA nodes (`-numa node`), in any order.
    pub nodes: Vec<NodeParts>,
    /// Distances of nodes (`-numa dist`).
    pub distances: Vec<DistanceParts>,
    /// Memory modules (`-device pc-dimm`), in the order in which they take slots.
    pub dimms: Vec<DimmParts>,
    /// Whether it has a PCI bus even if no device is on it: some may come.
    pub pci: bool,
    /// Devices on the PCI bus.
    pub devices: Vec<DeviceParts>,
    /// Whether it has a VM generation ID.
    pub generation_id: bool,
    /// Who it is (`-name`, `-uuid`, `-smbios type=1`).
    pub identity: Identity,
}

impl MachineParts {
    /// A machine whose RAM is `backend`.
    pub fn of(cpus: CpuCount, backend: BackendSpec) -> Self {
        Self {
            cpus,
            ram_backend: Some(backend.id().to_owned()),
            backends: vec![backend],
            memory: MemoryParts::default(),
            nodes: Vec::new(),
            distances: Vec::new(),
            dimms: Vec::new(),
            pci: false,
            devices: Vec::new(),
            generation_id: false,
            identity: Identity::default(),
        }
    }

    /// Takes out the backends that nothing uses: devices that come later may name them.
    pub fn take_unused(&mut self) -> Vec<BackendSpec> {
        let nodes = self.nodes.iter().filter_map(|node| node.backend.as_deref());
        let dimms = self.dimms.iter().map(|dimm| dimm.backend.as_str());
        let devices = self.devices.iter().filter_map(|device| match &device.kind {
            DeviceKind::Mem(mem) => Some(mem.backend.as_str()),
            _ => None,
        });
        let ram = self.ram_backend.as_deref();
        let used: Vec<&str> = ram
            .into_iter()
            .chain(nodes)
            .chain(dimms)
            .chain(devices)
            .collect();
        let is_unused = |backend: &mut BackendSpec| !used.contains(&backend.id());
        self.backends.extract_if(.., is_unused).collect()
    }
}

/// Sizes of memory in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryParts {
    /// RAM without modules in bytes; without it, what the backends add up to.
    pub bytes: Option<u64>,
    /// How many memory modules there is room for.
    pub slots: u32,
    /// RAM and modules together, in bytes; without it, the RAM.
    pub max_bytes: Option<u64>,
}

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeParts {
    /// Its number; without it, the least that no earlier node has.
    pub id: Option<u32>,
    /// Numbers of its vCPUs. A vCPU that no node names belongs to node 0.
    pub cpus: Vec<u32>,
    /// Its memory.
    pub backend: Option<String>,
}

/// How far one node is from another: 10 is local, 255 out of reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DistanceParts {
    /// From this node.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// The distance.
    pub distance: u32,
}

/// One memory module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DimmParts {
    /// What it is called.
    pub id: String,
    /// Its memory.
    pub backend: String,
    /// The node that it belongs to.
    pub node: u32,
    /// Its slot; without it, the first free one.
    pub slot: Option<u32>,
    /// Its guest physical address; without it, the first that fits.
    pub guest_address: Option<u64>,
}
