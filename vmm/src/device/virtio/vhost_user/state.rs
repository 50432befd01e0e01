#![forbid(unsafe_code)]
//! What a device in another process saves beside registers and queues. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

use crate::device::virtio::device::VirtioStateError;

/// A device in another process, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserState {
    /// Sectors of a disk; 0 of what is none.
    pub sectors: u64,
    /// The hardware address of a network device; zeroes of what is none.
    pub mac: [u8; 6],
}

impl VhostUserState {
    /// Reads it back.
    pub fn decode(bytes: &[u8]) -> Result<Self, VirtioStateError> {
        match postcard::take_from_bytes(bytes) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(VirtioStateError::new(format!(
                "it has {} bytes too many",
                rest.len()
            ))),
            Err(error) => Err(VirtioStateError::new(format!("it cannot be read: {error}"))),
        }
    }
}
