#![forbid(unsafe_code)]
//! What each side of a connection may send (virtio 1.3, 5.10.6.3): never more than the other has room for.
//! All counts are modulo 2^32.

/// Room for what the guest has sent and the host has not taken yet.
pub(super) const ROOM_BYTES: u32 = 64 << 10;
/// The guest is told of room when this much has become free since it was told last.
const UPDATE_BYTES: u32 = ROOM_BYTES / 4;

/// The counts of a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Credit {
    /// The guest's room, and how much its program has read, as it says.
    guest_room: u32,
    guest_read: u32,
    /// How much was sent to the guest.
    sent: u32,
    /// How much came from the guest, how much of that the host has taken, and what of that the guest was
    /// told.
    received: u32,
    taken: u32,
    told: u32,
}

impl Credit {
    /// Takes what the guest says in each packet.
    pub(super) fn hear(&mut self, room_bytes: u32, read_bytes: u32) {
        self.guest_room = room_bytes;
        self.guest_read = read_bytes;
    }

    /// What to say in each packet: room, and how much was taken.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.taken;
        (ROOM_BYTES, self.taken)
    }

    /// How much the guest has room for. A guest that says nonsense gets nothing.
    pub(super) fn may_send(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_read);
        self.guest_room.saturating_sub(under_way)
    }

    /// So much was sent to the guest.
    pub(super) fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// So much came from the guest; `false` where it was more than there is room for.
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let waits = self.received.wrapping_sub(self.taken);
        if bytes > ROOM_BYTES.saturating_sub(waits) {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// The host has taken so much of it.
    pub(super) fn take(&mut self, bytes: u32) {
        self.taken = self.taken.wrapping_add(bytes);
    }

    /// Whether the guest is to be told that there is room again.
    pub(super) fn is_update_due(&self) -> bool {
        self.taken.wrapping_sub(self.told) >= UPDATE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_go_on_behind_their_end() {
        let near = u32::MAX - 9;
        let mut credit = Credit {
            sent: near,
            received: near,
            taken: near,
            told: near,
            ..Credit::default()
        };
        credit.hear(100, near);
        assert_eq!(credit.may_send(), 100);
        credit.send(60);
        assert_eq!(credit.may_send(), 40);
        credit.hear(100, near.wrapping_add(50));
        assert_eq!(credit.may_send(), 90);
        assert!(credit.receive(ROOM_BYTES));
        assert!(!credit.receive(1));
        credit.take(UPDATE_BYTES - 1);
        assert!(!credit.is_update_due());
        credit.take(1);
        assert!(credit.is_update_due());
        assert!(credit.receive(UPDATE_BYTES));
        assert!(!credit.receive(1));
        assert_eq!(credit.tell(), (ROOM_BYTES, near.wrapping_add(UPDATE_BYTES)));
        assert!(!credit.is_update_due());
    }

    proptest! {
        #[test]
        fn no_guest_makes_more_wait_than_there_is_room_for(
            steps in proptest::collection::vec((any::<bool>(), 0_u32..=ROOM_BYTES, any::<(u32, u32)>()), 0..60),
        ) {
            let (mut credit, mut waits) = (Credit::default(), 0);
            for (is_from_guest, bytes, (room, read)) in steps {
                credit.hear(room, read);
                prop_assert!(credit.may_send() <= room);
                if is_from_guest {
                    waits += if credit.receive(bytes) { bytes } else { 0 };
                } else {
                    let taken = bytes.min(waits);
                    credit.take(taken);
                    waits -= taken;
                }
                prop_assert!(waits <= ROOM_BYTES);
            }
        }
    }
}
