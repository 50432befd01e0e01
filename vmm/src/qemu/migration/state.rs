#![forbid(unsafe_code)]
//! What a state file holds, in plain types.

use serde::{Deserialize, Serialize};

use crate::template::seal::Seal;

/// The body of a state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMachine {
    /// The machine in QEMU's words, `pc-q35-10.0`.
    pub kind: String,
    /// Number of vCPUs.
    pub cpus: u8,
    /// What it was doing (a name of `query-status`).
    pub status: String,
    /// Whether a kernel was ever loaded: without one there is nothing to run.
    pub has_program: bool,
    /// Its UUID, where it had one.
    pub uuid: Option<[u8; 16]>,
    /// Whether `x-ignore-shared` was on.
    pub ignore_shared: bool,
    /// Whether `mapped-ram` was on.
    pub mapped_ram: bool,
    /// Its memory, in the machine's order.
    pub backends: Vec<SavedBackend>,
    /// Nodes and memory modules.
    pub topology: SavedTopology,
    /// vCPUs, chips and devices: a state file of a template, whole.
    pub machine: Vec<u8>,
}

/// Nodes and memory modules, as the guest was told of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SavedTopology {
    /// For each NUMA node, the numbers of its vCPUs.
    pub node_cpus: Vec<Vec<u8>>,
    /// How far nodes are apart, row by row.
    pub distances: Vec<u8>,
    /// For each memory backend, its node.
    pub backend_nodes: Vec<u32>,
    /// Slots for memory modules.
    pub slots: u32,
    /// RAM and modules together, at most, in bytes.
    pub max_bytes: u64,
    /// Memory modules.
    pub dimms: Vec<SavedDimm>,
}

/// One memory module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDimm {
    /// What it is called.
    pub id: String,
    /// Id of its backend.
    pub backend: String,
    /// The node that it belongs to.
    pub node: u32,
    /// Its slot.
    pub slot: u32,
    /// Its first guest physical address.
    pub guest_address: u64,
}

/// One memory backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBackend {
    /// Its id.
    pub id: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its first guest physical address.
    pub guest_address: u64,
    /// Whether the guest could only read it.
    pub is_rom: bool,
    /// Where its content is.
    pub content: SavedContent,
}

/// Where the content of a backend is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedContent {
    /// In its own file.
    LeftOut {
        /// Where in that file it begins, in bytes.
        offset_bytes: u64,
        /// What the file was when the state was saved.
        seal: Seal,
        /// What each page is, with checksums: a page index with this one backend.
        index: Vec<u8>,
    },
    /// In the state file, behind the body.
    Here {
        /// Runs of pages that are not all zero: first page and how many.
        runs: Vec<(u64, u64)>,
        /// XXH3-64 of those pages, one behind the other.
        checksum: u64,
    },
}
