#![forbid(unsafe_code)]
//! What a disk saves beside registers and queues. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

/// A disk, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether nobody can write it.
    pub is_readonly: bool,
}
