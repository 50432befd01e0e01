#![forbid(unsafe_code)]
//! Packets (virtio 1.3, 5.10.6): a head of 44 bytes and, in some, data.
//!
//! The crate `virtio-vsock` reads them too, but wants the data of a packet in one piece of guest memory;
//! Linux from 6.7 on sends it in several when a program asks for no copies.

use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;

/// Length of the head.
pub(super) const HEAD_BYTES: usize = 44;
/// Most data of a packet.
pub(super) const MAX_DATA_BYTES: usize = 64 << 10;
/// The host.
pub(super) const HOST_CID: u64 = 2;
/// Streams, which are all that there is.
pub(super) const STREAM: u16 = 1;

/// Flag of [`Op::Shutdown`]: the sender will receive nothing more.
pub(super) const NO_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send nothing more.
pub(super) const NO_SEND: u32 = 2;
/// Both.
pub(super) const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// There is no such connection, from now on.
    Reset,
    /// Says what the sender will do no more.
    Shutdown,
    /// Has data.
    Data,
    /// Says what the sender has room for.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
}

impl Op {
    const ALL: [(Self, u16); 7] = [
        (Self::Request, 1),
        (Self::Response, 2),
        (Self::Reset, 3),
        (Self::Shutdown, 4),
        (Self::Data, 5),
        (Self::CreditUpdate, 6),
        (Self::CreditRequest, 7),
    ];

    /// The operation of a number.
    pub(super) fn of(number: u16) -> Option<Self> {
        let found = Self::ALL.iter().find(|(_, other)| *other == number);
        found.map(|(op, _)| *op)
    }

    /// Its number.
    pub(super) fn number(self) -> u16 {
        let found = Self::ALL.iter().find(|(other, _)| *other == self);
        // All are in the table.
        found.map_or(0, |(_, number)| *number)
    }
}

/// The head of a packet, as it is: nothing in it is proven.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) source_cid: u64,
    pub(super) target_cid: u64,
    pub(super) source_port: u32,
    pub(super) target_port: u32,
    /// How much data is behind it.
    pub(super) data_bytes: u32,
    /// Kind of the connection.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Room that the sender has for this connection, in all.
    pub(super) room_bytes: u32,
    /// How much the sender's program has read, in all, modulo 2^32.
    pub(super) read_bytes: u32,
}

impl Head {
    /// Reads the packet of a request: its data goes into `data`, which is as long afterwards. `None` where it
    /// is none.
    pub(super) fn read(request: &Chain, ram: &GuestRam, data: &mut Vec<u8>) -> Option<Self> {
        let mut bytes = [0; HEAD_BYTES];
        let room = request.readable_bytes().checked_sub(HEAD_BYTES as u64)?;
        request.read(ram, 0, &mut bytes).ok()?;
        let head = Self::from_bytes(&bytes);
        let length = usize::try_from(head.data_bytes).ok()?;
        if u64::from(head.data_bytes) > room || length > MAX_DATA_BYTES {
            return None;
        }
        data.resize(length, 0);
        request.read(ram, HEAD_BYTES as u64, data).ok()?;
        Some(head)
    }

    fn from_bytes(bytes: &[u8; HEAD_BYTES]) -> Self {
        let word = |at: usize, length: usize| {
            let bytes = bytes.iter().skip(at).take(length).rev();
            bytes.fold(0, |value: u64, &byte| value << 8 | u64::from(byte))
        };
        let u32_at = |at| u32::try_from(word(at, 4)).unwrap_or_default();
        let u16_at = |at| u16::try_from(word(at, 2)).unwrap_or_default();
        Self {
            source_cid: word(0, 8),
            target_cid: word(8, 8),
            source_port: u32_at(16),
            target_port: u32_at(20),
            data_bytes: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            room_bytes: u32_at(36),
            read_bytes: u32_at(40),
        }
    }

    /// As it is in guest memory.
    pub(super) fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let parts: [&[u8]; 10] = [
            &self.source_cid.to_le_bytes(),
            &self.target_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.target_port.to_le_bytes(),
            &self.data_bytes.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.room_bytes.to_le_bytes(),
            &self.read_bytes.to_le_bytes(),
        ];
        let mut bytes = [0; HEAD_BYTES];
        for (place, byte) in bytes.iter_mut().zip(parts.concat()) {
            *place = byte;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_head_is_44_bytes_and_nothing_is_lost(bytes: [u8; 22], more: [u8; 22]) {
            let mut all = [0; HEAD_BYTES];
            all[..22].copy_from_slice(&bytes);
            all[22..].copy_from_slice(&more);
            prop_assert_eq!(Head::from_bytes(&all).to_bytes(), all);
        }
    }

    #[test]
    fn operations_have_numbers_of_their_own() {
        for (op, number) in Op::ALL {
            assert_eq!((Op::of(number), op.number()), (Some(op), number));
        }
        assert_eq!((Op::of(0), Op::of(8)), (None, None));
    }
}
