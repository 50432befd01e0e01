#![forbid(unsafe_code)]
//! The part of a manifest that says which memory belongs to which node and which is a module.

use serde::{Deserialize, Serialize};

use crate::spec::{
    BackendSpec, CpuCount, DimmParts, DistanceParts, Identity, MachineParts, MachineSpec,
    MemoryParts, NodeParts,
};

/// The first format that has this part.
pub(super) const FIRST_FORMAT: u32 = 2;

/// Nodes and memory modules. What a machine is without them, format 1 says too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineEntry {
    /// NUMA nodes in the order of their numbers; none where all RAM is one backend.
    pub nodes: Vec<NodeEntry>,
    /// How far nodes are apart, row by row.
    pub distances: Vec<Vec<u32>>,
    /// Slots for memory modules.
    pub slots: u32,
    /// RAM and modules together, at most, in bytes.
    pub max_bytes: u64,
    /// Memory modules in the machine's order.
    pub dimms: Vec<DimmEntry>,
}

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeEntry {
    /// Numbers of its vCPUs.
    pub cpus: Vec<u32>,
    /// Id of its backend.
    pub backend: Option<String>,
}

/// One memory module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DimmEntry {
    /// What it is called.
    pub id: String,
    /// Id of its backend.
    pub backend: String,
    /// The node that it belongs to.
    pub node: u32,
    /// Its slot.
    pub slot: u32,
    /// Where the guest sees its first byte.
    pub guest_address: u64,
}

impl MachineEntry {
    /// The entry of a machine; `None` where there is nothing to say.
    pub fn of(spec: &MachineSpec) -> Option<Self> {
        let parts = spec.to_parts();
        if parts.nodes.is_empty() && parts.memory.max_bytes.is_none() {
            return None;
        }
        let count = parts.nodes.len();
        let distance = |from, to| u32::from(spec.numa().distance(from, to));
        Some(Self {
            nodes: parts
                .nodes
                .into_iter()
                .map(|node| NodeEntry {
                    cpus: node.cpus,
                    backend: node.backend,
                })
                .collect(),
            distances: (0..count)
                .map(|from| (0..count).map(|to| distance(from, to)).collect())
                .collect(),
            slots: parts.memory.slots,
            max_bytes: spec.max_bytes(),
            dimms: spec
                .dimms()
                .iter()
                .map(|dimm| DimmEntry {
                    id: dimm.id().to_owned(),
                    backend: spec.backends()[dimm.backend()].id().to_owned(),
                    node: dimm.node(),
                    slot: dimm.slot(),
                    guest_address: dimm.guest_address(),
                })
                .collect(),
        })
    }

    /// The machine's parts, unchecked.
    pub(super) fn parts(&self, cpus: CpuCount, backends: Vec<BackendSpec>) -> MachineParts {
        let nodes_have_ram = self.nodes.iter().any(|node| node.backend.is_some());
        let first = backends.first().map(|backend| backend.id().to_owned());
        let rows = (0..).zip(&self.distances);
        MachineParts {
            cpus,
            ram_backend: first.filter(|_| !nodes_have_ram),
            backends,
            memory: MemoryParts {
                bytes: None,
                slots: self.slots,
                max_bytes: Some(self.max_bytes),
            },
            nodes: (0..)
                .zip(&self.nodes)
                .map(|(id, node)| NodeParts {
                    id: Some(id),
                    cpus: node.cpus.clone(),
                    backend: node.backend.clone(),
                })
                .collect(),
            distances: rows
                .flat_map(|(from, row)| {
                    (0..)
                        .zip(row)
                        .map(move |(to, &distance)| DistanceParts { from, to, distance })
                })
                .collect(),
            dimms: self
                .dimms
                .iter()
                .map(|dimm| DimmParts {
                    id: dimm.id.clone(),
                    backend: dimm.backend.clone(),
                    node: dimm.node,
                    slot: Some(dimm.slot),
                    guest_address: Some(dimm.guest_address),
                })
                .collect(),
            pci: false,
            devices: Vec::new(),
            generation_id: false,
            identity: Identity::default(),
        }
    }
}
