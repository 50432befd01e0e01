#![forbid(unsafe_code)]
//! A network device on a real tap in a network namespace of its own: packets both ways, room that is
//! too small, commands, and what changes when a guest goes on elsewhere.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::driver::{ADDRESS, BUFFERS, Driver, VERSION_1};
use crate::device::virtio::net::backend::{NetConnection, NetPort, Tap};
use crate::device::virtio::net::device::Net;
use crate::device::virtio::net::request::HEAD_BYTES;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::spec::{MacAddress, TapSpec};

const LIMIT: Duration = Duration::from_secs(20);
pub(super) const MERGE: u64 = 1 << 15;
pub(super) const ANNOUNCE: u64 = 1 << 21 | 1 << 17 | 1 << 16;
pub(super) const QUEUE_SIZE: u16 = 16;
/// Where queue `n` has its rings, `n` times [`QUEUE_STEP`] further.
pub(super) const RINGS: u64 = 0x1000;
pub(super) const QUEUE_STEP: u64 = 0x4000;
pub(super) const HOST: &str = "10.55.0.1";
pub(super) const GUEST: &str = "10.55.0.2";
pub(super) const MAC: &str = "02:00:00:00:00:07";

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words:?}: {error}");
}

/// A network namespace with a tap; it goes with this.
pub(super) struct Namespace {
    name: String,
}

impl Namespace {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("pando-{}-{number}", std::process::id());
        ip(&["netns", "add", &name]);
        let namespace = Self { name };
        let inside = ["-n", &namespace.name];
        let run = |words: &[&str]| ip(&[&inside, words].concat());
        run(&["tuntap", "add", "dev", "tap0", "mode", "tap"]);
        run(&["address", "add", &format!("{HOST}/24"), "dev", "tap0"]);
        // Or the host says something of its own there, now and then.
        run(&["link", "set", "tap0", "addrgenmode", "none"]);
        run(&["link", "set", "tap0", "up"]);
        run(&["neighbour", "add", GUEST, "lladdr", MAC, "dev", "tap0"]);
        namespace
    }

    pub(super) fn connection(&self) -> NetConnection {
        let spec = TapSpec::new("tap0", Some(&self.name)).unwrap();
        let tap = Tap::open(&spec).unwrap();
        self.wait_until_up();
        NetConnection {
            tap: Some(tap),
            mac: None,
            limits: None,
        }
    }

    /// The kernel sees a while later that there is somebody at the tap, and loses what is sent until then.
    fn wait_until_up(&self) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let show = ["-n", &self.name, "-o", "link", "show", "tap0"];
            let output = Command::new("ip").args(show).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if text.contains("state UP") {
                return;
            }
            assert!(Instant::now() < deadline, "{text}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// A socket of the host's side.
    pub(super) fn socket(&self) -> UdpSocket {
        let path = format!("/run/netns/{}", self.name);
        let inside = thread::spawn(move || {
            let file = File::open(path).unwrap();
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            UdpSocket::bind((HOST, 5555)).unwrap()
        });
        let socket = inside.join().unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

pub(super) fn net(connection: NetConnection) -> Box<Net> {
    let port = NetPort::default();
    port.put(connection);
    Box::new(Net::new(MAC.parse().unwrap(), port))
}

/// A driver of a device with several queues.
pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) next: [u16; 3],
}

impl Guest {
    pub(super) fn new(connection: NetConnection) -> Self {
        Self {
            driver: Driver::new(net(connection)),
            next: [0; 3],
        }
    }

    /// Sets all queues up. Interrupts are not used: answers are looked for.
    pub(super) fn set_up(&mut self, features: u64) {
        let driver = &mut self.driver;
        for status in [0, 1, 3] {
            driver.write(20, 1, status);
        }
        for half in 0..2 {
            driver.write(8, 4, half);
            driver.write(12, 4, (features | VERSION_1) >> (32 * half));
        }
        driver.write(20, 1, 0xb);
        for queue in 0..3 {
            driver.write(22, 2, queue);
            driver.write(24, 2, QUEUE_SIZE.into());
            let rings = RINGS + queue * QUEUE_STEP;
            driver.ram.write(rings, &[0; 0x3000]).unwrap();
            for (register, offset) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
                driver.write(register, 4, rings + offset);
                driver.write(register + 4, 4, 0);
            }
            driver.write(28, 2, 1);
        }
        driver.write(20, 1, 0xf);
        assert_eq!(driver.read(20, 1), 0xf);
        self.next = [0; 3];
    }

    /// Makes a request of one piece for each of `pieces` available: no descriptor is used twice.
    pub(super) fn offer(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) {
        let rings = RINGS + queue as u64 * QUEUE_STEP;
        let ram = &self.driver.ram;
        let first = self.next[queue];
        for (at, &(address, bytes, is_writable)) in (first..).zip(pieces) {
            let has_next = usize::from(at - first) + 1 < pieces.len() && queue == 2;
            let flags = u16::from(has_next) | u16::from(is_writable) << 1;
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(bytes.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((at + 1).to_le_bytes());
            ram.write(rings + u64::from(at) * 16, &descriptor).unwrap();
        }
        let heads = if queue == 2 { 1 } else { pieces.len() };
        let mut available = [0; 2];
        ram.read(rings + 0x1002, &mut available).unwrap();
        let mut index = u16::from_le_bytes(available);
        for head in (first..).take(heads) {
            let slot = rings + 0x1004 + u64::from(index) * 2;
            ram.write(slot, &head.to_le_bytes()).unwrap();
            index += 1;
        }
        ram.write(rings + 0x1002, &index.to_le_bytes()).unwrap();
        self.next[queue] += u16::try_from(pieces.len()).unwrap();
        self.driver
            .write(0x3000 + queue as u64 * 4, 2, queue as u64);
    }

    /// What was used so far.
    pub(super) fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let rings = RINGS + queue as u64 * QUEUE_STEP;
        let mut index = [0; 2];
        self.driver.ram.read(rings + 0x2002, &mut index).unwrap();
        let word = |at: u64| {
            let mut word = [0; 4];
            self.driver.ram.read(at, &mut word).unwrap();
            u32::from_le_bytes(word)
        };
        (0..u64::from(u16::from_le_bytes(index)))
            .map(|slot| rings + 0x2004 + slot * 8)
            .map(|at| (word(at), word(at + 4)))
            .collect()
    }

    /// Waits until a queue has so many answers.
    pub(super) fn wait(&self, queue: usize, answers: usize) -> Vec<(u32, u32)> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let used = self.used(queue);
            if used.len() >= answers {
                return used;
            }
            assert!(Instant::now() < deadline, "{used:?} of queue {queue}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub(super) fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.driver.ram.read(at, &mut bytes).unwrap();
        bytes
    }

    /// A command; what the device answers.
    pub(super) fn command(&mut self, bytes: &[u8]) -> u8 {
        let at = BUFFERS + 0x8000;
        self.driver.ram.write(at, bytes).unwrap();
        self.driver.ram.write(at + 0x100, &[0xff]).unwrap();
        let before = self.used(2).len();
        let length = u32::try_from(bytes.len()).unwrap();
        self.offer(2, &[(at, length, false), (at + 0x100, 1, true)]);
        self.wait(2, before + 1);
        self.bytes(at + 0x100, 1)[0]
    }

    pub(super) fn mac(&mut self) -> MacAddress {
        let mac = self.driver.read(0x2000, 4) | self.driver.read(0x2004, 2) << 32;
        MacAddress::new(mac.to_le_bytes()[..6].try_into().unwrap()).unwrap()
    }
}

/// A UDP datagram from guest to host, as Ethernet has it. The checksum may be left out.
pub(super) fn datagram(payload: &[u8]) -> Vec<u8> {
    let short = |length: usize| u16::try_from(length).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0];
    ip.extend(short(28 + payload.len()));
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    for address in [GUEST, HOST] {
        ip.extend(address.parse::<std::net::Ipv4Addr>().unwrap().octets());
    }
    let words = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0; HEAD_BYTES];
    packet.extend([0xff; 6]);
    packet.extend(MAC.parse::<MacAddress>().unwrap().bytes());
    packet.extend([8, 0]);
    packet.extend(ip);
    packet.extend([0x15, 0xb4, 0x15, 0xb3]);
    packet.extend(short(8 + payload.len()));
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

/// Whether a received packet has these bytes at its end.
pub(super) fn is_packet(packet: &[u8], payload: &[u8]) -> bool {
    packet.ends_with(payload)
}

#[test]
fn packets_go_both_ways() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let mut guest = Guest::new(namespace.connection());
    guest.set_up(MERGE);
    let packet = datagram(b"from the guest");
    guest.driver.ram.write(BUFFERS, &packet).unwrap();
    guest.offer(1, &[(BUFFERS, u32::try_from(packet.len()).unwrap(), false)]);
    let mut buffer = [0; 100];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"from the guest");
    assert_eq!(from.to_string(), format!("{GUEST}:5556"));
    assert_eq!(guest.wait(1, 1), [(0, 0)]);
    // No room yet: it waits.
    socket.send_to(b"to the guest", (GUEST, 7)).unwrap();
    guest.offer(0, &[(BUFFERS + 0x1000, 2048, true)]);
    let mut answers = 1;
    loop {
        let (_, bytes) = guest.wait(0, answers)[answers - 1];
        let packet = guest.bytes(BUFFERS + 0x1000, usize::try_from(bytes).unwrap());
        assert_eq!(packet[10..12], [1, 0], "one buffer");
        if is_packet(&packet, b"to the guest") {
            break;
        }
        // The host's own chatter.
        guest.offer(0, &[(BUFFERS + 0x1000, 2048, true)]);
        answers += 1;
    }
}

#[test]
fn a_packet_goes_over_as_many_buffers_as_it_needs_and_waits_for_them() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let mut guest = Guest::new(namespace.connection());
    guest.set_up(MERGE);
    let payload: Vec<u8> = (0..=255).cycle().take(1000).collect();
    socket.send_to(&payload, (GUEST, 7)).unwrap();
    let place = |number: u64| (BUFFERS + 0x1000 + number * 512, 512, true);
    guest.offer(0, &[place(0)]);
    // Too little for this packet; whatever the host says by itself is shorter than one buffer.
    for number in 1..8 {
        guest.offer(0, &[place(number)]);
    }
    let deadline = Instant::now() + LIMIT;
    let (first, used) = loop {
        let used = guest.used(0);
        let head = |at: usize| guest.bytes(place(u64::from(used[at].0)).0, HEAD_BYTES);
        if let Some(at) = (0..used.len()).find(|&at| head(at)[10] == 3 && used[at].1 == 512) {
            break (at, used);
        }
        assert!(Instant::now() < deadline, "{used:?}");
        thread::sleep(Duration::from_millis(2));
    };
    assert!(
        used.len() >= first + 3,
        "all buffers of a packet are shown at once"
    );
    let bytes: Vec<u8> = used[first..first + 3]
        .iter()
        .flat_map(|&(at, length)| guest.bytes(place(at.into()).0, usize::try_from(length).unwrap()))
        .collect();
    assert_eq!(bytes.len(), HEAD_BYTES + 14 + 28 + payload.len());
    assert!(is_packet(&bytes, &payload));
}

#[test]
fn a_buffer_that_is_too_short_gets_nothing() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let mut guest = Guest::new(namespace.connection());
    guest.set_up(0);
    guest.offer(0, &[(BUFFERS, 40, true)]);
    socket.send_to(&[7; 500], (GUEST, 7)).unwrap();
    assert_eq!(guest.wait(0, 1), [(0, 0)]);
    guest.offer(0, &[(BUFFERS, 2048, true)]);
    socket.send_to(&[7; 500], (GUEST, 7)).unwrap();
    let used = guest.wait(0, 2);
    assert!(used[1].1 > 0);
}

#[test]
fn commands_that_are_known_are_done() {
    let namespace = Namespace::new();
    let mut guest = Guest::new(namespace.connection());
    guest.set_up(ANNOUNCE | 1 << 23);
    assert_eq!(guest.mac().to_string(), MAC);
    let before = guest.driver.read(21, 1);
    assert_eq!(guest.command(&[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    assert_eq!(guest.mac().to_string(), "02:09:09:09:09:09");
    assert_ne!(guest.driver.read(21, 1), before, "a new generation");
    // A group's address, too short, another command, nothing.
    for wrong in [&[1, 1, 1, 0, 0, 0, 0, 0][..], &[1, 1, 2], &[9, 9], &[0]] {
        assert_eq!(guest.command(wrong), 1, "{wrong:?}");
    }
    guest.set_up(0);
    assert_eq!(guest.mac().to_string(), MAC, "a reset gives its own back");
}

#[test]
fn a_guest_that_goes_on_elsewhere_is_told_so() {
    let namespace = Namespace::new();
    let mut guest = Guest::new(namespace.connection());
    guest.set_up(MERGE | ANNOUNCE);
    assert_eq!(guest.driver.read(0x2006, 2), 1, "a cable is there");
    guest.driver.device.worker().pause();
    let state = guest.driver.device.save();
    let Guest { driver, next } = guest;
    // Its tap is free again with the first device.
    let ram = driver.ram.clone();
    drop(driver);
    let port = NetPort::default();
    let device = Box::new(Net::new(MAC.parse().unwrap(), port.clone()));
    let mut device = VirtioPci::new("dev0", 1, ADDRESS, device);
    device.restore(&state).unwrap();
    let driver = Driver::of(device, ram);
    let mut guest = Guest { driver, next };
    // Where its cable ends is known late.
    let mac: MacAddress = "02:00:00:00:00:99".parse().unwrap();
    port.put(NetConnection {
        mac: Some(mac),
        ..namespace.connection()
    });
    guest.driver.device.worker().resume();
    assert_eq!(guest.driver.read(0x1000, 1), 2, "the registers changed");
    assert_eq!(
        guest.driver.read(0x2006, 2),
        3,
        "it is to tell its neighbours"
    );
    assert_eq!(guest.mac(), mac);
    assert_eq!(guest.command(&[3, 0]), 0);
    assert_eq!(guest.driver.read(0x2006, 2), 1);
    // Packets come without a notification of the guest.
    let socket = namespace.socket();
    guest.offer(0, &[(BUFFERS, 2048, true), (BUFFERS + 0x800, 2048, true)]);
    socket.send_to(b"again", (GUEST, 7)).unwrap();
    guest.wait(0, 1);
    // Without a cable there is no link.
    guest.driver.device.worker().pause();
    port.put(NetConnection::default());
    guest.driver.device.worker().resume();
    assert_eq!(guest.driver.read(0x2006, 2), 0);
}

#[test]
fn a_tap_that_is_deleted_is_a_link_that_is_down() {
    let namespace = Namespace::new();
    let mut guest = Guest::new(namespace.connection());
    guest.set_up(MERGE | ANNOUNCE);
    assert_eq!(guest.driver.read(0x2006, 2), 1);
    let generation = guest.driver.read(21, 1);
    // A packet of the host's own that waits for room would have the tap left alone.
    guest.offer(0, &[(BUFFERS + 0x1000, 2048, true); 16]);
    ip(&["-n", &namespace.name, "link", "delete", "tap0"]);
    let deadline = Instant::now() + LIMIT;
    while guest.driver.read(0x2006, 2) != 0 {
        assert!(Instant::now() < deadline, "the link is up");
        thread::sleep(Duration::from_millis(2));
    }
    assert_ne!(guest.driver.read(21, 1), generation);
    // Its packets go nowhere, and are taken all the same.
    guest.offer(1, &[(BUFFERS, 64, false)]);
    guest.wait(1, 1);
}

#[test]
fn what_waited_at_the_tap_before_the_driver_is_not_delivered() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let connection = namespace.connection();
    socket.send_to(b"too early", (GUEST, 5555)).unwrap();
    let mut guest = Guest::new(connection);
    guest.set_up(MERGE);
    socket.send_to(b"in time", (GUEST, 5555)).unwrap();
    let place = |number: u64| BUFFERS + number * 2048;
    let room: Vec<_> = (0..16).map(|n| (place(n), 2048, true)).collect();
    guest.offer(0, &room);
    // The host's own chatter may come before it.
    for answers in 1..=16 {
        let (at, length) = guest.wait(0, answers)[answers - 1];
        let packet = guest.bytes(place(at.into()), usize::try_from(length).unwrap());
        assert!(!is_packet(&packet, b"too early"));
        if is_packet(&packet, b"in time") {
            return;
        }
    }
    panic!("it was not delivered");
}
