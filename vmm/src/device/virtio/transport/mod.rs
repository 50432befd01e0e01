//! How a guest finds and sets up a virtio device.

pub mod common;
pub mod pci;
