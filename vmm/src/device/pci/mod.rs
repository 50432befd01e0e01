//! The PCI bus: a host bridge and up to 31 devices, each with one function.
//!
//! [`bus`] finds the device of an access, [`host`] is how a guest reaches the bus (configuration
//! by ports and by memory, and the window for device memory), [`config`] holds the registers of a
//! function, and [`msix`] its interrupts. A function is a [`bus::PciFunction`]; what it does is its
//! own affair. [`hotplug`] is how functions come and go while the guest runs.
//!
//! Nothing that a guest writes is trusted: a register takes the bits that it has, and no others; an
//! address that no function claims reads as ones.

pub mod bus;
pub mod config;
pub mod host;
pub mod hotplug;
pub mod msix;
pub mod state;

#[cfg(test)]
mod tests;
