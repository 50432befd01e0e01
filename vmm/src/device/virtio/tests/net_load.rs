#![forbid(unsafe_code)]
//! A network device under load: offloads as they were negotiated, a source that is left alone while there is
//! no room, and a freeze that loses and repeats no buffer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::driver::{ADDRESS, BUFFERS, Driver};
use super::net::{GUEST, Guest, HOST, MAC, MERGE, Namespace, QUEUE_SIZE, datagram, is_packet, net};
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::inbound::{Inbound, Want};
use crate::device::virtio::net::backend::NetPort;
use crate::device::virtio::net::device::Net;
use crate::device::virtio::net::request::HEAD_BYTES;
use crate::device::virtio::transport::pci::VirtioPci;

const LIMIT: Duration = Duration::from_secs(20);
const CHECKSUM: u64 = 1;
const GUEST_CHECKSUM: u64 = 1 << 1;
/// Flag of a packet's header: its checksum is only begun.
const NEEDS_CHECKSUM: u8 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The next packet of the host that ends with `payload`.
fn receive(guest: &mut Guest, payload: &[u8]) -> Vec<u8> {
    loop {
        let before = guest.used(RECEIVE).len();
        guest.offer(RECEIVE, &[(BUFFERS + 0x1000, 2048, true)]);
        let (_, bytes) = guest.wait(RECEIVE, before + 1)[before];
        let packet = guest.bytes(BUFFERS + 0x1000, usize::try_from(bytes).unwrap());
        // The host has its own chatter.
        if is_packet(&packet, payload) {
            return packet;
        }
    }
}

/// The sum of words, folded, as the Internet's checksums have it.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let words = words.map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let once = (sum & 0xffff) + (sum >> 16);
    u16::try_from((once & 0xffff) + (once >> 16)).unwrap()
}

/// What is summed up of a datagram: its addresses, protocol, length, and itself.
fn summed(packet: &[u8]) -> Vec<u8> {
    let ip = &packet[HEAD_BYTES + 14..];
    let udp = &ip[20..];
    let mut all = ip[12..20].to_vec();
    all.extend([0, 17]);
    all.extend(&udp[4..6]);
    all.extend(udp);
    all
}

#[test]
fn checksums_are_begun_or_whole_as_it_was_negotiated() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let mut guest = Guest::new(namespace.connection());
    for (features, is_begun) in [(0, false), (GUEST_CHECKSUM, true)] {
        guest.set_up(MERGE | features);
        socket.send_to(b"from the host", (GUEST, 7)).unwrap();
        let packet = receive(&mut guest, b"from the host");
        assert_eq!(packet[0] & NEEDS_CHECKSUM != 0, is_begun, "{packet:x?}");
        assert_eq!(sum(&summed(&packet)) == 0xffff, !is_begun);
    }
    // The other way: the guest sums up the addresses, and the host does the rest.
    guest.set_up(MERGE | CHECKSUM);
    let mut packet = datagram(b"from the guest");
    let pseudo = summed(&packet)[..12].to_vec();
    packet[HEAD_BYTES + 40..HEAD_BYTES + 42].copy_from_slice(&sum(&pseudo).to_be_bytes());
    packet[0] = NEEDS_CHECKSUM;
    packet[6..8].copy_from_slice(&34_u16.to_le_bytes());
    packet[8..10].copy_from_slice(&6_u16.to_le_bytes());
    guest.driver.ram.write(BUFFERS, &packet).unwrap();
    let length = u32::try_from(packet.len()).unwrap();
    guest.offer(TRANSMIT, &[(BUFFERS, length, false)]);
    let mut buffer = [0; 100];
    let (length, _) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"from the guest");
}

#[test]
fn features_that_build_on_others_do_nothing_without_them() {
    let namespace = Namespace::new();
    let mut guest = Guest::new(namespace.connection());
    let segments = 1 << 7 | 1 << 8;
    for features in [
        segments,
        1 << 9,
        1 << 10,
        GUEST_CHECKSUM | 1 << 9,
        segments | 1 << 1,
    ] {
        // It is asserted there that the device takes them.
        guest.set_up(features);
    }
}

#[test]
fn a_tap_is_left_alone_while_a_packet_waits_for_room() {
    let namespace = Namespace::new();
    let socket = namespace.socket();
    let mut device = net(namespace.connection());
    device.activate(MERGE).unwrap();
    assert!(device.source().is_some());
    for _ in 0..10 {
        socket.send_to(&[1; 100], (GUEST, 7)).unwrap();
    }
    let deadline = Instant::now() + LIMIT;
    while device.source().is_some() {
        assert!(Instant::now() < deadline, "nothing has come");
        device.look();
    }
    let Want::Bytes(bytes) = device.wants(RECEIVE) else {
        panic!("there is nothing to deliver");
    };
    assert_eq!(
        device.wants(RECEIVE),
        Want::Bytes(bytes),
        "it is the same packet"
    );
    device.lose(RECEIVE);
    assert!(device.source().is_some());
    // One that is reset has forgotten it.
    device.look();
    device.reset();
    assert!(device.source().is_some());
}

#[test]
fn a_freeze_under_load_loses_and_repeats_no_buffer() {
    let namespace = Namespace::new();
    let is_over = Arc::new(AtomicBool::new(false));
    let flood = {
        let (socket, is_over) = (namespace.socket(), Arc::clone(&is_over));
        thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                // A full tap drops them.
                let _ = socket.send_to(&[0x5a; 700], (GUEST, 7));
                thread::sleep(Duration::from_micros(200));
            }
        })
    };
    let size = usize::from(QUEUE_SIZE);
    let place = |number: usize| (BUFFERS + 0x1000 * number as u64, 2048, true);
    for round in 0..10 {
        let mut guest = Guest::new(namespace.connection());
        guest.set_up(MERGE);
        let before = round % size;
        let buffers: Vec<_> = (0..size).map(place).collect();
        guest.offer(RECEIVE, &buffers[..before]);
        guest.wait(RECEIVE, before / 2);
        guest.driver.device.worker().pause();
        let frozen = guest.used(RECEIVE);
        let state = guest.driver.device.save();
        assert_eq!(
            guest.used(RECEIVE),
            frozen,
            "something came into a frozen guest"
        );
        let Guest { driver, next } = guest;
        let ram = Arc::clone(&driver.ram);
        drop(driver);
        let port = NetPort::default();
        port.put(namespace.connection());
        let device = Box::new(Net::new(MAC.parse().unwrap(), port));
        let mut device = VirtioPci::new("dev0", 1, ADDRESS, device);
        device.restore(&state).unwrap();
        let mut guest = Guest {
            driver: Driver::of(device, ram),
            next,
        };
        guest.driver.device.worker().resume();
        guest.offer(RECEIVE, &buffers[before..]);
        let used = guest.wait(RECEIVE, size);
        assert_eq!(used[..frozen.len()], frozen, "what was given is given");
        let mut heads: Vec<_> = used.iter().map(|&(head, _)| head).collect();
        heads.sort_unstable();
        assert!(
            heads.iter().copied().eq(0..u32::from(QUEUE_SIZE)),
            "{used:?}"
        );
        let datagrams = used.iter().filter(|&&(head, bytes)| {
            let (at, _, _) = place(usize::try_from(head).unwrap());
            let packet = guest.bytes(at, usize::try_from(bytes).unwrap());
            is_packet(&packet, &[0x5a; 700])
        });
        assert!(datagrams.count() > 0, "round {round} from {HOST}");
    }
    is_over.store(true, Ordering::SeqCst);
    flood.join().unwrap();
}
