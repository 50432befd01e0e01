#![forbid(unsafe_code)]
//! What a packet and a command look like.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET,
};

use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;
use crate::spec::MacAddress;

/// Length of the header of a packet (virtio 1.2, 5.1.6): flags, kind of segments, three lengths, two
/// places, and how many buffers the packet has.
pub const HEAD_BYTES: usize = 12;
/// Where the number of buffers is.
const BUFFERS_AT: usize = 10;
/// The longest packet: a segment of 64 KiB behind the header of Ethernet, and a VLAN's.
pub const MAX_PACKET_BYTES: usize = HEAD_BYTES + 65535 + 18;
/// The shortest packet: addresses and type.
const MIN_PACKET_BYTES: usize = HEAD_BYTES + 14;

/// Copies a packet that the guest sends to the front of `buffer`; its length, or `None` where it is
/// no packet.
pub fn sent_packet(chain: &Chain, ram: &GuestRam, buffer: &mut [u8]) -> Option<usize> {
    let length = usize::try_from(chain.readable_bytes()).ok()?;
    if length < MIN_PACKET_BYTES {
        return None;
    }
    let packet = buffer.get_mut(..length)?;
    chain.read(ram, 0, packet).ok()?;
    Some(length)
}

/// Says in a packet's header over how many buffers it goes.
pub fn set_buffers(packet: &mut [u8], buffers: u16) {
    if let Some(place) = packet.get_mut(BUFFERS_AT..HEAD_BYTES) {
        place.copy_from_slice(&buffers.to_le_bytes());
    }
}

/// A command of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// It has told its neighbours where it is.
    Announced,
    /// The device's hardware address is to be this.
    SetMac(MacAddress),
}

impl Command {
    /// The command of a request, if it is one that is known.
    pub fn parse(chain: &Chain, ram: &GuestRam) -> Option<Self> {
        let mut head = [0; 2];
        let has_answer = chain.writable_bytes() > 0;
        if !has_answer || chain.readable_bytes() < 2 {
            return None;
        }
        chain.read(ram, 0, &mut head).ok()?;
        let [class, command] = head.map(u32::from);
        match (class, command, chain.readable_bytes()) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, 2) => Some(Self::Announced),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, 8) => {
                let mut mac = [0; 6];
                chain.read(ram, 2, &mut mac).ok()?;
                MacAddress::new(mac).map(Self::SetMac)
            }
            _ => None,
        }
    }
}
