#![forbid(unsafe_code)]
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::device::pci::bus::{ConfigAddress, PciFunction};

const SLOT: u8 = 5;

/// A function that counts how often it was taken out.
#[derive(Default)]
struct Card {
    detached: Arc<AtomicU32>,
}

impl PciFunction for Card {
    fn read_config(&mut self, _: usize, data: &mut [u8]) {
        data.fill(0x42);
    }
    fn write_config(&mut self, _: usize, _: &[u8]) {}
    fn memory_offset(&self, _: u64) -> Option<u64> {
        None
    }
    fn read_memory(&mut self, _: u64, _: &mut [u8]) {}
    fn write_memory(&mut self, _: u64, _: &[u8]) -> DeviceEvent {
        DeviceEvent::None
    }
    fn detach(&mut self) {
        self.detached.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Default)]
struct Wire(Arc<AtomicBool>);

impl Level for Wire {
    fn set(&self, is_raised: bool) {
        self.0.store(is_raised, Ordering::SeqCst);
    }
}

/// A bus with its registers, and what can be seen of them.
struct Bench {
    bus: Arc<PciBus>,
    hotplug: Arc<Hotplug>,
    ports: HotplugPorts,
    wire: Wire,
    events: Arc<Mutex<Vec<SlotEvent>>>,
    detached: Arc<AtomicU32>,
}

impl Bench {
    fn new() -> Self {
        let bus = Arc::new(PciBus::new());
        let bench = Self::on(bus, HotplugState::default());
        bench.hotplug.connect(Box::new(bench.wire.clone()));
        bench
    }

    /// Registers whose line is connected to nothing yet.
    fn on(bus: Arc<PciBus>, state: HotplugState) -> Self {
        let hotplug = Arc::new(Hotplug::new(Arc::clone(&bus), state));
        let events: Arc<Mutex<Vec<SlotEvent>>> = Arc::default();
        let heard = Arc::clone(&events);
        hotplug.listen(Box::new(move |event| heard.lock().unwrap().push(event)));
        Self {
            bus,
            ports: HotplugPorts::new(Arc::clone(&hotplug)),
            hotplug,
            wire: Wire::default(),
            events,
            detached: Arc::default(),
        }
    }

    fn plug(&self, slot: u8) -> bool {
        let card = Card {
            detached: Arc::clone(&self.detached),
        };
        self.hotplug.plug(slot, Arc::new(Mutex::new(card)))
    }

    fn read(&mut self, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        self.ports.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u16, value: u32) {
        let event = self.ports.write(offset, &value.to_le_bytes());
        assert_eq!(event, DeviceEvent::None);
    }

    fn is_raised(&self) -> bool {
        self.wire.0.load(Ordering::SeqCst)
    }

    fn events(&self) -> Vec<SlotEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    fn detached(&self) -> u32 {
        self.detached.load(Ordering::SeqCst)
    }

    fn first_byte(&self, slot: u8) -> u8 {
        let at = ConfigAddress {
            bus: 0,
            slot,
            function: 0,
            offset: 0,
        };
        let mut data = [0];
        self.bus.read_config(at, &mut data);
        data[0]
    }
}

const fn outcome(slot: u32, event: u32, status: u32) -> u32 {
    slot | event << 8 | status << 16
}

#[test]
fn a_device_comes_and_goes_and_the_guest_hears_of_each_once() {
    let mut bench = Bench::new();
    assert!(!bench.is_raised());
    assert!(bench.plug(SLOT));
    assert!(!bench.plug(SLOT), "the place is taken");
    assert!(bench.is_raised());
    assert_eq!(bench.first_byte(SLOT), 0x42);
    assert_eq!((bench.read(UNPLUG), bench.read(PLUGGED)), (0, 1 << SLOT));
    assert!(!bench.is_raised());
    assert_eq!(bench.read(PLUGGED), 0);
    bench.hotplug.request_unplug(SLOT);
    assert!(bench.is_raised() && bench.hotplug.is_requested(SLOT));
    assert_eq!(bench.read(UNPLUG), 1 << SLOT);
    assert!(!bench.is_raised());
    // The guest may have been busy: asked again, it is told again.
    bench.hotplug.request_unplug(SLOT);
    assert_eq!(bench.read(UNPLUG), 1 << SLOT);
    bench.write(EJECT, 1 << SLOT);
    assert_eq!(bench.events(), [SlotEvent::Ejected { slot: SLOT }]);
    assert_eq!((bench.detached(), bench.first_byte(SLOT)), (1, 0xff));
    assert!(!bench.hotplug.is_requested(SLOT));
    bench.write(EJECT, 1 << SLOT);
    assert!(bench.events().is_empty(), "there is nothing more");
    assert!(bench.plug(SLOT), "the place is free");
}

#[test]
fn what_nobody_asked_for_goes_too_and_with_it_what_there_was_to_tell() {
    let mut bench = Bench::new();
    for slot in [1, 7, 31] {
        assert!(bench.plug(slot));
        bench.hotplug.request_unplug(slot);
    }
    assert!(!bench.plug(0) && !bench.plug(32));
    bench.hotplug.request_unplug(0);
    bench.hotplug.request_unplug(9);
    bench.hotplug.request_unplug(200);
    // All at once, the host bridge and empty places among them.
    bench.write(EJECT, u32::MAX);
    let gone = [1, 7, 31].map(|slot| SlotEvent::Ejected { slot });
    assert_eq!(bench.events(), gone);
    assert_eq!(bench.detached(), 3);
    assert!(!bench.is_raised());
    assert_eq!((bench.read(PLUGGED), bench.read(UNPLUG)), (0, 0));
    assert_eq!(bench.bus.taken(), 1, "the host bridge stays");
    assert_eq!(bench.hotplug.save(), HotplugState::default());
}

#[test]
fn a_guest_that_cannot_let_go_says_so_once_for_each_request() {
    let mut bench = Bench::new();
    assert!(bench.plug(SLOT));
    assert_eq!(bench.read(PLUGGED), 1 << SLOT);
    let slot = u32::from(SLOT);
    bench.write(OUTCOME, outcome(slot, 3, 1));
    assert!(bench.events().is_empty(), "nobody has asked");
    bench.hotplug.request_unplug(SLOT);
    for no_failure in [
        outcome(slot, 1, 1),
        outcome(slot, 3, 0),
        outcome(slot, 3, 0x84),
        outcome(slot + 1, 3, 1),
        outcome(200, 3, 1),
    ] {
        bench.write(OUTCOME, no_failure);
        assert!(bench.events().is_empty(), "{no_failure:#x}");
    }
    for _ in 0..3 {
        bench.write(OUTCOME, outcome(slot, 3, 0x82));
    }
    let refused = SlotEvent::Refused {
        slot: SLOT,
        status: 0x82,
    };
    assert_eq!(bench.events(), [refused]);
    assert!(!bench.is_raised() && !bench.hotplug.is_requested(SLOT));
    assert_eq!((bench.detached(), bench.read(UNPLUG)), (0, 0));
}

#[test]
fn what_the_guest_does_not_know_is_kept_over_a_freeze() {
    let bench = Bench::new();
    assert!(bench.plug(SLOT) && bench.plug(6));
    bench.hotplug.request_unplug(6);
    let saved = bench.hotplug.save();
    let mut clone = Bench::on(Arc::clone(&bench.bus), saved);
    assert_eq!(clone.hotplug.save(), saved);
    assert!(!clone.is_raised());
    clone.hotplug.connect(Box::new(clone.wire.clone()));
    assert!(clone.is_raised(), "the guest is told again");
    assert_eq!(clone.read(PLUGGED), 3 << SLOT);
    assert_eq!(clone.read(UNPLUG), 1 << 6);
    assert!(!clone.is_raised() && clone.hotplug.is_requested(6));
    // A state that says more than there can be.
    let all = HotplugState {
        plugged: u32::MAX,
        unplug: u32::MAX,
        requested: 1 << 6 | 1,
    };
    let damaged = Bench::on(Arc::clone(&bench.bus), all).hotplug.save();
    let possible = HotplugState {
        plugged: 3 << SLOT,
        unplug: 1 << 6,
        requested: 1 << 6,
    };
    assert_eq!(damaged, possible);
}

#[test]
fn an_access_that_is_not_a_register_is_none() {
    let mut bench = Bench::new();
    assert!(bench.plug(SLOT));
    for (offset, bytes) in [(0, 1), (0, 2), (1, 4), (2, 4), (3, 1), (13, 3)] {
        let mut data = [0xff; 4];
        bench.ports.read(offset, &mut data[..bytes]);
        assert_eq!(data, [0xff; 4]);
        // Of the third register no byte: it takes any part.
        if usize::from(offset) + bytes <= usize::from(EJECT) || offset > OUTCOME {
            let _ = bench.ports.write(offset, &[0xff; 4][..bytes]);
        }
    }
    bench.hotplug.request_unplug(SLOT);
    let refused = outcome(SLOT.into(), 3, 1).to_le_bytes();
    let _ = bench.ports.write(OUTCOME, &refused[..3]);
    let _ = bench.ports.write(OUTCOME + 1, &refused[..3]);
    assert_eq!((bench.read(EJECT), bench.read(OUTCOME)), (0, 0));
    for offset in [PLUGGED, UNPLUG] {
        bench.write(offset, u32::MAX);
    }
    assert!(bench.is_raised() && bench.events().is_empty());
    assert_eq!(bench.read(PLUGGED), 1 << SLOT);
    // The places of a part of the register, and no others.
    assert!(bench.plug(9) && bench.plug(31));
    let _ = bench.ports.write(EJECT + 1, &[0xff]);
    assert_eq!(bench.events(), [SlotEvent::Ejected { slot: 9 }]);
    let _ = bench.ports.write(EJECT + 2, &[0, 0x80]);
    assert_eq!(bench.events(), [SlotEvent::Ejected { slot: 31 }]);
    assert_eq!(bench.bus.taken(), 1 | 1 << SLOT);
}

#[derive(Debug, Clone)]
enum Step {
    Plug(u8),
    RequestUnplug(u8),
    Read(u16, usize),
    Write(u16, usize, u32),
    SaveAndRestore,
}

fn step() -> impl Strategy<Value = Step> {
    let mask = prop_oneof![any::<u32>(), (0_u32..32).prop_map(|slot| 1 << slot)];
    let outcomes = (0_u32..40, 0_u32..5, 0_u32..=0xff).prop_map(|(s, e, c)| outcome(s, e, c));
    prop_oneof![
        3 => (0_u8..34).prop_map(Step::Plug),
        3 => (0_u8..34).prop_map(Step::RequestUnplug),
        3 => (0_u16..4).prop_map(|register| Step::Read(register * 4, 4)),
        1 => (0_u16..16, 1_usize..=4).prop_map(|(at, bytes)| Step::Read(at, bytes)),
        2 => mask.prop_map(|slots| Step::Write(EJECT, 4, slots)),
        2 => outcomes.prop_map(|value| Step::Write(OUTCOME, 4, value)),
        1 => (0_u16..16, 1_usize..=4, any::<u32>()).prop_map(|(at, n, v)| Step::Write(at, n, v)),
        1 => Just(Step::SaveAndRestore),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_does_each_device_goes_once_and_each_request_has_one_answer(
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        let mut bench = Bench::new();
        let (mut plugged, mut requests, mut gone, mut refused) = (0, 0, 0, 0);
        for step in steps {
            match step {
                Step::Plug(slot) => plugged += u32::from(bench.plug(slot)),
                Step::RequestUnplug(slot) => {
                    requests += 1;
                    bench.hotplug.request_unplug(slot);
                }
                Step::Read(at, bytes) => {
                    let mut data = [0xff; 4];
                    bench.ports.read(at, &mut data[..bytes]);
                }
                Step::Write(at, bytes, value) => {
                    let _ = bench.ports.write(at, &value.to_le_bytes()[..bytes]);
                }
                Step::SaveAndRestore => {
                    let saved = bench.hotplug.save();
                    let (bus, detached) = (Arc::clone(&bench.bus), Arc::clone(&bench.detached));
                    bench = Bench { detached, ..Bench::on(bus, saved) };
                    bench.hotplug.connect(Box::new(bench.wire.clone()));
                    prop_assert_eq!(bench.hotplug.save(), saved);
                }
            }
            for event in bench.events() {
                match event {
                    SlotEvent::Ejected { slot } => {
                        gone += 1;
                        prop_assert_eq!(bench.first_byte(slot), 0xff);
                    }
                    SlotEvent::Refused { slot, .. } => {
                        refused += 1;
                        prop_assert_eq!(bench.first_byte(slot), 0x42);
                    }
                }
            }
            let state = bench.hotplug.save();
            let devices = bench.bus.taken() & !1;
            prop_assert_eq!(bench.bus.taken() & 1, 1);
            prop_assert_eq!(bench.is_raised(), state.plugged | state.unplug != 0);
            prop_assert_eq!((state.plugged | state.requested) & !devices, 0);
            prop_assert_eq!(state.unplug & !state.requested, 0);
            prop_assert_eq!(devices.count_ones(), plugged - gone);
            prop_assert_eq!(bench.detached(), gone);
            prop_assert!(refused <= requests);
        }
    }
}

#[test]
fn whoever_hears_that_a_function_went_holds_it_alone() {
    let bus = Arc::new(PciBus::new());
    let hotplug = Arc::new(Hotplug::new(bus, HotplugState::default()));
    let function = Arc::new(Mutex::new(Card::default()));
    assert!(hotplug.plug(SLOT, Arc::clone(&function) as _));
    let holders: Arc<Mutex<Vec<usize>>> = Arc::default();
    let heard = Arc::clone(&holders);
    hotplug.listen(Box::new(move |_| {
        heard.lock().unwrap().push(Arc::strong_count(&function));
    }));
    let mut ports = HotplugPorts::new(Arc::clone(&hotplug));
    let _ = ports.write(EJECT, &(1_u32 << SLOT).to_le_bytes());
    assert_eq!(*holders.lock().unwrap(), [1]);
}
