#![forbid(unsafe_code)]
//! What every virtio device saves. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

use crate::device::pci::state::FunctionState;

/// A device on the PCI bus, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// What the device is called.
    pub id: String,
    /// Its PCI function.
    pub function: FunctionState,
    /// Status register.
    pub status: u8,
    /// Which half of the device's features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is shown.
    pub driver_feature_select: u32,
    /// Features that the driver takes.
    pub driver_features: u64,
    /// Which queue is shown.
    pub queue_select: u16,
    /// Interrupt status register.
    pub interrupt_status: u8,
    /// MSI-X vector of changes of the configuration.
    pub config_vector: u16,
    /// Whether the guest broke a queue.
    pub is_broken: bool,
    /// Its queues.
    pub queues: Vec<SavedQueue>,
    /// State of its own.
    pub device: Vec<u8>,
}

/// A queue, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// Number of entries.
    pub size: u16,
    /// Whether it is set up.
    pub is_ready: bool,
    /// Whether notifications go by index.
    pub has_event_index: bool,
    /// Guest address of the descriptors.
    pub descriptors: u64,
    /// Guest address of the driver's ring.
    pub driver_ring: u64,
    /// Guest address of the device's ring.
    pub device_ring: u64,
    /// Index of the next request to take.
    pub next_available: u16,
    /// Index of the next answer to give.
    pub next_used: u16,
    /// MSI-X vector.
    pub vector: u16,
}
