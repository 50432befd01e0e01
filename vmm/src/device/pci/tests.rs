#![forbid(unsafe_code)]
use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::bus::{ConfigAddress, PciBus, PciFunction};
use super::config::{Bar, CONFIG_BYTES, ConfigSpace, Identity};
use super::host::{ConfigMemory, ConfigPorts, Window};
use super::msix::{Message, MessageSink, Msix};
use crate::device::bus::{DeviceEvent, MmioDevice, PioDevice};

const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    class: 0x01_0203,
    revision: 9,
    subsystem: (0xaaaa, 0xbbbb),
};
const BAR: Bar = Bar {
    address: 0xc000_8000,
    bytes: 0x8000,
};

/// Offsets and what was written there.
type Written = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// A function that notes what is written to its memory, and reads as the offset.
struct Notes {
    config: ConfigSpace,
    written: Written,
}

impl PciFunction for Notes {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn memory_offset(&self, address: u64) -> Option<u64> {
        self.config.bar_offset(address)
    }
    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(offset.to_le_bytes()[0]);
    }
    fn write_memory(&mut self, offset: u64, data: &[u8]) -> DeviceEvent {
        self.written.lock().unwrap().push((offset, data.to_vec()));
        DeviceEvent::None
    }
}

fn bus() -> (Arc<PciBus>, Written) {
    let written: Written = Arc::default();
    let bus = PciBus::new();
    let notes = Notes {
        config: ConfigSpace::new(IDENTITY, Some(BAR)),
        written: Arc::clone(&written),
    };
    let notes = Arc::new(Mutex::new(notes));
    assert!(
        !bus.insert(0, Arc::clone(&notes) as _),
        "the host bridge is there"
    );
    assert!(!bus.insert(32, Arc::clone(&notes) as _));
    assert!(bus.insert(3, notes));
    (Arc::new(bus), written)
}

fn port_read(ports: &mut ConfigPorts, register: u32, bytes: usize) -> u32 {
    let _ = ports.write(0, &(0x8000_0000 | register).to_le_bytes());
    let mut data = [0; 4];
    ports.read(4, &mut data[..bytes]);
    u32::from_le_bytes(data)
}

#[test]
fn both_ways_show_the_same_registers() {
    let (bus, _) = bus();
    let mut ports = ConfigPorts::new(Arc::clone(&bus), 0);
    let mut memory = ConfigMemory::new(bus);
    for register in (0..CONFIG_BYTES).step_by(4) {
        let register = u32::try_from(register).unwrap();
        let mut data = [0; 4];
        memory.read(u64::from(3_u32 << 15 | register), &mut data);
        assert_eq!(
            port_read(&mut ports, 3 << 11 | register, 4),
            u32::from_le_bytes(data)
        );
    }
    assert_eq!(port_read(&mut ports, 3 << 11, 4), 0x5678_1234);
    assert_eq!(port_read(&mut ports, 3 << 11 | 8, 4), 0x0102_0309);
    assert_eq!(port_read(&mut ports, 0, 4), 0x0008_1b36, "the host bridge");
    let mut data = [0; 4];
    // Another place, another function, another bus.
    for nobody in [4 << 15, 3 << 15 | 1 << 12, 1 << 20 | 3 << 15] {
        memory.read(nobody, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    memory.read(3 << 15 | 0x100, &mut data);
    assert_eq!(data, [0; 4], "no extended capabilities");
    // A byte at the data port has its own register.
    let mut byte = [0];
    let _ = ports.write(0, &(0x8000_0000_u32 | 3 << 11).to_le_bytes());
    ports.read(5, &mut byte);
    assert_eq!(byte, [0x12]);
}

#[test]
fn a_base_address_is_sized_moved_and_switched_on() {
    let (bus, written) = bus();
    let mut window = Window::new(Arc::clone(&bus), 0xc000_0000);
    let mut memory = ConfigMemory::new(bus);
    let mut data = [0; 4];
    window.read(0x8010, &mut data);
    assert_eq!(data, [0xff; 4], "not switched on yet");
    let config = 3 << 15;
    let _ = memory.write(config | 0x10, &[0xff; 4]);
    let _ = memory.write(config | 0x14, &[0xff; 4]);
    memory.read(config | 0x10, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0xffff_8004, "64 bits, 32 KiB");
    let _ = memory.write(config | 0x10, &0xc123_4567_u32.to_le_bytes());
    let _ = memory.write(config | 0x14, &[0; 4]);
    let _ = memory.write(config | 0x04, &[2, 0]);
    window.read(0x0123_0010, &mut data);
    assert_eq!(data, [0x10; 4]);
    let _ = window.write(0x0123_7fff, &[5]);
    let _ = window.write(0x0123_8000, &[6]);
    assert_eq!(*written.lock().unwrap(), [(0x7fff, vec![5])]);
}

#[test]
fn capabilities_are_a_list() {
    let mut config = ConfigSpace::new(IDENTITY, None);
    assert_eq!(config.u16_at(6) & 0x10, 0);
    assert_eq!(config.add_capability(9, &[1; 5], &[]), Some(0x40));
    assert_eq!(config.add_capability(0x11, &[2; 10], &[0xff]), Some(0x48));
    assert_eq!(config.add_capability(9, &[0; 250], &[]), None);
    assert_eq!(config.u16_at(6) & 0x10, 0x10);
    assert_eq!(config.u16_at(0x34), 0x40);
    assert_eq!(config.u16_at(0x40), 0x4809);
    assert_eq!(config.u16_at(0x48), 0x0011);
    config.write(0x4a, &[0xff; 4]);
    assert_eq!(config.u32_at(0x4a), 0x0202_02ff);
}

#[derive(Default)]
struct Messages(Mutex<Vec<Message>>);

impl MessageSink for Messages {
    fn send(&self, message: Message) -> io::Result<()> {
        self.0.lock().unwrap().push(message);
        Err(io::ErrorKind::InvalidInput.into())
    }
}

#[test]
fn a_message_waits_while_it_is_masked() {
    let messages: Arc<Messages> = Arc::default();
    let sent = || std::mem::take(&mut *messages.0.lock().unwrap());
    let mut msix = Msix::new(2);
    msix.raise(0);
    msix.raise(7);
    let entry = [0xfee0_1000_u32, 0, 0x41, 0].map(u32::to_le_bytes).concat();
    msix.write_table(16, &entry[..8]);
    msix.write_table(24, &entry[8..12]);
    msix.write_table(28, &entry[12..]);
    msix.raise(1);
    msix.connect(Arc::clone(&messages) as _);
    assert!(sent().is_empty(), "not enabled");
    msix.set_control(0xc000);
    assert!(sent().is_empty(), "all are masked");
    msix.set_control(0x8000);
    let message = Message {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(sent(), [message], "the other is masked");
    let mut pending = [0; 8];
    msix.read_pending(0, &mut pending);
    assert_eq!(pending, [1, 0, 0, 0, 0, 0, 0, 0]);
    msix.write_table(12, &[0; 4]);
    assert_eq!(sent().len(), 1);
    let mut table = [0; 32];
    msix.read_table(0, &mut table);
    assert_eq!(table[16..], entry);
    let saved = msix.save();
    assert!(!Msix::new(3).restore(&saved, 0x8000));
    let mut again = Msix::new(2);
    assert!(again.restore(&saved, 0x8000));
    again.connect(Arc::clone(&messages) as _);
    again.raise(1);
    assert_eq!(sent(), [message]);
}

proptest! {
    #[test]
    fn no_access_panics_and_fixed_registers_stay(
        accesses in proptest::collection::vec(
            (any::<bool>(), any::<u32>(), 1_usize..=8, any::<u64>()), 0..200),
    ) {
        let (bus, _) = bus();
        let mut ports = ConfigPorts::new(Arc::clone(&bus), 0);
        let mut memory = ConfigMemory::new(Arc::clone(&bus));
        let mut window = Window::new(Arc::clone(&bus), 0xc000_0000);
        for (is_port, at, bytes, value) in accesses {
            let value = value.to_le_bytes();
            let mut data = [0xff; 8];
            if is_port {
                let port = u16::try_from(at % 8).unwrap();
                let bytes = bytes.min(4).min(8 - usize::from(port));
                let _ = ports.write(port, &value[..bytes]);
                ports.read(port, &mut data[..bytes]);
            } else {
                let _ = memory.write((at % (1 << 20)).into(), &value[..bytes]);
                memory.read((at % (1 << 20)).into(), &mut data[..bytes]);
                let _ = window.write(at.into(), &value[..bytes]);
                window.read(at.into(), &mut data[..bytes]);
            }
        }
        let mut head = [0; 4];
        let at = ConfigAddress { bus: 0, slot: 3, function: 0, offset: 0 };
        bus.read_config(at, &mut head);
        prop_assert_eq!(u32::from_le_bytes(head), 0x5678_1234);
    }
}
