#![forbid(unsafe_code)]
//! `uffd_msg` decoded: what the kernel tells a pager. Pure.

/// Size of one `uffd_msg` in bytes.
pub(crate) const MESSAGE_BYTES: usize = 32;

const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE: u64 = 1;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A thread sleeps until the page at `address` is there.
    Fault { address: u64, write: bool },
    /// Something that was not asked for: no event but faults is enabled.
    Unexpected { event: u8 },
}

/// The messages in `bytes`, as read from a userfaultfd. A partial one at the end is no message:
/// the kernel writes whole ones.
pub(crate) fn messages(bytes: &[u8]) -> impl Iterator<Item = Message> + '_ {
    bytes.chunks_exact(MESSAGE_BYTES).map(|raw| {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&raw[at..at + 8]);
            u64::from_le_bytes(word)
        };
        match raw[0] {
            EVENT_PAGEFAULT => Message::Fault {
                address: word(16),
                write: word(8) & FLAG_WRITE != 0,
            },
            event => Message::Unexpected { event },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_carry_address_and_access() {
        let mut raw = [0; 3 * MESSAGE_BYTES - 1];
        raw[0] = EVENT_PAGEFAULT;
        raw[8] = 1;
        raw[16..24].copy_from_slice(&0x7f00_dead_b000_u64.to_le_bytes());
        raw[MESSAGE_BYTES] = 0x15;
        let decoded: Vec<_> = messages(&raw).collect();
        assert_eq!(
            decoded,
            [
                Message::Fault {
                    address: 0x7f00_dead_b000,
                    write: true
                },
                Message::Unexpected { event: 0x15 }
            ]
        );
    }
}
