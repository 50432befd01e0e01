#![forbid(unsafe_code)]
//! One connection: the guest's program on one side, a stream of the host on the other.
//!
//! ```text
//! host asks:  Request ->  Response <-  "OK port"     then data both ways, as credit allows,
//! guest asks: Request <-  Response ->                until each side has said what it does no more
//! ```
//!
//! The stream is watched for edges: that it can be read or written is remembered until it cannot.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::credit::Credit;
use super::request::{Head, NEITHER, NO_RECEIVE, NO_SEND, Op, STREAM};

/// What a connection is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

impl Key {
    /// The head of a packet to the guest. The device fills in its context ID.
    pub(super) fn head(self, op: Op) -> Head {
        Head {
            source_port: self.host_port,
            target_port: self.guest_port,
            kind: STREAM,
            op: op.number(),
            ..Head::default()
        }
    }
}

/// What the guest is owed, once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Owed {
    request: bool,
    response: bool,
    update: bool,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    /// Whether it waits for its turn to say something.
    pub(super) is_queued: bool,
    stream: UnixStream,
    /// Whether both sides have agreed.
    is_open: bool,
    credit: Credit,
    /// What the host has not taken yet: no more than the guest was told that there is room for.
    waiting: VecDeque<u8>,
    owed: Owed,
    /// The guest was asked for room, and has none.
    is_starved: bool,
    can_read: bool,
    can_write: bool,
    /// All that the host has sent was read.
    is_at_end: bool,
    /// The host neither sends nor receives.
    has_hung_up: bool,
    /// What the guest does no more.
    guest_flags: u32,
    /// What the guest was told that the host does no more.
    told_flags: u32,
}

impl Connection {
    /// One that the guest is to be asked for.
    pub(super) fn from_host(key: Key, stream: UnixStream) -> Self {
        let owed = Owed {
            request: true,
            ..Owed::default()
        };
        Self::new(key, stream, owed, false)
    }

    /// One that the guest asked for, and gets.
    pub(super) fn from_guest(key: Key, stream: UnixStream) -> Self {
        let owed = Owed {
            response: true,
            ..Owed::default()
        };
        Self::new(key, stream, owed, true)
    }

    fn new(key: Key, stream: UnixStream, owed: Owed, is_open: bool) -> Self {
        Self {
            key,
            is_queued: false,
            stream,
            is_open,
            credit: Credit::default(),
            waiting: VecDeque::new(),
            owed,
            is_starved: false,
            can_read: true,
            can_write: true,
            is_at_end: false,
            has_hung_up: false,
            guest_flags: 0,
            told_flags: 0,
        }
    }

    /// Whether the guest knows nothing of it.
    pub(super) fn is_secret(&self) -> bool {
        self.owed.request
    }

    /// Whether the host is gone.
    pub(super) fn has_hung_up(&self) -> bool {
        self.has_hung_up
    }

    /// Takes what a packet of the guest says of its room.
    pub(super) fn hear(&mut self, head: &Head) {
        self.credit.hear(head.room_bytes, head.read_bytes);
    }

    /// Does what the guest asks for; `false` where that is nothing it may ask.
    pub(super) fn obey(&mut self, op: Op, flags: u32, data: &[u8]) -> bool {
        match op {
            Op::Response if !self.is_open && !self.owed.request => {
                self.is_open = true;
                self.greet();
                true
            }
            Op::Data if self.is_open && self.guest_flags & NO_SEND == 0 => self.receive(data),
            Op::Shutdown if self.is_open => {
                self.shut(flags);
                true
            }
            Op::CreditUpdate => self.is_open,
            Op::CreditRequest => {
                self.owed.update = true;
                self.is_open
            }
            Op::Data | Op::Shutdown | Op::Request | Op::Response | Op::Reset => false,
        }
    }

    /// Tells the host that the guest has agreed.
    fn greet(&mut self) {
        let line = format!("OK {}\n", self.key.host_port);
        // Nothing was written before: there is room, or nobody.
        if !matches!(self.stream.write(line.as_bytes()), Ok(length) if length == line.len()) {
            self.hang_up();
        }
    }

    fn receive(&mut self, data: &[u8]) -> bool {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        if !self.credit.receive(length) {
            return false;
        }
        self.waiting.extend(data);
        self.flush();
        true
    }

    fn shut(&mut self, flags: u32) {
        self.guest_flags |= flags & NEITHER;
        if self.guest_flags & NO_RECEIVE != 0 {
            // What the host sends from now on fails there. A stream that is gone is no error.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// Takes in what has happened to the stream.
    pub(super) fn notice(&mut self, flags: EventFlags) {
        let end = EventFlags::HUP | EventFlags::ERR;
        self.can_read |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | end);
        self.can_write |= flags.intersects(EventFlags::OUT | end);
        // What was shut from here ends both ways too.
        if flags.intersects(end) {
            self.has_hung_up = true;
        }
        self.flush();
    }

    /// Gives the host what it takes.
    fn flush(&mut self) {
        while self.can_write && !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match self.stream.write(front) {
                Ok(length) if length > 0 => {
                    self.waiting.drain(..length);
                    self.credit.take(u32::try_from(length).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.can_write = false,
                Ok(_) | Err(_) => self.hang_up(),
            }
        }
        if self.waiting.is_empty() && self.guest_flags & NO_SEND != 0 {
            // The host reads the end. A stream that is gone is no error.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The host takes nothing more.
    fn hang_up(&mut self) {
        self.has_hung_up = true;
        let lost = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        self.credit.take(lost);
        self.waiting.clear();
    }

    /// Whether the guest does nothing more, and the host has all that it sent.
    pub(super) fn is_over(&self) -> bool {
        self.guest_flags == NEITHER && self.waiting.is_empty()
    }

    /// What the guest is to be told next.
    pub(super) fn next(&mut self) -> Option<Op> {
        if self.owed.request {
            return Some(Op::Request);
        }
        if self.owed.response {
            return Some(Op::Response);
        }
        if self.is_open {
            if self.owed.update || self.credit.is_update_due() {
                return Some(Op::CreditUpdate);
            }
            if self.has_data() {
                if self.credit.may_send() > 0 {
                    self.is_starved = false;
                    return Some(Op::Data);
                }
                if !self.is_starved {
                    return Some(Op::CreditRequest);
                }
            }
        }
        (self.host_flags() & !self.told_flags != 0).then_some(Op::Shutdown)
    }

    /// Whether the host has sent something that the guest wants.
    fn has_data(&mut self) -> bool {
        if !self.can_read || self.is_at_end || self.guest_flags & NO_RECEIVE != 0 {
            return false;
        }
        match rustix::net::recv(&self.stream, &mut [0; 1][..], RecvFlags::PEEK) {
            Ok((1.., _)) => true,
            Err(Errno::AGAIN | Errno::INTR) => {
                self.can_read = false;
                false
            }
            Ok(_) | Err(_) => {
                self.is_at_end = true;
                false
            }
        }
    }

    /// What the host does no more.
    fn host_flags(&self) -> u32 {
        if !self.is_open {
            return if self.has_hung_up { NEITHER } else { 0 };
        }
        let is_silent = self.is_at_end || self.has_hung_up && self.guest_flags & NO_RECEIVE != 0;
        let send = if is_silent { NO_SEND } else { 0 };
        let receive = if self.has_hung_up { NO_RECEIVE } else { 0 };
        send | receive
    }

    /// Says what [`Self::next`] has, with at most `room` bytes of data.
    pub(super) fn say(&mut self, op: Op, room: usize, data: &mut Vec<u8>) -> Head {
        let (op, flags) = match op {
            Op::Data if self.read(room, data) => (Op::Data, 0),
            // There is no room, or it is gone.
            Op::Data => (Op::CreditUpdate, 0),
            Op::Shutdown => {
                self.told_flags |= self.host_flags();
                (op, self.told_flags)
            }
            _ => (op, 0),
        };
        match op {
            Op::Request => self.owed.request = false,
            Op::Response => self.owed.response = false,
            Op::CreditRequest => self.is_starved = true,
            _ => (),
        }
        // Each packet says what an update says.
        self.owed.update = false;
        let (room_bytes, read_bytes) = self.credit.tell();
        Head {
            data_bytes: u32::try_from(data.len()).unwrap_or_default(),
            flags,
            room_bytes,
            read_bytes,
            ..self.key.head(op)
        }
    }

    fn read(&mut self, room: usize, data: &mut Vec<u8>) -> bool {
        let most = usize::try_from(self.credit.may_send()).unwrap_or(usize::MAX);
        data.resize(room.min(most), 0);
        let length = self.stream.read(data).unwrap_or(0);
        data.truncate(length);
        self.credit.send(u32::try_from(length).unwrap_or_default());
        length > 0
    }
}
