#![forbid(unsafe_code)]
//! What a memory device saves. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

/// Memory that grows and shrinks, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// First guest physical address.
    pub guest_address: u64,
    /// Size of the region.
    pub bytes: u64,
    /// Size of a block.
    pub block_bytes: u64,
    /// Its node.
    pub node: u32,
    /// How much the guest is to have.
    pub requested_bytes: u64,
    /// How much of the region the guest may use.
    pub usable_bytes: u64,
    /// Which blocks are plugged, a bit for each, the lowest first.
    pub plugged: Vec<u8>,
}
