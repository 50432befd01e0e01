#![forbid(unsafe_code)]
//! Guests, and programs of the host, that mean harm to ports.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use proptest::prelude::*;

use super::console_guest::{
    CONTROL_RX, CONTROL_TX, DEVICE_READY, Guest, MULTIPORT, PORT_OPEN, PORT_READY, QUEUES, device,
};
use super::driver::{EVENT_INDEX, RAM_BYTES, VERSION_1};

#[derive(Debug, Clone)]
enum Step {
    /// A control message, so many times.
    Control(u32, u16, u16, usize),
    /// A request of any form, in any queue.
    Offer(usize, Vec<(u64, u32, bool)>),
    /// Any bytes where rings and buffers are.
    Memory(u64, Vec<u8>),
    /// Any access to registers.
    Register(u64, usize, u64),
    SetUp(bool, bool),
    PauseAndResume,
    /// A program of the host comes to a port.
    Connect(u8),
    /// All programs of the host send, or read what there is, or go.
    Write(usize),
    Read,
    Go,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        3 => 0x4_0000_u64..0xa_0000,
        1 => RAM_BYTES - 64..RAM_BYTES + 64,
        1 => any::<u64>(),
    ];
    // A request may have 32 MiB, of memory that is there over and over.
    let length = prop_oneof![3 => 0_u32..5000, 2 => 0_u32..1 << 19, 1 => any::<u32>()];
    let piece = (address, length, any::<bool>());
    let port = prop_oneof![0_u32..4, any::<u32>()];
    let event = prop_oneof![0_u16..9, any::<u16>()];
    prop_oneof![
        4 => (port, event, 0_u16..3, 1_usize..40).prop_map(|(p, e, v, n)| Step::Control(p, e, v, n)),
        6 => (0..QUEUES, proptest::collection::vec(piece, 1..8)).prop_map(|(q, p)| Step::Offer(q, p)),
        1 => (0x1000_u64..0x1_9000, proptest::collection::vec(any::<u8>(), 1..32))
            .prop_map(|(at, bytes)| Step::Memory(at, bytes)),
        1 => (0_u64..0x8000, 1_usize..=8, any::<u64>()).prop_map(|(o, b, v)| Step::Register(o, b, v)),
        1 => any::<(bool, bool)>().prop_map(|(ports, index)| Step::SetUp(ports, index)),
        1 => Just(Step::PauseAndResume),
        2 => (0_u8..3).prop_map(Step::Connect),
        2 => (1_usize..10_000).prop_map(Step::Write),
        2 => Just(Step::Read),
        1 => Just(Step::Go),
    ]
}

fn connect(dir: &Path, port: u8) -> UnixStream {
    let stream = UnixStream::connect(dir.join(port.to_string())).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

fn take(guest: &mut Guest, step: Step) {
    let driver = &mut guest.rings.driver;
    match step {
        Step::Control(port, event, value, times) => {
            let mut message = port.to_le_bytes().to_vec();
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            for _ in 0..times {
                guest.send_to(CONTROL_TX, &message);
            }
        }
        Step::Offer(queue, pieces) => {
            guest.rings.offer(queue, &pieces);
            guest.rings.kick(queue);
        }
        Step::Memory(at, bytes) => driver.ram.write(at, &bytes).unwrap(),
        Step::Register(offset, bytes, value) => {
            driver.write(offset, bytes, value);
            driver.read(offset, bytes);
        }
        Step::SetUp(knows_ports, has_index) => {
            let ports = if knows_ports { MULTIPORT } else { 0 };
            let index = if has_index { EVENT_INDEX } else { 0 };
            guest.rings.set_up(VERSION_1 | ports | index);
        }
        Step::PauseAndResume => {
            driver.device.worker().pause();
            driver.device.worker().resume();
        }
        Step::Connect(_) | Step::Write(_) | Step::Read | Step::Go => (),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn ports_outlive_any_guest_and_any_program(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut programs: Vec<UnixStream> = Vec::new();
        let mut guest = Guest::new(device(dir.path()));
        for step in steps {
            match &step {
                Step::Connect(port) => programs.push(connect(dir.path(), *port)),
                // Whether the other end takes it, has something, or is there, is its business.
                Step::Write(bytes) => {
                    for program in &mut programs {
                        let _ = program.write(&vec![1; *bytes]);
                    }
                }
                Step::Read => {
                    for program in &mut programs {
                        let _ = program.read(&mut [0; 10_000]);
                    }
                }
                Step::Go => programs.clear(),
                _ => (),
            }
            take(&mut guest, step);
        }
        programs.clear();
        guest.rings.driver.write(20, 1, 0);
        guest.settle();
        guest.set_up();
        guest.control(0, DEVICE_READY, 1);
        guest.control(1, PORT_READY, 1);
        guest.control(1, PORT_OPEN, 1);
        let mut program = UnixStream::connect(dir.path().join("1")).unwrap();
        program.write_all(b"alive").unwrap();
        // Programs that have come and gone are before it.
        while guest.hear() != (1, PORT_OPEN, 1, String::new()) {}
        while guest.receive(1) != b"alive" {}
        guest.send(1, b"well");
        let mut answer = [0; 4];
        program.read_exact(&mut answer).unwrap();
        prop_assert_eq!(&answer, b"well");
        prop_assert!(guest.rings.next(CONTROL_RX).is_none_or(|(_, length)| length >= 8));
    }
}
