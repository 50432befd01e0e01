#![forbid(unsafe_code)]
//! One bus: which function an access is for.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{ConfigSpace, Identity};
use crate::device::bus::DeviceEvent;

/// Places on a bus.
pub const SLOTS: usize = 32;
/// The place of the host bridge.
pub const HOST_BRIDGE_SLOT: u8 = 0;
/// The host bridge, as QEMU's generic one: Linux needs no driver for it.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem: (0x1af4, 0x1100),
};

/// A function of the bus. The rules are those of [`crate::device::bus::PioDevice`]: it must not panic or
/// block for long, whatever the guest does.
pub trait PciFunction: Send {
    /// Fills `data` from the registers from `offset` on.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// Takes `data` into the registers.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// The offset inside the function's memory of an address that it answers to.
    fn memory_offset(&self, address: u64) -> Option<u64>;
    /// Fills `data`, which comes in as all `0xff`, from its memory.
    fn read_memory(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data` into its memory.
    fn write_memory(&mut self, offset: u64, data: &[u8]) -> DeviceEvent;
}

/// The bus with its functions, function 0 of each place.
pub struct PciBus {
    slots: [Option<Arc<Mutex<dyn PciFunction>>>; SLOTS],
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = self.slots.iter().enumerate();
        let taken = taken.filter_map(|(slot, function)| function.as_ref().map(|_| slot));
        f.write_str("PciBus")?;
        f.debug_list().entries(taken).finish()
    }
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PciBus {
    /// A bus with a host bridge.
    pub fn new() -> Self {
        let mut bus = Self {
            slots: [const { None }; SLOTS],
        };
        bus.insert(HOST_BRIDGE_SLOT, Arc::new(Mutex::new(HostBridge::new())));
        bus
    }

    /// Puts a function in its place; `false` where another is, or there is no such place.
    pub fn insert(&mut self, slot: u8, function: Arc<Mutex<dyn PciFunction>>) -> bool {
        match self.slots.get_mut(usize::from(slot)) {
            Some(place @ None) => {
                *place = Some(function);
                true
            }
            _ => false,
        }
    }

    /// Reads registers of a function; all ones where there is none.
    pub fn read_config(&self, at: ConfigAddress, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(mut function) = self.function(at) {
            function.read_config(at.offset, data);
        }
    }

    /// Writes registers of a function.
    pub fn write_config(&self, at: ConfigAddress, data: &[u8]) {
        if let Some(mut function) = self.function(at) {
            function.write_config(at.offset, data);
        }
    }

    /// Reads device memory; all ones where nobody answers.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        for slot in self.slots.iter().flatten() {
            let mut function = lock(slot);
            if let Some(offset) = function.memory_offset(address) {
                return function.read_memory(offset, data);
            }
        }
    }

    /// Writes device memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> DeviceEvent {
        for slot in self.slots.iter().flatten() {
            let mut function = lock(slot);
            if let Some(offset) = function.memory_offset(address) {
                return function.write_memory(offset, data);
            }
        }
        DeviceEvent::None
    }

    fn function(&self, at: ConfigAddress) -> Option<MutexGuard<'_, dyn PciFunction + 'static>> {
        let is_first = at.bus == 0 && at.function == 0;
        let slot = self.slots.get(usize::from(at.slot)).filter(|_| is_first)?;
        slot.as_deref().map(lock)
    }
}

fn lock(slot: &Mutex<dyn PciFunction>) -> MutexGuard<'_, dyn PciFunction + 'static> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a register is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigAddress {
    /// Number of the bus.
    pub bus: u8,
    /// Place on the bus.
    pub slot: u8,
    /// Function of the device there.
    pub function: u8,
    /// Offset of the register.
    pub offset: usize,
}

impl ConfigAddress {
    /// As configuration by memory has it: bus, slot and function above an offset of 12 bits.
    pub fn from_memory_offset(offset: u64) -> Self {
        let [_, middle, high, top, ..] = offset.to_le_bytes();
        Self {
            bus: high >> 4 | top << 4,
            slot: middle >> 7 | (high & 0xf) << 1,
            function: middle >> 4 & 0x7,
            offset: usize::try_from(offset & 0xfff).unwrap_or(0),
        }
    }

    /// As the address register of configuration by ports has it; `None` where its enable bit is clear.
    pub fn from_register(register: u32) -> Option<Self> {
        let [offset, devfn, bus, enable] = register.to_le_bytes();
        (enable & 0x80 != 0).then_some(Self {
            bus,
            slot: devfn >> 3,
            function: devfn & 0x7,
            offset: usize::from(offset & 0xfc),
        })
    }
}

/// Registers and nothing else.
#[derive(Debug)]
struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    fn new() -> Self {
        Self {
            config: ConfigSpace::new(HOST_BRIDGE, None),
        }
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// It has nothing that anybody need write: so it has no state.
    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn memory_offset(&self, _: u64) -> Option<u64> {
        None
    }

    fn read_memory(&mut self, _: u64, _: &mut [u8]) {}

    fn write_memory(&mut self, _: u64, _: &[u8]) -> DeviceEvent {
        DeviceEvent::None
    }
}
