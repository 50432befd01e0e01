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

/// What a monitor asks of the machine's thread.
pub enum Ask {
    /// A QMP command, with descriptors that came with it.
    Qmp(Request, Vec<OwnedFd>, Sender<Result<Value, QmpError>>),
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
    queue: Mutex<VecDeque<Value>>,
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

    fn send(&self, event: &Value) {
        if !self.listening.load(Ordering::Acquire) {
            return;
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= MAX_EVENTS {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.push_back(event.clone());
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

    /// What waits, oldest first.
    pub fn take(&self) -> Vec<Value> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.drain(..).collect()
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
}

impl Bus {
    /// Adds a monitor.
    pub fn add(&mut self, port: Arc<Port>) {
        self.ports.push(port);
    }

    /// Tells all clients.
    pub fn send(&self, name: &'static str, data: Option<Value>) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        tracing::debug!(target: "pando_vmm::qemu::qmp", name, "event");
        let event = Event { name, data }.to_json(now);
        for port in &self.ports {
            port.send(&event);
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
        assert!(port.take().is_empty());
        port.listen(true);
        for _ in 0..MAX_EVENTS + 5 {
            bus.send("STOP", None);
        }
        assert_eq!(port.take().len(), MAX_EVENTS);
        assert_eq!(port.dropped(), 5);
        bus.send("RESUME", None);
        port.listen(false);
        assert!(port.take().is_empty());
    }
}
