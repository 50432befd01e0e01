#![forbid(unsafe_code)]
//! Devices that come and go while the guest runs: four registers, by which methods of the ACPI tables
//! learn what came and what is to go, take devices out, and say how it went.
//!
//! ```text
//! host                         registers                     guest
//! plug     -- function, bit -> PLUGGED  -- line raised --->  reads it: looks at the place
//! unplug   -- bit -----------> UNPLUG   -- line raised --->  reads it: lets go of the device
//!          <- Ejected -------- EJECT    <-- writes its bit   _EJ0
//!          <- Refused -------- OUTCOME  <-- writes why not   _OST
//! ```
//!
//! The line is raised as long as there is something that the guest has not read, so that nothing is lost on
//! a guest that does not listen yet, or over a freeze. A guest may take out what nobody asked for, as it may
//! by its own administrator's wish; it may never answer; and it may write anything at any time.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::bus::{HOST_BRIDGE_SLOT, PciBus, SharedFunction};
use super::state::HotplugState;
use crate::device::bus::{DeviceEvent, PioDevice};

/// Offset of the register that says what came. Reading takes it back.
pub const PLUGGED: u16 = 0;
/// Offset of the register that says what is to go. Reading takes it back.
pub const UNPLUG: u16 = 4;
/// Offset of the register that takes devices out.
pub const EJECT: u16 = 8;
/// Offset of the register that says how something went: place, event and status, a byte each.
pub const OUTCOME: u16 = 12;
/// Event of an outcome: a device was to go (ACPI 6.5, table 6.49; the low byte of both such events).
const EJECT_EVENT: u8 = 3;
/// Status of an outcome: done.
const SUCCESS: u8 = 0;
/// Status of an outcome: it goes on.
const IN_PROGRESS: u8 = 0x84;

/// An interrupt line with two levels.
pub trait Level: Send + Sync {
    /// Raises or lowers it. Must not block.
    fn set(&self, is_raised: bool);
}

/// What a guest did to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotEvent {
    /// It was taken out of this place, and is out of reach of the guest and the guest out of its.
    Ejected {
        /// The place.
        slot: u8,
    },
    /// It was asked to let go of the device and says that it cannot.
    Refused {
        /// The place.
        slot: u8,
        /// Why, as ACPI has it.
        status: u8,
    },
}

/// Who hears of [`SlotEvent`]s: from a vCPU's thread, so it must not block.
pub type Listener = Box<dyn Fn(SlotEvent) + Send + Sync>;

/// The registers, from the host's side.
pub struct Hotplug {
    bus: Arc<PciBus>,
    registers: Mutex<HotplugState>,
    line: OnceLock<Box<dyn Level>>,
    listener: OnceLock<Listener>,
}

impl fmt::Debug for Hotplug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hotplug").field(&*self.registers()).finish()
    }
}

impl Hotplug {
    /// Those of a bus, as they were saved, or as after power-on. Of what was saved only that counts which is
    /// about places that are taken.
    pub fn new(bus: Arc<PciBus>, saved: HotplugState) -> Self {
        let taken = bus.taken() & !bit(HOST_BRIDGE_SLOT);
        Self {
            bus,
            registers: Mutex::new(HotplugState {
                plugged: saved.plugged & taken,
                unplug: saved.unplug & saved.requested & taken,
                requested: saved.requested & taken,
            }),
            line: OnceLock::new(),
            listener: OnceLock::new(),
        }
    }

    /// Everything that [`Self::new`] needs.
    pub fn save(&self) -> HotplugState {
        *self.registers()
    }

    /// Says which line tells the guest; it is raised at once where there is something to tell. Once, when the
    /// interrupt chips are as they must be.
    pub fn connect(&self, line: Box<dyn Level>) {
        let registers = self.registers();
        if self.line.set(line).is_ok() && registers.plugged | registers.unplug != 0 {
            self.set_line(&registers);
        }
    }

    /// Says who hears of what the guest does. Once, before it runs.
    pub fn listen(&self, listener: Listener) {
        // There is one.
        let _ = self.listener.set(listener);
    }

    /// Puts a function in its place and tells the guest; `false` where another is, or there is no such place.
    pub fn plug(&self, slot: u8, function: SharedFunction) -> bool {
        let mut registers = self.registers();
        if !self.bus.insert(slot, function) {
            return false;
        }
        registers.plugged |= bit(slot);
        self.set_line(&registers);
        true
    }

    /// Asks the guest to let go of what is in a place. Asked again, the guest is told again.
    pub fn request_unplug(&self, slot: u8) {
        let mut registers = self.registers();
        if self.bus.taken() & bit(slot) & !bit(HOST_BRIDGE_SLOT) != 0 {
            registers.requested |= bit(slot);
            registers.unplug |= bit(slot);
            self.set_line(&registers);
        }
    }

    /// Whether what is in a place is to go.
    pub fn is_requested(&self, slot: u8) -> bool {
        self.registers().requested & bit(slot) != 0
    }

    /// What came, or what is to go; the guest knows from now on.
    fn take(&self, which: fn(&mut HotplugState) -> &mut u32) -> u32 {
        let mut registers = self.registers();
        let slots = std::mem::take(which(&mut registers));
        if slots != 0 {
            self.set_line(&registers);
        }
        slots
    }

    /// Takes out what is in these places.
    fn eject(&self, slots: u32) {
        for slot in (0..32).filter(|&slot| slots & bit(slot) != 0) {
            let mut registers = self.registers();
            let Some(function) = self.bus.remove(slot) else {
                continue;
            };
            registers.plugged &= !bit(slot);
            registers.unplug &= !bit(slot);
            registers.requested &= !bit(slot);
            self.set_line(&registers);
            drop(registers);
            let lock = function.lock();
            lock.unwrap_or_else(PoisonError::into_inner).detach();
            // Whoever hears of it holds it alone.
            drop(function);
            self.tell(SlotEvent::Ejected { slot });
        }
    }

    fn outcome(&self, value: u32) {
        let [slot, event, status, _] = value.to_le_bytes();
        if event != EJECT_EVENT || matches!(status, SUCCESS | IN_PROGRESS) {
            return;
        }
        let mut registers = self.registers();
        // One answer for each request, however often the guest gives it.
        if registers.requested & bit(slot) == 0 {
            return;
        }
        registers.unplug &= !bit(slot);
        registers.requested &= !bit(slot);
        self.set_line(&registers);
        drop(registers);
        self.tell(SlotEvent::Refused { slot, status });
    }

    fn tell(&self, event: SlotEvent) {
        if let Some(listener) = self.listener.get() {
            listener(event);
        }
    }

    /// With the registers locked, so that the last level is that of the last change.
    fn set_line(&self, registers: &HotplugState) {
        if let Some(line) = self.line.get() {
            line.set(registers.plugged | registers.unplug != 0);
        }
    }

    fn registers(&self) -> MutexGuard<'_, HotplugState> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bit of a place; none where there is no such place.
fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

/// The registers, from the guest's side. An access that is not one whole register is none, but that some of
/// the places can be emptied by a part of theirs.
#[derive(Debug)]
pub struct HotplugPorts {
    hotplug: Arc<Hotplug>,
}

impl HotplugPorts {
    /// The ports of these registers.
    pub fn new(hotplug: Arc<Hotplug>) -> Self {
        Self { hotplug }
    }
}

impl PioDevice for HotplugPorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if data.len() != 4 {
            return;
        }
        let value = match offset {
            PLUGGED => self.hotplug.take(|registers| &mut registers.plugged),
            UNPLUG => self.hotplug.take(|registers| &mut registers.unplug),
            EJECT | OUTCOME => 0,
            _ => return,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        match (offset, data) {
            (EJECT..OUTCOME, _) => {
                let bytes = data.iter().rev();
                let value = bytes.fold(0, |value: u64, &byte| value << 8 | u64::from(byte));
                let [a, b, c, d, ..] = (value << (8 * (offset - EJECT))).to_le_bytes();
                self.hotplug.eject(u32::from_le_bytes([a, b, c, d]));
            }
            (OUTCOME, &[a, b, c, d]) => self.hotplug.outcome(u32::from_le_bytes([a, b, c, d])),
            _ => (),
        }
        DeviceEvent::None
    }
}

#[cfg(test)]
mod tests;
