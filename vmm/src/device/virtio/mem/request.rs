#![forbid(unsafe_code)]
//! Requests and answers (virtio 1.2, 5.15.6).

use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 24;
/// Bytes of an answer.
pub const ANSWER_BYTES: usize = 10;

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Have blocks.
    Plug(Run),
    /// Give blocks back.
    Unplug(Run),
    /// Give all blocks back.
    UnplugAll,
    /// Say which blocks are plugged.
    State(Run),
}

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First guest physical address.
    pub guest_address: u64,
    /// How many.
    pub blocks: u16,
}

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// Not wanted by the host.
    Nack,
    /// Not now.
    Busy,
    /// No request that can be.
    Error,
    /// Done: what the blocks are.
    State(BlockState),
}

/// What blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// All plugged.
    Plugged,
    /// None plugged.
    Unplugged,
    /// Both.
    Mixed,
}

impl Request {
    /// Reads a request; `None` where it is none.
    pub fn read(chain: &Chain, ram: &GuestRam) -> Option<Self> {
        let mut bytes = [0; REQUEST_BYTES];
        if chain.readable_bytes() < bytes.len() as u64 {
            return None;
        }
        chain.read(ram, 0, &mut bytes).ok()?;
        let [a, b, _, _, _, _, _, _, c @ .., d, e, _, _, _, _, _, _] = bytes;
        let run = Run {
            guest_address: u64::from_le_bytes(c),
            blocks: u16::from_le_bytes([d, e]),
        };
        match u16::from_le_bytes([a, b]) {
            0 => Some(Self::Plug(run)),
            1 => Some(Self::Unplug(run)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(run)),
            _ => None,
        }
    }
}

impl Answer {
    /// The answer as the guest reads it.
    pub fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(BlockState::Plugged) => (0, 0),
            Self::State(BlockState::Unplugged) => (0, 1),
            Self::State(BlockState::Mixed) => (0, 2),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}
