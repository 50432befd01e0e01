#![forbid(unsafe_code)]
//! All connections of a device, and whose turn it is. Their number is limited, and so is what waits for
//! each.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{Timespec, epoll};

use super::backend::{Greeting, HostSide};
use super::connection::{Connection, Key};
use super::request::{Head, Op, STREAM};

/// Most connections, those included whose program has not said yet where it wants to go.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Most packets that refuse something and wait for room. The guest's packets wait when there are as many.
const MAX_RESETS: usize = 64;
/// Ports of the host's side of connections that the host asks for begin here: none that a program of the
/// guest would ask for.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = u32::MAX - 1;
/// Most new programs of the host that are let in at once.
const ACCEPTED_AT_ONCE: usize = 16;
/// Most streams that are looked at at once.
const EVENTS_AT_ONCE: usize = 64;
/// What the host's socket is called where events are told; connections count from there.
const LISTENER: u64 = 0;

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Table {
    host: Option<HostSide>,
    events: Option<Arc<OwnedFd>>,
    /// Programs of the host that have not said yet where they want to go.
    greetings: BTreeMap<u64, UnixStream>,
    connections: BTreeMap<u64, Connection>,
    ids: BTreeMap<Key, u64>,
    /// Who has something to say, in turn. Each is there once.
    queue: VecDeque<u64>,
    /// What is refused.
    resets: VecDeque<Key>,
    last_id: u64,
    last_port: u32,
    /// Somebody may want to come in.
    may_accept: bool,
}

impl Table {
    /// Connects the host's side.
    pub(super) fn bind(&mut self, host: Option<HostSide>) -> io::Result<()> {
        self.clear();
        self.greetings.clear();
        (self.events, self.host, self.may_accept) = (None, None, false);
        let Some(host) = host else {
            return Ok(());
        };
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(LISTENER);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&events, &host, data, flags)?;
        (self.events, self.host) = (Some(Arc::new(events)), Some(host));
        Ok(())
    }

    /// Readable when something has happened on the host's side.
    pub(super) fn events(&self) -> Option<Arc<OwnedFd>> {
        self.events.clone()
    }

    /// The host's port of the connection that the host asked for last.
    pub(super) fn last_port(&self) -> u32 {
        self.last_port
    }

    /// The next connection that the host asks for gets a port behind that one. Any number will do.
    pub(super) fn go_on_behind(&mut self, last_port: u32) {
        self.last_port = last_port;
    }

    /// Forgets everything that the guest knows.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.ids.clear();
        self.queue.clear();
        self.resets.clear();
    }

    /// Whether there is room for what a packet of the guest may bring about.
    pub(super) fn is_ready(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet of the guest.
    pub(super) fn receive(&mut self, head: &Head, data: &[u8]) {
        let key = Key {
            guest_port: head.source_port,
            host_port: head.target_port,
        };
        if head.op == Op::Reset.number() {
            self.remove(key);
            return;
        }
        let op = Op::of(head.op).filter(|_| head.kind == STREAM);
        let id = self.ids.get(&key).copied();
        let Some((id, connection)) = id.and_then(|id| Some((id, self.connections.get_mut(&id)?)))
        else {
            if op != Some(Op::Request) || !self.open(key, head) {
                self.resets.push_back(key);
            }
            return;
        };
        connection.hear(head);
        let is_obeyed = op.is_some_and(|op| connection.obey(op, head.flags, data));
        if is_obeyed && !connection.is_over() {
            self.call(id);
        } else {
            // What cannot be ends the connection, as the end of both directions does.
            self.remove(key);
            self.resets.push_back(key);
        }
    }

    /// Opens a connection that the guest asks for; whether that can be.
    fn open(&mut self, key: Key, head: &Head) -> bool {
        if self.is_full() {
            return false;
        }
        let Some(host) = &self.host else {
            return false;
        };
        let stream = match host.dial(key.host_port) {
            Ok(stream) => stream,
            Err(error) => {
                let port = key.host_port;
                tracing::debug!(port, "nobody listens for the guest: {error}");
                return false;
            }
        };
        self.last_id += 1;
        let id = self.last_id;
        if self.watch(id, &stream).is_err() {
            return false;
        }
        let mut connection = Connection::from_guest(key, stream);
        connection.hear(head);
        self.insert(id, connection);
        true
    }

    fn insert(&mut self, id: u64, connection: Connection) {
        self.ids.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.call(id);
    }

    fn watch(&self, id: u64, stream: &UnixStream) -> io::Result<()> {
        let events = self.events.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP;
        let data = epoll::EventData::new_u64(id);
        Ok(epoll::add(
            events,
            stream,
            data,
            flags | epoll::EventFlags::ET,
        )?)
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.greetings.len() >= MAX_CONNECTIONS
    }

    /// A connection may have something to say.
    fn call(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.is_queued
        {
            connection.is_queued = true;
            self.queue.push_back(id);
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(id) = self.ids.remove(&key) {
            // The kernel forgets a stream that is closed.
            self.connections.remove(&id);
            self.queue.retain(|&other| other != id);
        }
    }

    /// Takes in what has happened on the host's side.
    pub(super) fn look(&mut self) {
        let Some(events) = self.events.clone() else {
            return;
        };
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(EVENTS_AT_ONCE);
        let at_once = Timespec::default();
        let room = rustix::buffer::spare_capacity(&mut ready);
        if let Err(error) = epoll::wait(&*events, room, Some(&at_once)) {
            tracing::debug!("streams of the host cannot be looked at: {error}");
        }
        for event in &ready {
            let (id, flags) = (event.data.u64(), event.flags);
            if id == LISTENER {
                self.may_accept = true;
            } else if self.greetings.contains_key(&id) {
                self.hear_greeting(id, flags);
            } else {
                self.notice(id, flags);
            }
        }
        self.accept();
    }

    fn notice(&mut self, id: u64, flags: epoll::EventFlags) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.notice(flags);
        let key = connection.key;
        if connection.is_over() {
            // There is room: as many as there are connections, each once.
            self.remove(key);
            self.resets.push_back(key);
        } else if connection.is_secret() && connection.has_hung_up() {
            self.remove(key);
        } else {
            self.call(id);
        }
    }

    /// Whether somebody waits outside who would be let in now.
    pub(super) fn is_behind(&self) -> bool {
        self.may_accept && !self.is_full()
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTED_AT_ONCE {
            if !self.is_behind() {
                return;
            }
            let Some(host) = &self.host else {
                return;
            };
            let accepted = host.accept();
            let Ok(stream) = accepted else {
                // There is nobody, or no descriptor: whoever comes next is the next occasion.
                self.may_accept = false;
                return;
            };
            self.last_id += 1;
            let id = self.last_id;
            if self.watch(id, &stream).is_ok() {
                self.greetings.insert(id, stream);
                self.hear_greeting(id, epoll::EventFlags::empty());
            }
        }
    }

    /// Takes the greeting of a program of the host, if it is all there.
    fn hear_greeting(&mut self, id: u64, flags: epoll::EventFlags) {
        let Some(stream) = self.greetings.remove(&id) else {
            return;
        };
        let end = epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        match Greeting::take(&stream) {
            Greeting::Port(guest_port) => {
                let host_port = self.free_port(guest_port);
                let key = Key {
                    guest_port,
                    host_port,
                };
                self.insert(id, Connection::from_host(key, stream));
            }
            Greeting::Incomplete if !flags.intersects(end) => {
                self.greetings.insert(id, stream);
            }
            Greeting::Incomplete | Greeting::Wrong => (),
        }
    }

    /// A port of the host's side that no connection to this port of the guest has.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        // There are more ports than connections.
        loop {
            // The last number stands for any port.
            self.last_port = match self.last_port {
                last @ FIRST_HOST_PORT..LAST_HOST_PORT => last + 1,
                _ => FIRST_HOST_PORT,
            };
            let key = Key {
                guest_port,
                host_port: self.last_port,
            };
            if !self.ids.contains_key(&key) {
                return self.last_port;
            }
        }
    }

    /// Whether the guest is to be told something.
    pub(super) fn has_news(&mut self) -> bool {
        if !self.resets.is_empty() {
            return true;
        }
        while let Some(id) = self.queue.front() {
            if let Some(connection) = self.connections.get_mut(id) {
                if connection.next().is_some() {
                    return true;
                }
                connection.is_queued = false;
            }
            self.queue.pop_front();
        }
        false
    }

    /// The next packet, if there is one: its head, and at most `room` bytes of data.
    pub(super) fn say(&mut self, room: usize, data: &mut Vec<u8>) -> Option<Head> {
        data.clear();
        if let Some(key) = self.resets.pop_front() {
            return Some(key.head(Op::Reset));
        }
        if !self.has_news() {
            return None;
        }
        let id = self.queue.pop_front()?;
        let connection = self.connections.get_mut(&id)?;
        connection.is_queued = false;
        let op = connection.next()?;
        let head = connection.say(op, room, data);
        self.call(id);
        Some(head)
    }
}
