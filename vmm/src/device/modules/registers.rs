#![forbid(unsafe_code)]
//! The registers of the slots.
//!
//! ```text
//! host                         registers                     guest
//! plug     -- range, node ---> NEXT     -- line raised --->  reads it: looks at the slot
//! unplug   ------------------> NEXT     -- line raised --->  reads it: lets go of the module
//!          <- Ejected -------- EJECT    <-- writes its slot  _EJ0
//!          <- Outcome -------- OUTCOME  <-- writes how       _OST
//! ```
//!
//! The line is raised as long as there is something that the guest has not read. A guest may take out what
//! nobody asked for, may never answer, and may write anything at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::state::ModulesState;
use crate::device::bus::{DeviceEvent, PioDevice};
use crate::device::pci::hotplug::Level;
/// How often a guest is heard of one slot between two things that it is told there: it says what it likes.
const MAX_OUTCOMES: u8 = 4;

/// Offset of the register that says which slot the next seven are about.
pub const SELECT: u16 = 0x00;
/// Offset of the first guest physical address, low half; the high one follows.
pub const FIRST: u16 = 0x04;
/// Offset of the last guest physical address.
pub const LAST: u16 = 0x0c;
/// Offset of the length in bytes.
pub const LENGTH: u16 = 0x14;
/// Offset of the node's number.
pub const NODE: u16 = 0x1c;
/// Offset of the slot's status, as `_STA` has it.
pub const STATUS: u16 = 0x20;
/// Offset of the register that says what happened next: slot and notification. Reading takes it back.
pub const NEXT: u16 = 0x24;
/// Offset of the register that takes the module of a slot out.
pub const EJECT: u16 = 0x28;
/// Offset of the register that says how something went: slot, event and status, a byte each.
pub const OUTCOME: u16 = 0x2c;
/// What [`NEXT`] reads where nothing has happened.
pub const NOTHING: u32 = u32::MAX;
/// What a slot is told: look what is there.
pub const DEVICE_CHECK: u32 = 1;
/// What a slot is told: let go of what is there.
pub const EJECT_REQUEST: u32 = 3;
/// Status of a slot with a module: present, enabled, shown and working.
pub const PRESENT: u32 = 0xf;
/// Status of an outcome: done.
const SUCCESS: u8 = 0;
/// Status of an outcome: it goes on.
const IN_PROGRESS: u8 = 0x84;

/// A module in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotModule {
    /// First guest physical address.
    pub guest_address: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Its node.
    pub node: u32,
}

/// What a guest did to a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleEvent {
    /// It let go of the module of this slot.
    Ejected {
        /// The slot.
        slot: u32,
        /// Where the module is.
        guest_address: u64,
    },
    /// It says how something went.
    Outcome {
        /// The slot.
        slot: u32,
        /// What was asked of it.
        event: u8,
        /// How that went, as ACPI has it.
        status: u8,
        /// Whether it was asked to let go of the module, and will not.
        is_refusal: bool,
    },
}

/// Who hears of [`ModuleEvent`]s: from a vCPU's thread, so it must not block.
pub type Listener = Box<dyn Fn(ModuleEvent) + Send + Sync>;

#[derive(Debug, Default)]
struct Registers {
    modules: BTreeMap<u32, SlotModule>,
    selected: u32,
    plugged: BTreeSet<u32>,
    unplug: BTreeSet<u32>,
    requested: BTreeSet<u32>,
    /// How often the guest has said what came of it, slot by slot, since it was last told of something there.
    outcomes: BTreeMap<u32, u8>,
}

/// The registers, from the host's side.
pub struct ModuleSlots {
    registers: Mutex<Registers>,
    line: OnceLock<Box<dyn Level>>,
    listener: OnceLock<Listener>,
}

impl fmt::Debug for ModuleSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ModuleSlots")
            .field(&*self.registers())
            .finish()
    }
}

impl ModuleSlots {
    /// Slots with these modules, as after power-on or as they were saved. Of what was saved only that counts
    /// which is about slots that are taken.
    pub fn new(modules: BTreeMap<u32, SlotModule>, saved: &ModulesState) -> Self {
        let taken = |slots: &[u32]| {
            let slots = slots.iter().filter(|slot| modules.contains_key(slot));
            slots.copied().collect::<BTreeSet<_>>()
        };
        let requested = taken(&saved.requested);
        Self {
            registers: Mutex::new(Registers {
                selected: saved.selected,
                plugged: taken(&saved.plugged),
                unplug: &taken(&saved.unplug) & &requested,
                outcomes: BTreeMap::new(),
                requested,
                modules,
            }),
            line: OnceLock::new(),
            listener: OnceLock::new(),
        }
    }

    /// Everything that [`Self::new`] needs beside the modules.
    pub fn save(&self) -> ModulesState {
        let registers = self.registers();
        let list = |slots: &BTreeSet<u32>| slots.iter().copied().collect();
        ModulesState {
            selected: registers.selected,
            plugged: list(&registers.plugged),
            unplug: list(&registers.unplug),
            requested: list(&registers.requested),
        }
    }

    /// Says which line tells the guest; it is raised at once where there is something to tell. Once.
    pub fn connect(&self, line: Box<dyn Level>) {
        let registers = self.registers();
        if self.line.set(line).is_ok() {
            self.set_line(&registers);
        }
    }

    /// Says who hears of what the guest does. Once, before it runs.
    pub fn listen(&self, listener: Listener) {
        // There is one.
        let _ = self.listener.set(listener);
    }

    /// Whether there is a module in a slot.
    pub fn is_taken(&self, slot: u32) -> bool {
        self.registers().modules.contains_key(&slot)
    }

    /// Puts a module, whose memory the guest can reach already, in its slot and tells the guest.
    pub fn plug(&self, slot: u32, module: SlotModule) {
        let mut registers = self.registers();
        registers.modules.insert(slot, module);
        registers.plugged.insert(slot);
        registers.outcomes.remove(&slot);
        self.set_line(&registers);
    }

    /// Asks the guest to let go of the module in a slot; whether there is one. Asked again, it is told again.
    pub fn request_unplug(&self, slot: u32) -> bool {
        let mut registers = self.registers();
        if !registers.modules.contains_key(&slot) {
            return false;
        }
        registers.requested.insert(slot);
        registers.outcomes.remove(&slot);
        registers.unplug.insert(slot);
        self.set_line(&registers);
        true
    }

    fn select(&self, slot: u32) {
        self.registers().selected = slot;
    }

    fn shown(&self) -> Option<SlotModule> {
        let registers = self.registers();
        registers.modules.get(&registers.selected).copied()
    }

    /// What happened next; the guest knows from now on.
    fn next(&self) -> u32 {
        let mut registers = self.registers();
        let came = registers.plugged.pop_first();
        let next = came.map(|slot| (slot, DEVICE_CHECK)).or_else(|| {
            let goes = registers.unplug.pop_first();
            goes.map(|slot| (slot, EJECT_REQUEST))
        });
        if next.is_some() {
            self.set_line(&registers);
        }
        next.map_or(NOTHING, |(slot, what)| slot | what << 16)
    }

    fn eject(&self, slot: u32) {
        let mut registers = self.registers();
        let Some(module) = registers.modules.remove(&slot) else {
            return;
        };
        registers.plugged.remove(&slot);
        registers.unplug.remove(&slot);
        registers.requested.remove(&slot);
        self.set_line(&registers);
        drop(registers);
        self.tell(ModuleEvent::Ejected {
            slot,
            guest_address: module.guest_address,
        });
    }

    fn outcome(&self, value: u32) {
        let [slot, event, status, _] = value.to_le_bytes();
        let slot = u32::from(slot);
        let mut registers = self.registers();
        if !registers.modules.contains_key(&slot) || status == IN_PROGRESS {
            return;
        }
        let is_about_going = u32::from(event) == EJECT_REQUEST && status != SUCCESS;
        // One answer for each request, however often the guest gives it.
        let is_refusal = is_about_going && registers.requested.remove(&slot);
        if is_refusal {
            registers.unplug.remove(&slot);
            self.set_line(&registers);
        }
        let said = registers.outcomes.entry(slot).or_default();
        *said = said.saturating_add(1);
        let is_heard = *said <= MAX_OUTCOMES || is_refusal;
        drop(registers);
        if !is_heard {
            return;
        }
        self.tell(ModuleEvent::Outcome {
            slot,
            event,
            status,
            is_refusal,
        });
    }

    fn tell(&self, event: ModuleEvent) {
        if let Some(listener) = self.listener.get() {
            listener(event);
        }
    }

    /// With the registers locked, so that the last level is that of the last change.
    fn set_line(&self, registers: &Registers) {
        if let Some(line) = self.line.get() {
            line.set(!registers.plugged.is_empty() || !registers.unplug.is_empty());
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registers, from the guest's side. An access that is not one whole register is none,
/// but that a slot can be emptied by its first byte.
#[derive(Debug)]
pub struct ModulePorts {
    slots: Arc<ModuleSlots>,
}

impl ModulePorts {
    /// The ports of these registers.
    pub fn new(slots: Arc<ModuleSlots>) -> Self {
        Self { slots }
    }
}

impl PioDevice for ModulePorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if data.len() != 4 {
            return;
        }
        let of_module = |value: fn(SlotModule) -> u64, register: u16| {
            let value = self.slots.shown().map_or(0, value);
            let half = if offset == register {
                value
            } else {
                value >> 32
            };
            u32::try_from(half & 0xffff_ffff).unwrap_or_default()
        };
        let value = match offset {
            FIRST | 0x08 => of_module(|module| module.guest_address, FIRST),
            LAST | 0x10 => of_module(|module| module.guest_address + (module.bytes - 1), LAST),
            LENGTH | 0x18 => of_module(|module| module.bytes, LENGTH),
            NODE => self.slots.shown().map_or(0, |module| module.node),
            STATUS => self.slots.shown().map_or(0, |_| PRESENT),
            NEXT => self.slots.next(),
            SELECT | EJECT | OUTCOME => 0,
            _ => return,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        // A slot's number has one byte.
        if let (EJECT, &[slot]) = (offset, data) {
            self.slots.eject(slot.into());
        }
        if let &[a, b, c, d] = data {
            let value = u32::from_le_bytes([a, b, c, d]);
            match offset {
                SELECT => self.slots.select(value),
                EJECT => self.slots.eject(value),
                OUTCOME => self.slots.outcome(value),
                _ => (),
            }
        }
        DeviceEvent::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Line(Arc<Mutex<Vec<bool>>>);

    impl Level for Line {
        fn set(&self, is_raised: bool) {
            self.0.lock().unwrap().push(is_raised);
        }
    }

    fn module() -> SlotModule {
        SlotModule {
            guest_address: 5 << 30,
            bytes: 1 << 27,
            node: 1,
        }
    }

    fn read(ports: &mut ModulePorts, offset: u16) -> u32 {
        let mut data = [0xaa; 4];
        ports.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_module_comes_is_seen_and_goes() {
        let slots = Arc::new(ModuleSlots::new(BTreeMap::new(), &ModulesState::default()));
        let (levels, heard) = (Arc::default(), Arc::new(Mutex::new(Vec::new())));
        slots.connect(Box::new(Line(Arc::clone(&levels))));
        let ears = Arc::clone(&heard);
        slots.listen(Box::new(move |event| ears.lock().unwrap().push(event)));
        let mut ports = ModulePorts::new(Arc::clone(&slots));
        let write = |ports: &mut ModulePorts, offset, value: u32| {
            let _ = ports.write(offset, &value.to_le_bytes());
        };
        assert_eq!(read(&mut ports, NEXT), NOTHING);
        slots.plug(3, module());
        assert_eq!(levels.lock().unwrap().last(), Some(&true));
        assert_eq!(read(&mut ports, NEXT), 3 | DEVICE_CHECK << 16);
        assert_eq!(levels.lock().unwrap().last(), Some(&false));
        assert_eq!(read(&mut ports, STATUS), 0, "slot 0 is empty");
        write(&mut ports, SELECT, 3);
        assert_eq!(read(&mut ports, STATUS), PRESENT);
        assert_eq!(
            (read(&mut ports, FIRST), read(&mut ports, 0x08)),
            (1 << 30, 1)
        );
        assert_eq!(read(&mut ports, LAST), (1 << 30) + (1 << 27) - 1);
        assert_eq!(
            (read(&mut ports, LENGTH), read(&mut ports, NODE)),
            (1 << 27, 1)
        );
        assert!(slots.request_unplug(3) && !slots.request_unplug(4));
        assert_eq!(read(&mut ports, NEXT), 3 | EJECT_REQUEST << 16);
        write(&mut ports, OUTCOME, 3 | 3 << 8 | 0x84 << 16);
        for _ in 0..2 {
            write(&mut ports, OUTCOME, 3 | 3 << 8 | 0x81 << 16);
        }
        for slot in [3, 3, 9] {
            write(&mut ports, EJECT, slot);
        }
        write(&mut ports, OUTCOME, 3 | 3 << 8);
        assert_eq!(read(&mut ports, STATUS), 0);
        let outcome = |is_refusal| ModuleEvent::Outcome {
            slot: 3,
            event: 3,
            status: 0x81,
            is_refusal,
        };
        let ejected = ModuleEvent::Ejected {
            slot: 3,
            guest_address: 5 << 30,
        };
        assert_eq!(
            *heard.lock().unwrap(),
            [outcome(true), outcome(false), ejected]
        );
    }

    #[test]
    fn what_was_saved_counts_only_for_slots_that_are_taken() {
        let saved = ModulesState {
            selected: u32::MAX,
            plugged: vec![1, 7],
            unplug: vec![1, 2],
            requested: vec![2, 1 << 20],
        };
        let modules = BTreeMap::from([(1, module()), (2, module())]);
        let slots = Arc::new(ModuleSlots::new(modules, &saved));
        let mut ports = ModulePorts::new(Arc::clone(&slots));
        assert_eq!(read(&mut ports, NEXT), 1 | DEVICE_CHECK << 16);
        assert_eq!(read(&mut ports, NEXT), 2 | EJECT_REQUEST << 16);
        assert_eq!(read(&mut ports, NEXT), NOTHING);
        assert_eq!(slots.save().requested, [2]);
        // Anything at any place, of any width.
        for offset in 0..0x40 {
            for width in [1, 2, 4] {
                ports.read(offset, &mut vec![0; width]);
                let _ = ports.write(offset, &vec![0xff; width]);
            }
        }
        assert!(slots.is_taken(1));
    }
}
