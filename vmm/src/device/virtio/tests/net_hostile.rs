#![forbid(unsafe_code)]
//! Guests that mean harm to their network device, or are broken: it neither panics nor works without end, and
//! is as good as new after a reset.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::driver::{BUFFERS, RAM_BYTES};
use super::net::{
    ANNOUNCE, GUEST, Guest, MERGE, Namespace, QUEUE_SIZE, QUEUE_STEP, RINGS, datagram, is_packet,
};

#[derive(Debug, Clone)]
enum Step {
    /// A request of any form in one of the queues.
    Offer(usize, Vec<(u64, u32, bool)>),
    /// Any bytes in the rings or in the requests.
    Memory(u64, Vec<u8>),
    /// Any access to registers.
    Register(u64, usize, u64),
    Kick(u64),
    SetUp(u64),
    /// Something comes from the host.
    FromHost(usize),
    PauseAndResume,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        3 => BUFFERS..BUFFERS + 0x4000,
        1 => RAM_BYTES - 64..RAM_BYTES + 64,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![3 => 0_u32..3000, 1 => any::<u32>()];
    let pieces = proptest::collection::vec((address, length, any::<bool>()), 1..6);
    let bytes = proptest::collection::vec(any::<u8>(), 1..40);
    let register = prop_oneof![0_u64..56, 0_u64..0x8000];
    let features = prop_oneof![Just(MERGE), Just(MERGE | ANNOUNCE), Just(0), any::<u64>()];
    prop_oneof![
        5 => (0_usize..3, pieces).prop_map(|(queue, pieces)| Step::Offer(queue, pieces)),
        2 => (RINGS..BUFFERS + 0x200, bytes).prop_map(|(at, bytes)| Step::Memory(at, bytes)),
        1 => (register, 1_usize..=8, any::<u64>()).prop_map(|(o, b, v)| Step::Register(o, b, v)),
        3 => (0_u64..4).prop_map(Step::Kick),
        2 => features.prop_map(Step::SetUp),
        2 => (0_usize..1400).prop_map(Step::FromHost),
        1 => Just(Step::PauseAndResume),
    ]
}

/// As the way to a working device, whose end is not looked at.
fn begin(guest: &mut Guest, features: u64) {
    let driver = &mut guest.driver;
    for status in [0, 1, 3] {
        driver.write(20, 1, status);
    }
    for half in 0..2 {
        driver.write(8, 4, half);
        driver.write(12, 4, (features | 1 << 32) >> (32 * half));
    }
    driver.write(20, 1, 0xb);
    for queue in 0..3 {
        driver.write(22, 2, queue);
        driver.write(24, 2, QUEUE_SIZE.into());
        for (register, offset) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
            driver.write(register, 4, RINGS + queue * QUEUE_STEP + offset);
            driver.write(register + 4, 4, 0);
        }
        driver.write(28, 2, 1);
    }
    driver.write(20, 1, 0xf);
}

fn take(guest: &mut Guest, step: Step, from_host: &dyn Fn(usize)) {
    let driver = &mut guest.driver;
    match step {
        Step::Offer(queue, pieces) => {
            guest.next[queue] %= QUEUE_SIZE;
            guest.offer(queue, &pieces);
        }
        Step::Memory(at, bytes) => driver.ram.write(at, &bytes).unwrap(),
        Step::Register(offset, bytes, value) => {
            driver.write(offset, bytes, value);
            driver.read(offset, bytes);
        }
        Step::Kick(queue) => driver.write(0x3000 + queue * 4, 2, queue),
        Step::SetUp(features) => begin(guest, features),
        Step::FromHost(bytes) => from_host(bytes),
        Step::PauseAndResume => {
            driver.device.worker().pause();
            driver.device.worker().resume();
        }
    }
}

#[test]
fn a_network_outlives_any_guest() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let steps = proptest::collection::vec(step(), 1..60);
    TestRunner::new(ProptestConfig::with_cases(48))
        .run(&steps, |steps| {
            let mut guest = Guest::new(namespace.connection());
            begin(&mut guest, MERGE);
            let from_host = |bytes: usize| drop(socket.send_to(&vec![3; bytes], (GUEST, 7)));
            for step in steps {
                take(&mut guest, step, &from_host);
            }
            // It works again, both ways.
            guest.driver.write(20, 1, 0);
            guest.set_up(MERGE);
            let packet = datagram(b"from the guest");
            guest.driver.ram.write(BUFFERS, &packet).unwrap();
            guest.offer(1, &[(BUFFERS, u32::try_from(packet.len()).unwrap(), false)]);
            let mut buffer = [0; 2000];
            loop {
                let (length, _) = socket.recv_from(&mut buffer).unwrap();
                if &buffer[..length] == b"from the guest" {
                    break;
                }
            }
            // All that the host has said before comes first.
            for count in 0..200 {
                prop_assert!(count < 199, "nothing but what came before");
                let place = count % usize::from(QUEUE_SIZE);
                if place == 0 {
                    guest.driver.write(20, 1, 0);
                    guest.set_up(MERGE);
                }
                socket.send_to(b"to the guest", (GUEST, 7)).unwrap();
                guest.offer(0, &[(BUFFERS + 0x1000, 2048, true)]);
                let (_, bytes) = guest.wait(0, place + 1)[place];
                let packet = guest.bytes(BUFFERS + 0x1000, usize::try_from(bytes).unwrap());
                if is_packet(&packet, b"to the guest") {
                    break;
                }
            }
            Ok(())
        })
        .unwrap();
}
