#![forbid(unsafe_code)]
//! What a network device saves beside registers and queues.

use serde::{Deserialize, Serialize};

/// A network device, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The hardware address that the guest reads.
    pub mac: [u8; 6],
    /// Link status that the guest reads.
    pub status: u16,
    /// How often the guest's view of the registers changed.
    pub generation: u8,
}
