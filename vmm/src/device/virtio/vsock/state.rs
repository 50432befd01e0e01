#![forbid(unsafe_code)]
//! What a vsock device saves beside registers and queues. Plain integers; not the run-time types.
//! Connections are not among them: a guest that goes on elsewhere is told that they are gone.

use serde::{Deserialize, Serialize};

/// A vsock device, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The context ID that the guest was told.
    pub cid: u32,
    /// How often it changed.
    pub generation: u8,
    /// The host's port of the connection that the host asked for last. The next has another one: the guest
    /// may still speak of the last.
    pub last_port: u32,
}
