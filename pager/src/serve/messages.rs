#![forbid(unsafe_code)]
//! Messages on their way from the kernel to their turn: bounded for each client, handled in turn.

use std::io;
use std::time::Instant;

use super::Server;
use crate::counts::add;
use crate::fault::Message;
use crate::metrics::Limit;
use crate::port::drain;
use crate::queue::ClientKey;
use crate::sys::uring::MESSAGES_PER_READ;

impl Server {
    /// Hands what came in to its clients, and reads the rest of what they have.
    pub(super) fn take_messages(&mut self) {
        for at in 0..self.inbox.messages.len() {
            let (slot, message) = self.inbox.messages[at];
            if let Some(key) = self.clients.at(slot) {
                self.deliver(key, message);
            }
        }
        self.inbox.messages.clear();
        while let Some(slot) = self.inbox.unarmed.pop() {
            if let Some(key) = self.clients.at(slot) {
                self.is_unarmed(key);
            }
        }
        while let Some(slot) = self.inbox.more.pop() {
            let Some(key) = self.clients.at(slot) else {
                continue;
            };
            let room = self.room(key);
            match self.read_messages(key, room) {
                // No room: it is disarmed until there is some.
                Ok(_) => self.is_unarmed(key),
                Err(error) => {
                    tracing::error!(%error, "a client's userfaultfd cannot be read: it is dropped");
                    self.lost.push(key);
                }
            }
        }
        while let Some(slot) = self.inbox.gone.pop() {
            self.lost.extend(self.clients.at(slot));
        }
    }

    fn deliver(&mut self, key: ClientKey, message: Message) {
        if let Some(client) = self.clients.get_mut(key) {
            client.pending.push_back(message);
            if !std::mem::replace(&mut client.in_turn, true) {
                self.turns.push_back(key);
            }
        }
    }

    fn is_unarmed(&mut self, key: ClientKey) {
        if let Some(client) = self.clients.get_mut(key)
            && !std::mem::replace(&mut client.is_unarmed, true)
        {
            self.unarmed.push(key);
        }
    }

    /// Reads a client's messages, at most `room`: how many there were.
    pub(super) fn read_messages(&mut self, key: ClientKey, room: usize) -> io::Result<usize> {
        let Some(client) = self.clients.get_mut(key) else {
            return Ok(0);
        };
        let before = client.pending.len();
        let pending = &mut client.pending;
        drain(&client.uffd, room, &mut |message| {
            pending.push_back(message);
        })?;
        let count = client.pending.len() - before;
        if count > 0 && !std::mem::replace(&mut client.in_turn, true) {
            self.turns.push_back(key);
        }
        Ok(count)
    }

    /// How many messages of a client may be taken from the kernel now. When there is no room,
    /// faults stay in the kernel's queue, which loses none.
    fn room(&mut self, key: ClientKey) -> usize {
        let room = self.queue.room(key);
        let Some(client) = self.clients.get_mut(key) else {
            return 0;
        };
        let room = room.saturating_sub(client.pending.len());
        let full = room < MESSAGES_PER_READ;
        if full && !client.was_full {
            if let Some(served) = client.regions.first() {
                served.image.metrics().limit_hit(Limit::Queue);
            }
            add(&self.parts.tally.waits_for_queue, 1);
        }
        client.was_full = full;
        room
    }

    /// Waits again for the messages of those for which there is room.
    pub(super) fn arm_clients(&mut self) {
        if self.unarmed.is_empty() {
            return;
        }
        let stopping = self.stopping.is_some();
        let mut unarmed = std::mem::take(&mut self.unarmed);
        unarmed.retain(|&key| {
            let room = !stopping && self.room(key) >= MESSAGES_PER_READ;
            let Some(client) = self.clients.get_mut(key) else {
                return false;
            };
            if !room {
                self.parts.port.disarm(key.slot);
                return true;
            }
            client.is_unarmed = !self.parts.port.arm(key.slot);
            client.is_unarmed
        });
        self.unarmed = unarmed;
    }

    /// Handles all messages that were taken, one of each client in turn.
    pub(super) fn handle_messages(&mut self) {
        if self.turns.is_empty() {
            return;
        }
        let arrived = Instant::now();
        while let Some(key) = self.turns.pop_front() {
            let Some(client) = self.clients.get_mut(key) else {
                continue;
            };
            let Some(message) = client.pending.pop_front() else {
                client.in_turn = false;
                continue;
            };
            // It stays in turn: installing may drain further messages.
            self.turns.push_back(key);
            match message {
                Message::Fault { address, write } => self.admit(key, address, write, arrived),
                Message::Unexpected { event } => {
                    tracing::error!(
                        event,
                        "the userfaultfd sent an event that was not asked for"
                    );
                }
            }
        }
    }
}
