#![forbid(unsafe_code)]
//! Guests that are stopped, and that go on elsewhere, while connections are full of data.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use super::vsock_guest::{
    CID, CREDIT_REQUEST, CREDIT_UPDATE, DATA, EVENT, Guest, Packet, REQUEST, RESET, SHUTDOWN, TX,
    TX_BUFFER,
};
use super::vsock_host::{Host, connected, dialled, is_closed};

/// Bytes each way.
const TOTAL: usize = 1 << 20;
/// Bytes of a packet of the guest.
const CHUNK: usize = 4000;
/// What the guest may send before it hears of more room.
const ROOM: usize = 64 << 10;

/// Bytes that tell where they belong.
fn pattern(from: usize, bytes: usize) -> Vec<u8> {
    let numbers = (from..from + bytes).map(|at| u8::try_from(at % 251).unwrap());
    numbers.collect()
}

/// A program that sends as much as the other end takes while it reads all that comes; what that was.
fn program(stream: &UnixStream) -> (JoinHandle<()>, JoinHandle<Vec<u8>>) {
    let (mut to, mut from) = (stream.try_clone().unwrap(), stream.try_clone().unwrap());
    let writer = thread::spawn(move || {
        // Where the connection ends before, the other thread says what is missing.
        let _ = to.write_all(&pattern(0, TOTAL));
        let _ = to.shutdown(Shutdown::Write);
    });
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        all
    });
    (writer, reader)
}

/// A guest's side of a connection.
struct Load {
    ports: (u32, u32),
    sent: usize,
    /// How much the host has taken, as it says.
    taken: usize,
    received: Vec<u8>,
    /// The host sends no more.
    is_at_end: bool,
}

impl Load {
    fn new(ports: (u32, u32)) -> Self {
        Self {
            ports,
            sent: 0,
            taken: 0,
            received: Vec::new(),
            is_at_end: false,
        }
    }

    fn is_over(&self) -> bool {
        self.sent == TOTAL && self.is_at_end
    }

    /// Offers a packet, and stops the machine at once: when it stands, the packet was taken.
    fn step(&mut self, guest: &mut Guest) {
        let bytes = CHUNK
            .min(TOTAL - self.sent)
            .min(ROOM - (self.sent - self.taken));
        let op = if bytes > 0 { DATA } else { CREDIT_UPDATE };
        let mut packet = Packet::new(op, self.ports);
        packet.data = pattern(self.sent, bytes);
        packet.read = u32::try_from(self.received.len()).unwrap();
        self.sent += bytes;
        let bytes = packet.bytes();
        guest.rings.driver.ram.write(TX_BUFFER, &bytes).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        guest.rings.offer(TX, &[(TX_BUFFER, length, false)]);
        guest.rings.kick(TX);
        guest.rings.driver.device.worker().pause();
        assert!(guest.rings.next(TX).is_some(), "a request was left");
        guest.rings.driver.device.worker().resume();
        for packet in guest.settled() {
            assert_eq!(packet.ports, (self.ports.1, self.ports.0));
            self.taken = packet.read as usize;
            match packet.op {
                DATA => self.received.extend(packet.data),
                SHUTDOWN => self.is_at_end = true,
                // The next packet tells.
                op => assert!(matches!(op, CREDIT_UPDATE | CREDIT_REQUEST), "{op}"),
            }
        }
    }
}

#[test]
fn a_machine_that_is_stopped_under_load_loses_no_byte_and_no_request() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = host.listen(99);
    let (stream, ports) = dialled(&listener, &mut guest);
    let (writer, reader) = program(&stream);
    let mut load = Load::new(ports);
    while !load.is_over() {
        load.step(&mut guest);
    }
    assert!(
        load.received == pattern(0, TOTAL),
        "the guest has other bytes"
    );
    let mut end = Packet::new(SHUTDOWN, ports);
    end.flags = 3;
    guest.send(&end);
    writer.join().unwrap();
    assert!(
        reader.join().unwrap() == pattern(0, TOTAL),
        "the host has other bytes"
    );
    assert_eq!(guest.receive().op, RESET, "both directions are over");
}

#[test]
fn a_guest_that_goes_on_elsewhere_under_load_connects_anew() {
    let hosts: Vec<Host> = (0..5).map(|_| Host::new()).collect();
    let mut guest = Guest::new(&hosts[0].path());
    for (host, next) in hosts.iter().zip(&hosts[1..]) {
        let (mut stream, ports) = connected(host, &mut guest);
        let (writer, reader) = program(&stream);
        let mut load = Load::new(ports);
        while load.received.len() < TOTAL / 8 {
            load.step(&mut guest);
        }
        guest.rings.driver.device.worker().pause();
        guest = guest.moved(CID, &next.path());
        // To both sides the connection is gone.
        writer.join().unwrap();
        let taken = reader.join().unwrap();
        assert!(taken == pattern(0, taken.len()) && taken.len() <= load.sent);
        assert!(is_closed(&mut stream));
        assert_eq!(guest.rings.next(EVENT).map(|(_, bytes)| bytes), Some(4));
        // What the guest had been given already is whole; nothing comes behind it.
        for packet in guest.settled() {
            assert_eq!((packet.op, packet.ports), (DATA, (ports.1, ports.0)));
            load.received.extend(packet.data);
        }
        assert!(load.received == pattern(0, load.received.len()));
        assert_eq!(guest.settled(), []);
        guest.return_news();
    }
    let last = hosts.last().unwrap();
    let (mut stream, _) = connected(last, &mut guest);
    stream.write_all(b"on").unwrap();
    assert_eq!(guest.receive().data, b"on");
}

#[test]
fn a_program_that_lets_nobody_in_is_not_waited_for() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let path = host.path().with_file_name("v_99");
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    // As many as its queue holds.
    let mut port = 0;
    let refused = loop {
        guest.send(&Packet::new(REQUEST, (port, 99)));
        let answer = guest.receive();
        assert_eq!(answer.ports, (99, port));
        if answer.op == RESET {
            break port;
        }
        port += 1;
        assert!(port < 8, "its queue has one place");
    };
    assert!(refused > 0);
    // Registers answer, and others are served.
    assert_eq!(guest.rings.driver.read(0x2000, 8), u64::from(CID));
    connected(&host, &mut guest);
}
