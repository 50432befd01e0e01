#![forbid(unsafe_code)]
//! Guests, and programs of the host, that mean harm to connections.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;

use super::driver::{RAM_BYTES, VERSION_1};
use super::vsock_guest::{Guest, Packet, REQUEST, RESPONSE, TX, TX_BUFFER};

#[derive(Debug, Clone)]
enum Step {
    /// A packet that may be one, and a length in its head that may be wrong.
    Packet(Packet, Option<u32>),
    /// Room of any form, in any queue.
    Room(usize, Vec<(u64, u32, bool)>),
    /// Any bytes where rings and packets are.
    Memory(u64, Vec<u8>),
    /// Any access to registers.
    Register(u64, usize, u64),
    SetUp,
    PauseAndResume,
    /// A program of the host that says this first.
    Connect(Vec<u8>),
    /// All programs of the host send, or read what there is, or go.
    Write(usize),
    Read,
    Go,
}

fn packet() -> impl Strategy<Value = Packet> {
    let ports = (
        0_u32..3,
        prop_oneof![98_u32..100, (1_u32 << 30)..(1 << 30) + 3],
    );
    let counts = (
        prop_oneof![0_u32..5000, any::<u32>()],
        prop_oneof![0_u32..5000, any::<u32>()],
    );
    let data = proptest::collection::vec(any::<u8>(), 0..600);
    (ports, 0_u16..9, 0_u32..5, counts, data).prop_map(|(ports, op, flags, (room, read), data)| {
        Packet {
            flags,
            room,
            read,
            data,
            ..Packet::new(op, ports)
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        3 => 0x2_0000_u64..0x3_0000,
        1 => RAM_BYTES - 64..RAM_BYTES + 64,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![3 => 0_u32..5000, 1 => any::<u32>()];
    let piece = (address, length, any::<bool>());
    let greeting = prop_oneof![
        (0_u32..3).prop_map(|port| format!("CONNECT {port}\n").into_bytes()),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    prop_oneof![
        8 => (packet(), proptest::option::of(any::<u32>())).prop_map(|(p, l)| Step::Packet(p, l)),
        4 => (0_usize..3, proptest::collection::vec(piece, 1..4)).prop_map(|(q, p)| Step::Room(q, p)),
        1 => (0x1000_u64..0xa000, proptest::collection::vec(any::<u8>(), 1..32))
            .prop_map(|(at, bytes)| Step::Memory(at, bytes)),
        1 => (0_u64..0x8000, 1_usize..=8, any::<u64>()).prop_map(|(o, b, v)| Step::Register(o, b, v)),
        1 => Just(Step::SetUp),
        1 => Just(Step::PauseAndResume),
        2 => greeting.prop_map(Step::Connect),
        2 => (1_usize..10_000).prop_map(Step::Write),
        2 => Just(Step::Read),
        1 => Just(Step::Go),
    ]
}

/// Programs of the host.
struct Programs {
    dir: tempfile::TempDir,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Programs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("v_99")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            dir,
            listener,
            streams: Vec::new(),
        }
    }

    fn add(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        self.streams.push(stream);
    }

    fn take(&mut self, step: &Step) {
        while let Ok((stream, _)) = self.listener.accept() {
            self.add(stream);
        }
        match step {
            Step::Connect(greeting) => {
                let mut stream = UnixStream::connect(self.dir.path().join("v")).unwrap();
                stream.write_all(greeting).unwrap();
                self.add(stream);
            }
            // Whether the other end takes it, has something, or is there, is its business.
            Step::Write(bytes) => {
                for stream in &mut self.streams {
                    let _ = stream.write(&vec![1; *bytes]);
                }
            }
            Step::Read => {
                for stream in &mut self.streams {
                    let _ = stream.read(&mut [0; 10_000]);
                }
            }
            Step::Go => self.streams.clear(),
            _ => (),
        }
    }
}

fn take(guest: &mut Guest, step: Step) {
    let driver = &mut guest.rings.driver;
    match step {
        Step::Packet(packet, length) => {
            let mut bytes = packet.bytes();
            if let Some(length) = length {
                bytes[24..28].copy_from_slice(&length.to_le_bytes());
            }
            driver.ram.write(TX_BUFFER, &bytes).unwrap();
            let length = u32::try_from(bytes.len()).unwrap();
            guest.rings.offer(TX, &[(TX_BUFFER, length, false)]);
            guest.rings.kick(TX);
        }
        Step::Room(queue, pieces) => {
            guest.rings.offer(queue, &pieces);
            guest.rings.kick(queue);
        }
        Step::Memory(at, bytes) => driver.ram.write(at, &bytes).unwrap(),
        Step::Register(offset, bytes, value) => {
            driver.write(offset, bytes, value);
            driver.read(offset, bytes);
        }
        Step::SetUp => {
            guest.rings.set_up(VERSION_1);
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
    fn connections_outlive_any_guest_and_any_program(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let mut programs = Programs::new();
        let mut guest = Guest::new(&programs.dir.path().join("v"));
        for step in steps {
            programs.take(&step);
            take(&mut guest, step);
        }
        // Programs that have come and not said where they want to go would be first.
        programs.streams.clear();
        guest.rings.driver.write(20, 1, 0);
        guest.settle();
        guest.set_up(VERSION_1);
        let mut stream = UnixStream::connect(programs.dir.path().join("v")).unwrap();
        writeln!(stream, "CONNECT 1000").unwrap();
        let request = loop {
            let packet = guest.receive();
            if (packet.op, packet.ports.1) == (REQUEST, 1000) {
                break packet;
            }
        };
        guest.send(&Packet::new(RESPONSE, (1000, request.ports.0)));
        let mut line = [0; 3];
        stream.read_exact(&mut line).unwrap();
        prop_assert_eq!(&line, b"OK ");
    }
}
