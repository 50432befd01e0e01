#![forbid(unsafe_code)]
//! What the bus and its functions save. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

/// Kind of a [`PciState`] record.
pub const PCI_KIND: &str = "pci";
/// Version of [`PciState`].
pub const PCI_VERSION: u32 = 2;

/// The host bridge, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The address register of configuration by ports.
    pub config_address: u32,
}

/// Kind of a [`HotplugState`] record.
pub const HOTPLUG_KIND: &str = "pci-hotplug";
/// Version of [`HotplugState`].
pub const HOTPLUG_VERSION: u32 = 1;

/// What the guest has not heard or done of devices that come and go, version 1. A bit for each place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotplugState {
    /// Came, and the guest does not know.
    pub plugged: u32,
    /// Are to go, and the guest does not know.
    pub unplug: u32,
    /// Are to go, and have not gone.
    pub requested: u32,
}

/// Registers and interrupts of a function, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// Its device number.
    pub slot: u8,
    /// Configuration registers.
    pub config: Vec<u8>,
    /// Interrupts.
    pub msix: MsixState,
}

/// Interrupts of a function, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Address low and high, data and control of each message.
    pub entries: Vec<[u32; 4]>,
    /// Which messages wait.
    pub pending: Vec<bool>,
}
