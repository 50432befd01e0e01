#![forbid(unsafe_code)]
//! One bus: which function an access is for.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

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
    /// It was taken out: when this returns it neither touches guest memory nor raises an interrupt, ever
    /// again.
    fn detach(&mut self) {}
}

/// A function that its bus and whoever made it hold.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// What is in a place. It is read-locked during an access: a function that was taken out has none any more.
type Place = RwLock<Option<SharedFunction>>;

/// The bus with its functions, function 0 of each place.
pub struct PciBus {
    places: [Place; SLOTS],
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = self.places.iter().enumerate();
        let taken = taken.filter_map(|(slot, place)| read(place).as_ref().map(|_| slot));
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
        let bus = Self {
            places: [const { RwLock::new(None) }; SLOTS],
        };
        bus.insert(HOST_BRIDGE_SLOT, Arc::new(Mutex::new(HostBridge::new())));
        bus
    }

    /// Puts a function in its place; `false` where another is, or there is no such place.
    pub fn insert(&self, slot: u8, function: SharedFunction) -> bool {
        let Some(place) = self.places.get(usize::from(slot)) else {
            return false;
        };
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        let is_free = place.is_none();
        if is_free {
            *place = Some(function);
        }
        is_free
    }

    /// Takes a function out of its place, once every access to it is over; `None` where there is none. The
    /// host bridge stays.
    pub fn remove(&self, slot: u8) -> Option<SharedFunction> {
        if slot == HOST_BRIDGE_SLOT {
            return None;
        }
        let place = self.places.get(usize::from(slot))?;
        place.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Which places are taken, a bit for each.
    pub fn taken(&self) -> u32 {
        let places = self.places.iter().rev();
        places.fold(0, |bits, place| {
            bits << 1 | u32::from(read(place).is_some())
        })
    }

    /// Reads registers of a function; all ones where there is none.
    pub fn read_config(&self, at: ConfigAddress, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(function) = self.place(at).map(read).as_deref().and_then(Option::as_ref) {
            lock(function).read_config(at.offset, data);
        }
    }

    /// Writes registers of a function.
    pub fn write_config(&self, at: ConfigAddress, data: &[u8]) {
        if let Some(function) = self.place(at).map(read).as_deref().and_then(Option::as_ref) {
            lock(function).write_config(at.offset, data);
        }
    }

    /// Reads device memory; all ones where nobody answers.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        for place in &self.places {
            let place = read(place);
            let Some(mut function) = place.as_deref().map(lock) else {
                continue;
            };
            if let Some(offset) = function.memory_offset(address) {
                return function.read_memory(offset, data);
            }
        }
    }

    /// Writes device memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> DeviceEvent {
        for place in &self.places {
            let place = read(place);
            let Some(mut function) = place.as_deref().map(lock) else {
                continue;
            };
            if let Some(offset) = function.memory_offset(address) {
                return function.write_memory(offset, data);
            }
        }
        DeviceEvent::None
    }

    fn place(&self, at: ConfigAddress) -> Option<&Place> {
        let is_first = at.bus == 0 && at.function == 0;
        self.places.get(usize::from(at.slot)).filter(|_| is_first)
    }
}

fn read(place: &Place) -> RwLockReadGuard<'_, Option<SharedFunction>> {
    place.read().unwrap_or_else(PoisonError::into_inner)
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
