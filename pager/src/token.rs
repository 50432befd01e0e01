#![forbid(unsafe_code)]
//! What a completion belongs to: the one encoding of a ring's `user_data`. Pure.

/// Place of one read in the table of reads in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadSlot(u32);

impl ReadSlot {
    pub(crate) const fn new(slot: u32) -> Self {
        Self(slot)
    }

    /// The number; below the limit of reads in flight, and used again once a read is done.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Place of one client among those that a port waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClientSlot(u32);

impl ClientSlot {
    pub(crate) const fn new(slot: u32) -> Self {
        Self(slot)
    }

    /// The number; used again once nothing of the client is pending.
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The requests that a port knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// Messages of a client's userfaultfd: a READ of them, or a POLL that says there are some.
    Uffd(ClientSlot),
    /// A client's process ended.
    Gone(ClientSlot),
    /// Somebody rang: there are commands.
    Bell,
    /// A thread is done with a read.
    Signal,
    /// A request to cancel others.
    Cancel,
    /// A template read.
    Read(ReadSlot),
}

const KIND_SHIFT: u32 = 32;

impl Token {
    /// As `user_data`: the kind in the high half, the slot in the low half.
    pub(crate) const fn encode(self) -> u64 {
        match self {
            Self::Uffd(slot) => 1 << KIND_SHIFT | slot.0 as u64,
            Self::Bell => 2 << KIND_SHIFT,
            Self::Cancel => 3 << KIND_SHIFT,
            Self::Read(slot) => 4 << KIND_SHIFT | slot.0 as u64,
            Self::Gone(slot) => 5 << KIND_SHIFT | slot.0 as u64,
            Self::Signal => 6 << KIND_SHIFT,
        }
    }

    /// From `user_data`; `None` for a value that `encode` never gives.
    pub(crate) fn decode(user_data: u64) -> Option<Self> {
        let low = u32::try_from(user_data & u64::from(u32::MAX)).ok()?;
        match (user_data >> KIND_SHIFT, low) {
            (1, slot) => Some(Self::Uffd(ClientSlot(slot))),
            (2, 0) => Some(Self::Bell),
            (3, 0) => Some(Self::Cancel),
            (4, slot) => Some(Self::Read(ReadSlot(slot))),
            (5, slot) => Some(Self::Gone(ClientSlot(slot))),
            (6, 0) => Some(Self::Signal),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tokens_survive_the_ring(slot in any::<u32>(), other in any::<u64>()) {
            let client = ClientSlot(slot);
            let tokens = [
                Token::Uffd(client),
                Token::Gone(client),
                Token::Bell,
                Token::Signal,
                Token::Cancel,
                Token::Read(ReadSlot(slot)),
            ];
            for token in tokens {
                prop_assert_eq!(Token::decode(token.encode()), Some(token));
            }
            if let Some(token) = Token::decode(other) {
                prop_assert_eq!(token.encode(), other);
            }
        }
    }
}
