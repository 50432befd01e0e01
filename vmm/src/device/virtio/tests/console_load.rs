#![forbid(unsafe_code)]
//! Ports under load: nothing is lost, repeated or out of order, and nobody is busy for nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::console_guest::{Guest, PORT_OPEN, device, rx, tx};

/// How much goes each way.
const BYTES: usize = 1 << 20;
/// How much the guest sends at once.
const PIECE: usize = 40_000;

/// Bytes that are nowhere the same for long.
fn pattern() -> Vec<u8> {
    let words = (0..BYTES / 4).map(|at| u32::try_from(at).unwrap());
    words
        .flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

#[test]
fn a_machine_that_is_stopped_under_load_loses_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let stream = UnixStream::connect(dir.path().join("1")).unwrap();
    assert_eq!(guest.hear(), (1, PORT_OPEN, 1, String::new()));
    let mut to = stream.try_clone().unwrap();
    let writer = thread::spawn(move || to.write_all(&pattern()).unwrap());
    let mut from = stream;
    let reader = thread::spawn(move || {
        let mut all = vec![0; BYTES];
        // Slower than the guest: in small pieces.
        for piece in all.chunks_mut(3000) {
            from.read_exact(piece).unwrap();
        }
        all
    });
    let (sent, mut received) = (pattern(), Vec::new());
    let mut pieces = sent.chunks(PIECE);
    let (mut under_way, mut steps) = (0, 0_usize);
    while received.len() < BYTES || under_way > 0 || pieces.len() > 0 {
        steps += 1;
        // One at a time: they have one place in memory.
        if under_way == 0
            && let Some(piece) = pieces.next()
        {
            guest.send_to(tx(1), piece);
            under_way += 1;
        }
        if guest.rings.next(tx(1)).is_some() {
            under_way -= 1;
        }
        if received.len() < BYTES && steps % 2 == 0 {
            received.extend(guest.receive(1));
        }
        if steps % 16 == 0 {
            guest.settle();
        }
    }
    writer.join().unwrap();
    assert!(received == sent, "what the host sent is not what came");
    let heard = reader.join().unwrap();
    assert!(heard == sent, "what the guest sent is not what came");
}

/// Whether something would wake the device's thread.
fn is_awake(guest: &Guest) -> bool {
    let worker = guest.rings.driver.device.worker();
    let source = worker.with_core(|core| core.source()).unwrap();
    let mut watched = [PollFd::new(&*source, PollFlags::IN)];
    poll(&mut watched, Some(&Timespec::default())).unwrap() > 0
}

#[test]
fn a_guest_without_room_and_a_host_that_does_not_read_keep_nobody_awake() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let mut program = UnixStream::connect(dir.path().join("1")).unwrap();
    assert_eq!(guest.hear(), (1, PORT_OPEN, 1, String::new()));
    // More than the guest has room for, and somebody else at the door.
    program.write_all(&[1; 8000]).unwrap();
    let _other = UnixStream::connect(dir.path().join("1")).unwrap();
    for _ in 0..12 {
        guest.send_to(tx(1), &[2; 48 << 10]);
    }
    for _ in 0..4 {
        guest.rings.wait(rx(1));
    }
    guest.settle();
    guest.settle();
    assert!(!is_awake(&guest));
    // A program that is gone, whose last bytes nobody takes.
    drop(program);
    guest.settle();
    guest.settle();
    assert!(!is_awake(&guest));
}
