//! Devices: what a guest reaches by I/O ports and device memory.
//!
//! A device sees the offset of an access inside its own range and an interrupt line, never KVM, the
//! machine or another device.

pub mod bus;
pub mod irq;
pub mod legacy;
pub mod modules;
pub mod pci;
pub mod socket;
pub mod virtio;
