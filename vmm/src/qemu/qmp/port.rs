#![forbid(unsafe_code)]
//! Between the machine's thread and a monitor's: events one way, requests the other.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fmt, io};

use crossbeam::channel::Sender;
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use super::message::{Event, QmpError, Request};

/// Most events that wait for a client which does not read; later ones are dropped and counted.
pub const MAX_EVENTS: usize = 1024;
/// Most requests of all monitors together that wait for the machine's thread.
pub const MAX_REQUESTS: usize = 64;

/// The answer to a QMP command.
#[derive(Debug)]
pub struct Reply {
    /// What came of it.
    pub result: Result<Value, QmpError>,
    /// How many events there had been by then: they come before the answer, later ones behind it.
    pub events: u64,
}

/// What a monitor asks of the machine's thread.
pub enum Ask {
    /// A QMP command, with descriptors that came with it.
    Qmp(Request, Vec<OwnedFd>, Sender<Reply>),
    /// A line for people.
    Hmp(String, Sender<String>),
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qmp(request, ..) => f.debug_tuple("Qmp").field(&request.command).finish(),
            Self::Hmp(line, _) => f.debug_tuple("Hmp").field(line).finish(),
        }
    }
}

/// The events of one monitor.
#[derive(Debug)]
pub struct Port {
    /// Each with its number.
    queue: Mutex<VecDeque<(u64, Value)>>,
    wake: OwnedFd,
    /// A client is connected and has negotiated: before that it gets no events.
    listening: AtomicBool,
    closing: AtomicBool,
    dropped: AtomicU64,
}

impl Port {
    /// A port without a client.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            listening: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        })
    }

    fn send(&self, number: u64, event: &Value) {
        if !self.listening.load(Ordering::Acquire) {
            return;
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= MAX_EVENTS {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.push_back((number, event.clone()));
        drop(queue);
        self.ring();
    }

    fn ring(&self) {
        // A counter that is full wakes too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Begins or ends to take events in.
    pub fn listen(&self, listening: bool) {
        self.listening.store(listening, Ordering::Release);
        if !listening {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.clear();
        }
    }

    /// What waits of the first `number` events, oldest first.
    pub fn take(&self, number: u64) -> Vec<Value> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = queue.partition_point(|(event, _)| *event <= number);
        let taken = queue.drain(..ready).map(|(_, event)| event).collect();
        if !queue.is_empty() {
            self.ring();
        }
        taken
    }

    /// Tells the monitor to send what waits and to end.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether the monitor is to end.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Events that a client lost because it did not read.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// All monitors that want events.
#[derive(Debug, Default)]
pub struct Bus {
    ports: Vec<Arc<Port>>,
    sent: AtomicU64,
}

impl Bus {
    /// Adds a monitor.
    pub fn add(&mut self, port: Arc<Port>) {
        self.ports.push(port);
    }

    /// How many events there were.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Tells all clients.
    pub fn send(&self, name: &'static str, data: Option<Value>) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        tracing::debug!(target: "pando_vmm::qemu::qmp", name, "event");
        let event = Event { name, data }.to_json(now);
        let number = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
        for port in &self.ports {
            port.send(number, &event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_reach_a_client_that_negotiated_and_are_bounded() {
        let port = Arc::new(Port::new().unwrap());
        let mut bus = Bus::default();
        bus.add(Arc::clone(&port));
        bus.send("STOP", None);
        assert!(port.take(u64::MAX).is_empty());
        port.listen(true);
        for _ in 0..MAX_EVENTS + 5 {
            bus.send("STOP", None);
        }
        let before = bus.sent() - 5 - 1;
        assert_eq!(port.take(before).len(), MAX_EVENTS - 1);
        assert_eq!(port.take(u64::MAX).len(), 1);
        assert_eq!(port.dropped(), 5);
        bus.send("RESUME", None);
        port.listen(false);
        assert!(port.take(u64::MAX).is_empty());
    }
}
