#![forbid(unsafe_code)]
//! What the slots of memory modules save. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

/// Kind of a [`ModulesState`] record.
pub const MODULES_KIND: &str = "memory-hotplug";
/// Version of [`ModulesState`].
pub const MODULES_VERSION: u32 = 1;

/// What the guest has not heard or done of modules that come and go, version 1. Numbers of slots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModulesState {
    /// The slot that is shown.
    pub selected: u32,
    /// Came, and the guest does not know.
    pub plugged: Vec<u32>,
    /// Are to go, and the guest does not know.
    pub unplug: Vec<u32>,
    /// Are to go, and have not gone.
    pub requested: Vec<u32>,
}
