#![forbid(unsafe_code)]
//! A guest with a vsock device: its packets, byte for byte, and room for what comes.

use std::path::Path;

use super::driver::{ADDRESS, VERSION_1};
use super::rings::Rings;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::device::virtio::vsock::backend::{HostSide, VsockConnection, VsockPort};
use crate::device::virtio::vsock::device::Vsock;

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;
pub(super) const CID: u32 = 42;
const RX_BUFFERS: u64 = 0x2_0000;
pub(super) const TX_BUFFER: u64 = 0x6_0000;
const EVENT_BUFFER: u64 = 0x8_0000;
/// Room for a packet: its head, and data in a piece of its own.
const BUFFER_BYTES: u32 = 4096;
const HEAD_BYTES: u32 = 44;

pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RESET: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const DATA: u16 = 5;
pub(super) const CREDIT_UPDATE: u16 = 6;
pub(super) const CREDIT_REQUEST: u16 = 7;

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) cids: (u64, u64),
    pub(super) ports: (u32, u32),
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) room: u32,
    pub(super) read: u32,
    pub(super) data: Vec<u8>,
}

impl Packet {
    /// One of the guest, with much room.
    pub(super) fn new(op: u16, (guest, host): (u32, u32)) -> Self {
        Self {
            cids: (CID.into(), 2),
            ports: (guest, host),
            kind: 1,
            op,
            flags: 0,
            room: 1 << 18,
            read: 0,
            data: Vec::new(),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.data.len()).unwrap();
        let mut bytes = self.cids.0.to_le_bytes().to_vec();
        bytes.extend(self.cids.1.to_le_bytes());
        bytes.extend(self.ports.0.to_le_bytes());
        bytes.extend(self.ports.1.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.room.to_le_bytes());
        bytes.extend(self.read.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let packet = Self {
            cids: (u64_at(0), u64_at(8)),
            ports: (u32_at(16), u32_at(20)),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            room: u32_at(36),
            read: u32_at(40),
            data: bytes[44..].to_vec(),
        };
        assert_eq!(u32_at(24) as usize, packet.data.len());
        packet
    }
}

/// A device that is reached at `path`.
pub(super) fn device(cid: u32, path: &Path) -> Box<Vsock> {
    let port = VsockPort::default();
    port.put(VsockConnection {
        cid: Some(cid),
        host: Some(HostSide::listen(path).unwrap()),
    });
    Box::new(Vsock::new(CID, port))
}

pub(super) struct Guest {
    pub(super) rings: Rings,
}

impl Guest {
    /// A guest whose driver is complete, with room for packets and for news.
    pub(super) fn new(path: &Path) -> Self {
        let mut guest = Self {
            rings: Rings::new(device(CID, path), 3),
        };
        guest.rings.driver.device.worker().resume();
        guest.set_up(VERSION_1);
        guest
    }

    pub(super) fn set_up(&mut self, features: u64) {
        assert_eq!(self.rings.set_up(features), 0xf);
        for _ in 0..4 {
            self.rings.offer(EVENT, &[(EVENT_BUFFER, 8, true)]);
        }
        self.give_all_room();
        self.rings.kick(EVENT);
    }

    /// Goes on in another device, whose guest was paused and saved.
    pub(super) fn moved(self, cid: u32, path: &Path) -> Self {
        let mut state = self.rings.driver.device.save();
        state.id = "dev0".to_owned();
        let mut next = VirtioPci::new("dev0", 1, ADDRESS, device(cid, path));
        next.restore(&state).unwrap();
        let rings = self.rings.continued(next);
        rings.driver.device.worker().resume();
        Self { rings }
    }

    fn give_room(&mut self, buffer: u16) {
        let address = RX_BUFFERS + u64::from(buffer) * 0x2000;
        let pieces = [
            (address, HEAD_BYTES, true),
            (address + 0x1000, BUFFER_BYTES, true),
        ];
        self.rings.offer(RX, &pieces);
    }

    pub(super) fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.bytes());
    }

    /// Sends what may be no packet, and waits until it was taken.
    pub(super) fn send_bytes(&mut self, bytes: &[u8]) {
        self.rings.driver.ram.write(TX_BUFFER, bytes).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        // In pieces of any length.
        let first = length.min(50);
        let mut pieces = vec![(TX_BUFFER, first, false)];
        if length > first {
            pieces.push((TX_BUFFER + u64::from(first), length - first, false));
        }
        self.rings.offer(TX, &pieces);
        self.rings.kick(TX);
        assert_eq!(self.rings.wait(TX).1, 0);
    }

    /// Offers 16 packets, as many as there are descriptors, to each of which the answer is a refusal.
    pub(super) fn offer_strays(&mut self) {
        let bytes = Packet::new(DATA, (5, 6)).bytes();
        self.rings.driver.ram.write(TX_BUFFER, &bytes).unwrap();
        for _ in 0..16 {
            self.rings.offer(TX, &[(TX_BUFFER, HEAD_BYTES, false)]);
        }
        self.rings.kick(TX);
    }

    /// Gives room for packets.
    pub(super) fn give_all_room(&mut self) {
        for buffer in 0..4 {
            self.give_room(buffer);
        }
        self.rings.kick(RX);
    }

    /// The next packet.
    pub(super) fn receive(&mut self) -> Packet {
        let (head, length) = self.rings.wait(RX);
        self.packet(head, length)
    }

    /// Lets the device do all that it can do by itself.
    pub(super) fn settle(&self) {
        self.rings.driver.device.worker().pause();
        self.rings.driver.device.worker().resume();
    }

    /// The packets that are there when the device has done all that it can do by itself.
    pub(super) fn settled(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        loop {
            self.settle();
            let before = packets.len();
            while let Some((head, length)) = self.rings.next(RX) {
                packets.push(self.packet(head, length));
            }
            if packets.len() == before {
                return packets;
            }
        }
    }

    fn packet(&mut self, head: u16, length: u32) -> Packet {
        let ram = &self.rings.driver.ram;
        // Two descriptors each, four buffers in turn.
        let address = RX_BUFFERS + u64::from(head / 2 % 4) * 0x2000;
        let mut bytes = vec![0; 44];
        ram.read(address, &mut bytes).unwrap();
        let mut data = vec![0; length as usize - 44];
        ram.read(address + 0x1000, &mut data).unwrap();
        bytes.extend(data);
        self.give_room(head / 2 % 4);
        self.rings.kick(RX);
        Packet::parse(&bytes)
    }

    /// Gives room for news again.
    pub(super) fn return_news(&mut self) {
        self.rings.offer(EVENT, &[(EVENT_BUFFER, 8, true)]);
        self.rings.kick(EVENT);
    }
}
