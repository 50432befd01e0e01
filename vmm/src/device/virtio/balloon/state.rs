#![forbid(unsafe_code)]
//! What a balloon saves beside registers and queues. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

/// A balloon, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// How many pages the guest is to give away.
    pub target_pages: u32,
    /// How many it says that it has given away.
    pub actual_pages: u32,
    /// What the guest fills free pages with.
    pub poison: u32,
    /// Features beside the common ones: a guest finds the queues by them.
    pub features: u64,
}
