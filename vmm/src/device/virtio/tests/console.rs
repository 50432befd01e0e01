#![forbid(unsafe_code)]
//! Ports between a guest and programs of the host.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::console_guest::{
    CONTROL_RX, DEVICE_ADD, DEVICE_READY, Guest, MULTIPORT, PORT_OPEN, PORT_READY, device, parts,
    rx, tx, with_ends,
};
use super::driver::VERSION_1;
use super::rings::Rings;
use crate::device::virtio::console::backend::{ConsolePort, PortEnd};
use crate::device::virtio::console::device::Console;
use crate::device::virtio::device::VirtioDevice;
use crate::spec::PortTarget;

fn connect(dir: &Path, port: u32) -> UnixStream {
    let stream = UnixStream::connect(dir.join(port.to_string())).unwrap();
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).unwrap();
    stream
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn opened(port: u32, is_open: u16) -> (u32, u16, u16, String) {
    (port, PORT_OPEN, is_open, String::new())
}

#[test]
fn the_guest_is_told_of_ports_their_names_and_who_has_them_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let driver = &mut guest.rings.driver;
    assert_eq!(driver.offered() & MULTIPORT, MULTIPORT);
    assert_eq!(driver.read(0x2004, 4), 3, "number of ports");
    assert_eq!(driver.read(18, 2), 8, "number of queues");
    assert!(guest.is_silent(CONTROL_RX));
    let _program = connect(dir.path(), 1);
    assert_eq!(guest.hear(), opened(1, 1));
    // Ports that do not exist, events that are the device's, and a driver that failed.
    for (port, event, value) in [
        (3, PORT_READY, 1),
        (u32::MAX, PORT_OPEN, 1),
        (1, DEVICE_ADD, 1),
        (1, PORT_READY, 0),
        (1, 9, 1),
        (0, DEVICE_READY, 0),
    ] {
        guest.control(port, event, value);
    }
    guest.send_to(3, &[1, 2, 3]);
    assert!(guest.is_silent(CONTROL_RX));
}

#[test]
fn bytes_go_both_ways_on_each_port_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    for port in 0..3 {
        let mut program = connect(dir.path(), port);
        assert_eq!(guest.hear(), opened(port, 1));
        let number = usize::try_from(port).unwrap();
        let text = format!("to port {port}");
        program.write_all(text.as_bytes()).unwrap();
        assert_eq!(guest.receive(number), text.as_bytes());
        guest.send(number, b"of the guest");
        assert_eq!(read(&mut program, 12), b"of the guest");
        // More than one request holds.
        let long: Vec<u8> = (0..1000_u32).flat_map(u32::to_le_bytes).collect();
        program.write_all(&long).unwrap();
        let mut received = Vec::new();
        while received.len() < long.len() {
            received.extend(guest.receive(number));
        }
        assert_eq!(received, long);
        // The last that a program says is before the news that it is gone.
        program.write_all(b"bye").unwrap();
        drop(program);
        assert_eq!(guest.receive(number), b"bye");
        assert_eq!(guest.hear(), opened(port, 0));
    }
}

#[test]
fn the_next_program_is_let_in_when_the_guest_has_heard_that_the_last_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let first = connect(dir.path(), 1);
    let mut second = connect(dir.path(), 1);
    assert_eq!(guest.hear(), opened(1, 1));
    second.write_all(b"second").unwrap();
    guest.send(1, b"first's");
    assert!(guest.is_silent(rx(1)));
    drop(first);
    assert_eq!(guest.hear(), opened(1, 0));
    assert_eq!(guest.hear(), opened(1, 1));
    assert_eq!(guest.receive(1), b"second");
    guest.send(1, b"x");
    assert_eq!(read(&mut second, 1), b"x");
}

#[test]
fn what_a_program_sends_waits_until_the_guest_has_the_port_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    guest.control(1, PORT_OPEN, 0);
    let mut program = connect(dir.path(), 1);
    program.write_all(b"early").unwrap();
    assert_eq!(guest.hear(), opened(1, 1));
    assert!(guest.is_silent(rx(1)));
    guest.control(1, PORT_OPEN, 1);
    assert_eq!(guest.receive(1), b"early");
    // With nobody to read it, it goes with the program that sent it.
    guest.control(1, PORT_OPEN, 0);
    program.write_all(b"late").unwrap();
    drop(program);
    assert_eq!(guest.hear(), opened(1, 0));
    guest.control(1, PORT_OPEN, 1);
    assert!(guest.is_silent(rx(1)));
}

#[test]
fn nothing_is_said_where_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    for port in 0..3 {
        guest.send(port, b"lost");
    }
    let mut program = connect(dir.path(), 0);
    assert_eq!(guest.hear(), opened(0, 1));
    guest.send(0, b"heard");
    assert_eq!(read(&mut program, 5), b"heard");
}

#[test]
fn a_serial_port_waits_for_its_host_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let mut program = connect(dir.path(), 1);
    assert_eq!(guest.hear(), opened(1, 1));
    // In one queue all descriptors name the same 48 KiB.
    let piece: Vec<u8> = (0..48 << 10).map(|at: u32| at.to_le_bytes()[0]).collect();
    for _ in 0..12 {
        guest.send_to(tx(1), &piece);
    }
    guest.settle();
    let mut taken = 0;
    while guest.rings.next(tx(1)).is_some() {
        taken += 1;
    }
    assert!(taken < 12, "a socket holds less");
    // Others go on, and so does this one after a pause.
    let mut other = connect(dir.path(), 2);
    assert_eq!(guest.hear(), opened(2, 1));
    guest.send(2, b"other");
    assert_eq!(read(&mut other, 5), b"other");
    guest.settle();
    for _ in 0..12 {
        assert_eq!(read(&mut program, piece.len()), piece);
    }
    while taken < 12 {
        guest.rings.wait(tx(1));
        taken += 1;
    }
    // With its program what waits for it is gone too.
    for _ in 0..12 {
        guest.send_to(tx(1), &piece);
    }
    guest.settle();
    drop(program);
    for _ in 0..12 {
        guest.rings.wait(tx(1));
    }
    assert_eq!(guest.hear(), opened(1, 0));
}

#[test]
fn what_a_host_had_no_room_for_is_not_for_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let mut program = connect(dir.path(), 1);
    assert_eq!(guest.hear(), opened(1, 1));
    for _ in 0..12 {
        guest.send_to(tx(1), &[b'x'; 48 << 10]);
    }
    guest.rings.driver.device.worker().pause();
    let mut taken = 0;
    while guest.rings.next(tx(1)).is_some() {
        taken += 1;
    }
    assert!(taken < 12, "a socket holds less");
    let other = tempfile::tempdir().unwrap();
    let mut guest = guest.moved(device(other.path()));
    // The guest is as free as where a host has gone.
    for _ in taken..12 {
        guest.rings.wait(tx(1));
    }
    assert_eq!(guest.hear(), opened(1, 0));
    let mut next = connect(other.path(), 1);
    assert_eq!(guest.hear(), opened(1, 1));
    guest.send(1, b"new");
    assert_eq!(read(&mut next, 3), b"new");
    // All that the frozen guest was told was sent is with its host.
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert!(all.len() >= taken * (48 << 10), "{}", all.len());
}

#[test]
fn a_console_never_makes_its_guest_wait() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let _program = connect(dir.path(), 0);
    assert_eq!(guest.hear(), opened(0, 1));
    for _ in 0..20 {
        guest.send(0, &[b'x'; 48 << 10]);
    }
}

#[test]
fn a_guest_that_knows_of_one_port_has_it_without_asking() {
    let dir = tempfile::tempdir().unwrap();
    let mut rings = Rings::new(device(dir.path()), 2);
    rings.driver.device.worker().resume();
    assert_eq!(rings.set_up(VERSION_1), 0xf);
    let mut guest = Guest { rings };
    let mut program = connect(dir.path(), 0);
    program.write_all(b"hello").unwrap();
    guest.rings.offer(0, &[(0x8_0000, 100, true)]);
    guest.rings.kick(0);
    assert_eq!(guest.rings.wait(0).1, 5);
    guest.send(0, b"console");
    assert_eq!(read(&mut program, 7), b"console");
    drop(program);
    let mut next = connect(dir.path(), 0);
    next.write_all(b"again").unwrap();
    guest.rings.offer(0, &[(0x8_0000, 100, true)]);
    guest.rings.kick(0);
    assert_eq!(guest.rings.wait(0).1, 5);
}

#[test]
fn a_file_and_nothing_are_open_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let file = PortEnd::open(&PortTarget::File(path.clone())).unwrap();
    let mut guest = Guest::open(with_ends(vec![(1, file), (2, PortEnd::Null)]));
    assert_eq!(guest.hear(), opened(1, 1));
    assert_eq!(guest.hear(), opened(2, 1));
    guest.send(1, b"kept");
    guest.send(2, b"gone");
    assert_eq!(std::fs::read(&path).unwrap(), b"kept");
    assert!(guest.is_silent(CONTROL_RX), "port 0 leads to nobody");
}

#[test]
fn a_stopped_machine_keeps_its_programs_and_a_saved_one_has_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::open(device(dir.path()));
    let mut program = connect(dir.path(), 1);
    assert_eq!(guest.hear(), opened(1, 1));
    guest.settle();
    guest.send(1, b"on");
    assert_eq!(read(&mut program, 2), b"on");
    // All that was taken when it stands still is with the host, though nobody has read it.
    for _ in 0..4 {
        guest.send_to(tx(1), b"0123456789");
    }
    program.write_all(b"not read yet").unwrap();
    assert_eq!(guest.receive(1), b"not read yet");
    guest.rings.driver.device.worker().pause();
    let other = tempfile::tempdir().unwrap();
    // Somebody is there before the machine goes on.
    let next = device(other.path());
    let mut early = connect(other.path(), 1);
    early.write_all(b"early").unwrap();
    let mut guest = guest.moved(next);
    for _ in 0..4 {
        guest.rings.wait(tx(1));
        assert_eq!(read(&mut program, 10), b"0123456789");
    }
    assert_eq!(guest.hear(), opened(1, 0));
    assert_eq!(guest.hear(), opened(1, 1));
    assert_eq!(guest.receive(1), b"early");
    guest.send(1, b"clone");
    assert_eq!(read(&mut early, 5), b"clone");
}

#[test]
fn what_the_guest_has_not_heard_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut rings = Rings::new(device(dir.path()), 8);
    rings.driver.device.worker().resume();
    assert_eq!(rings.set_up(VERSION_1 | MULTIPORT), 0xf);
    let mut guest = Guest { rings };
    // It gives no room, asks again and again, and is frozen.
    for _ in 0..100 {
        guest.control(0, DEVICE_READY, 1);
    }
    guest.rings.driver.device.worker().pause();
    let other = tempfile::tempdir().unwrap();
    let mut guest = guest.moved(device(other.path()));
    guest.give_all_room();
    for port in 0..3 {
        assert_eq!(guest.hear(), (port, DEVICE_ADD, 1, String::new()));
    }
    assert!(guest.is_silent(CONTROL_RX));
}

#[test]
fn a_state_of_other_ports_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::open(device(dir.path()));
    let state = guest.rings.driver.device.save().device;
    let refused = |change: fn(&mut crate::spec::ConsoleParts)| {
        let mut parts = parts();
        change(&mut parts);
        let mut console = Console::new(&parts, ConsolePort::default());
        console.restore(&state).unwrap_err().reason
    };
    let error = refused(|parts| parts.ports.truncate(2));
    assert_eq!(error, "it has 2 ports, the saved one has 3");
    let error = refused(|parts| parts.ports[1].name = None);
    assert!(
        error.starts_with("its port 1 is the serial port \"\""),
        "{error}"
    );
    let error = refused(|parts| parts.ports[2].is_console = true);
    assert!(
        error.contains("the saved one is number 2, the serial port"),
        "{error}"
    );
    let mut console = Console::new(&parts(), ConsolePort::default());
    for length in 0..state.len() {
        console.restore(&state[..length]).unwrap_err();
    }
    let mut long = state.clone();
    long.push(0);
    console.restore(&long).unwrap_err();
    console.restore(&state).unwrap();
}
