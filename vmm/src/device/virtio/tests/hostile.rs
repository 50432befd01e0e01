#![forbid(unsafe_code)]
//! Guests that mean harm, or that are broken: whatever is in registers and queues, a device neither
//! panics nor works without end, and it is as good as new after a reset.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::console_guest::device;
use super::driver::{BUFFERS, Driver, EVENT_INDEX, RAM_BYTES, VERSION_1};
use super::requests::{block, image};
use crate::device::pci::bus::PciFunction;
use crate::device::virtio::rng::device::Rng;
use crate::spec::DiskAccess;

#[derive(Debug, Clone)]
enum Step {
    /// Any access to registers.
    Register(u64, usize, u64),
    /// Any access to configuration.
    Config(usize, usize, u32),
    /// Any bytes anywhere in RAM.
    Memory(u64, Vec<u8>),
    /// A request of any form.
    Offer(Vec<(u64, u32, bool)>),
    /// A head that may not exist.
    Head(u16),
    Kick(u64),
    SetUp(bool),
    PauseAndResume,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => BUFFERS..BUFFERS + 0x4000,
        1 => RAM_BYTES - 64..RAM_BYTES + 64,
        1 => any::<u64>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![3 => 0_u32..2048, 1 => any::<u32>()];
    let piece = (address(), length, any::<bool>());
    let register = prop_oneof![0_u64..56, 0_u64..0x8000];
    prop_oneof![
        3 => (register, 1_usize..=8, any::<u64>()).prop_map(|(o, b, v)| Step::Register(o, b, v)),
        1 => (0_usize..256, 1_usize..=4, any::<u32>()).prop_map(|(o, b, v)| Step::Config(o, b, v)),
        // The rings, the descriptors and the requests.
        2 => (0x1000_u64..BUFFERS + 0x100, proptest::collection::vec(any::<u8>(), 1..32))
            .prop_map(|(at, bytes)| Step::Memory(at, bytes)),
        4 => proptest::collection::vec(piece, 1..6).prop_map(Step::Offer),
        1 => any::<u16>().prop_map(Step::Head),
        4 => (0_u64..4).prop_map(Step::Kick),
        2 => any::<bool>().prop_map(Step::SetUp),
        1 => Just(Step::PauseAndResume),
    ]
}

fn take(driver: &mut Driver, step: Step) {
    match step {
        Step::Register(offset, bytes, value) => {
            driver.write(offset, bytes, value);
            driver.read(offset, bytes);
        }
        Step::Config(offset, bytes, value) => {
            driver
                .device
                .write_config(offset, &value.to_le_bytes()[..bytes]);
            let mut data = [0; 4];
            driver.device.read_config(offset, &mut data);
        }
        Step::Memory(at, bytes) => driver.ram.write(at, &bytes).unwrap(),
        Step::Offer(pieces) => {
            driver.offer(&pieces);
        }
        Step::Head(head) => driver.make_available(head),
        Step::Kick(queue) => driver.write(0x3000 + queue * 4, 2, queue),
        Step::SetUp(has_event_index) => {
            let more = if has_event_index { EVENT_INDEX } else { 0 };
            driver.set_up(VERSION_1 | more);
        }
        Step::PauseAndResume => {
            driver.device.worker().pause();
            driver.device.worker().resume();
        }
    }
}

/// A device that went through anything works again.
fn is_as_good_as_new(driver: &mut Driver, check: impl FnOnce(&mut Driver)) {
    driver.write(20, 1, 0);
    driver.device.worker().pause();
    driver.device.worker().resume();
    driver.ram.write(0x1000, &[0; 0x3000]).unwrap();
    assert_eq!(driver.set_up(VERSION_1), 0xf);
    // Interrupts of before.
    check(driver);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn entropy_outlives_any_guest(steps in proptest::collection::vec(step(), 1..60)) {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.set_up(VERSION_1);
        for step in steps {
            take(&mut driver, step);
        }
        is_as_good_as_new(&mut driver, |driver| {
            driver.offer(&[(BUFFERS, 32, true)]);
            driver.kick();
            driver.device.worker().pause();
            assert_eq!(driver.used(), [(0, 32)]);
        });
    }

    #[test]
    fn a_console_outlives_any_guest(steps in proptest::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(device(dir.path()));
        driver.device.worker().resume();
        driver.set_up(VERSION_1);
        for step in steps {
            take(&mut driver, step);
        }
        is_as_good_as_new(&mut driver, |driver| {
            let mut program = UnixStream::connect(dir.path().join("0")).unwrap();
            program.write_all(b"alive").unwrap();
            driver.offer(&[(BUFFERS, 32, true)]);
            driver.kick();
            let deadline = Instant::now() + Duration::from_secs(20);
            let used = loop {
                match driver.used() {
                    used if !used.is_empty() => break used,
                    _ => assert!(Instant::now() < deadline, "it has come to nothing"),
                }
                sleep(Duration::from_millis(1));
            };
            assert_eq!(used, [(0, 5)]);
        });
    }

    #[test]
    fn a_disk_outlives_any_guest(
        steps in proptest::collection::vec(step(), 1..60),
        is_layered: bool,
    ) {
        let file = image();
        let before = std::fs::read(file.path()).unwrap();
        let access = if is_layered { DiskAccess::Snapshot } else { DiskAccess::Write };
        let mut driver = Driver::new(block(&file, access));
        driver.set_up(VERSION_1);
        for step in steps {
            take(&mut driver, step);
        }
        is_as_good_as_new(&mut driver, |driver| {
            driver.ram.write(BUFFERS, &[0; 16]).unwrap();
            let pieces = [(BUFFERS, 16, false), (BUFFERS + 0x1000, 512, true), (BUFFERS + 16, 1, true)];
            driver.offer(&pieces);
            driver.kick();
            driver.device.worker().pause();
            assert_eq!(driver.used(), [(0, 513)]);
        });
        let after = std::fs::read(file.path()).unwrap();
        prop_assert_eq!(after.len(), before.len());
        prop_assert!(!is_layered || after == before);
    }
}

#[test]
fn a_ring_that_promises_too_much_stops_the_device_until_it_is_reset() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    driver.set_up(VERSION_1);
    driver.ram.write(0x2002, &1000_u16.to_le_bytes()).unwrap();
    driver.kick();
    // The interrupt of the configuration.
    assert_eq!(driver.wait(), 0x40);
    assert_eq!(driver.read(20, 1), 0x4f, "it needs a reset");
    driver.ram.write(0x2000, &[0; 4]).unwrap();
    driver.kick();
    assert_eq!(driver.set_up(VERSION_1), 0xf);
    assert_eq!(driver.ask(&[(BUFFERS, 8, true)]), 8);
}

#[test]
fn rings_outside_ram_stop_the_device() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    driver.set_up(VERSION_1);
    driver.write(20, 1, 0);
    for (offset, address) in [(32, 0x1000), (40, RAM_BYTES - 16), (48, u64::MAX - 3)] {
        driver.write(offset, 4, address);
        driver.write(offset + 4, 4, address >> 32);
    }
    for (offset, bytes, value) in [
        (16, 2, 0),
        (28, 2, 1),
        (8, 4, 1),
        (12, 4, 1),
        (20, 1, 0xb),
        (20, 1, 0xf),
    ] {
        driver.write(offset, bytes, value);
    }
    driver.kick();
    assert_eq!(driver.wait(), 0x40);
    assert_eq!(driver.read(20, 1) & 0x40, 0x40);
}

#[test]
fn a_chain_without_end_is_one_request() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    driver.set_up(VERSION_1);
    let head = driver.offer(&[(BUFFERS, 8, true), (BUFFERS + 8, 8, true)]);
    // The second is followed by the first.
    let flags_and_next = [3, 0, head.to_le_bytes()[0], 0];
    driver.ram.write(0x1000 + 16 + 12, &flags_and_next).unwrap();
    driver.kick();
    while driver.used().is_empty() {
        driver.wait();
    }
}

#[test]
fn a_reset_while_requests_run_ends_them() {
    let file = image();
    let mut driver = Driver::new(block(&file, DiskAccess::Snapshot));
    for _ in 0..50 {
        driver.set_up(VERSION_1);
        driver.ram.write(0x1000, &[0; 0x3000]).unwrap();
        driver.ram.write(BUFFERS, &[0; 16]).unwrap();
        for _ in 0..4 {
            let pieces = [
                (BUFFERS, 16, false),
                (BUFFERS + 0x1000, 16384, true),
                (BUFFERS + 16, 1, true),
            ];
            driver.offer(&pieces);
        }
        driver.kick();
        driver.write(20, 1, 0);
        assert_eq!(driver.read(20, 1), 0);
    }
}
