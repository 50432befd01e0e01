#![forbid(unsafe_code)]
//! What a disk saves beside registers and queues. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

use crate::device::virtio::device::VirtioStateError;

/// A disk, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether nobody can write it.
    pub is_readonly: bool,
}

impl BlockState {
    /// What was saved; nothing may be behind it.
    pub fn decode(bytes: &[u8]) -> Result<Self, VirtioStateError> {
        let (state, rest) = postcard::take_from_bytes(bytes)
            .map_err(|error| VirtioStateError::new(error.to_string()))?;
        match rest.len() {
            0 => Ok(state),
            more => Err(VirtioStateError::new(format!("{more} bytes too many"))),
        }
    }
}
