#![forbid(unsafe_code)]
//! How a guest reaches the bus: configuration by two ports, configuration by memory (ECAM), and the
//! window in which functions have their memory.

use std::sync::Arc;

use super::bus::{ConfigAddress, PciBus};
use crate::device::bus::{DeviceEvent, MmioDevice, PioDevice};

/// Offset of the data register, behind the address register.
const DATA: u16 = 4;

/// Configuration by ports: an address register and a data register.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: u32,
}

impl ConfigPorts {
    /// The ports of a bus, with the address register as it was saved, or 0.
    pub fn new(bus: Arc<PciBus>, address: u32) -> Self {
        Self { bus, address }
    }

    /// The address register, to be saved.
    pub fn address(&self) -> u32 {
        self.address
    }

    /// The register that an access of `length` bytes at `offset` of the ports is for.
    fn target(&self, offset: u16, length: usize) -> Option<ConfigAddress> {
        let within = usize::from(offset.checked_sub(DATA)?);
        let mut address = ConfigAddress::from_register(self.address)?;
        address.offset += within;
        (within + length <= 4).then_some(address)
    }
}

impl PioDevice for ConfigPorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if let Some(target) = self.target(offset, data.len()) {
            self.bus.read_config(target, data);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]);
        } else if let Some(target) = self.target(offset, data.len()) {
            self.bus.write_config(target, data);
        }
        DeviceEvent::None
    }
}

/// Configuration by memory.
#[derive(Debug)]
pub struct ConfigMemory {
    bus: Arc<PciBus>,
}

impl ConfigMemory {
    /// That of a bus.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }
}

impl MmioDevice for ConfigMemory {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bus
            .read_config(ConfigAddress::from_memory_offset(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> DeviceEvent {
        self.bus
            .write_config(ConfigAddress::from_memory_offset(offset), data);
        DeviceEvent::None
    }
}

/// Memory of functions.
#[derive(Debug)]
pub struct Window {
    bus: Arc<PciBus>,
    start: u64,
}

impl Window {
    /// The window of a bus that begins at an address.
    pub fn new(bus: Arc<PciBus>, start: u64) -> Self {
        Self { bus, start }
    }
}

impl MmioDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bus.read_memory(self.start + offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> DeviceEvent {
        self.bus.write_memory(self.start + offset, data)
    }
}
