#![forbid(unsafe_code)]
//! The way out: at once where possible, through a bounded queue where not.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::error::ConsoleError;

/// How much output waits for a reader; the oldest is dropped, and counted, beyond that.
pub const BACKLOG_BYTES: usize = 64 * 1024;
/// Most that one write gives to a descriptor that could not be made non-blocking: what fits into
/// whatever says that it is writable.
const CAREFUL_WRITE_BYTES: usize = 512;
/// How long queued output may take to go out when a console is dropped.
const DRAIN_TIME: Duration = Duration::from_millis(200);

/// Where output goes at the moment.
#[derive(Debug)]
pub(super) enum Sink {
    /// Nowhere, for good.
    Discard,
    /// Into the queue, until somebody comes.
    Absent,
    /// To a descriptor.
    Open {
        fd: Arc<OwnedFd>,
        /// The descriptor is shared with others who expect it to block.
        blocking: bool,
        /// What becomes of output when the other end is gone: it is kept for the next.
        next_may_come: bool,
    },
}

/// Where the UART writes to; never blocks. Cheap to clone: all clones are the same way out.
#[derive(Debug, Clone)]
pub struct ConsoleOutput {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    outlet: Mutex<Outlet>,
    /// Wakes the console's thread.
    wake: OwnedFd,
    /// The thread has input that the UART had no room for.
    hungry: AtomicBool,
    stop: AtomicBool,
}

#[derive(Debug)]
struct Outlet {
    sink: Sink,
    queue: VecDeque<u8>,
    dropped_bytes: u64,
}

/// Tells the console's thread that the guest has read all input. Cheap to clone.
#[derive(Debug, Clone)]
pub(in super::super) struct ConsoleWaker {
    shared: Arc<Shared>,
}

impl ConsoleWaker {
    /// Wakes the thread if it waits for the guest. Never blocks.
    pub(in super::super) fn wake(&self) {
        if self.shared.hungry.swap(false, Ordering::AcqRel) {
            self.shared.wake();
        }
    }
}

impl Shared {
    fn wake(&self) {
        // A full counter is a wake-up that is still pending.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Outlet> {
        self.outlet.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleOutput {
    pub(super) fn new(sink: Sink) -> Result<Self, ConsoleError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| ConsoleError::Event(errno.into()))?;
        let outlet = Outlet {
            sink,
            queue: VecDeque::new(),
            dropped_bytes: 0,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                outlet: Mutex::new(outlet),
                wake,
                hungry: AtomicBool::new(false),
                stop: AtomicBool::new(false),
            }),
        })
    }

    pub(in super::super) fn waker(&self) -> ConsoleWaker {
        ConsoleWaker {
            shared: Arc::clone(&self.shared),
        }
    }

    /// The event on which the thread waits.
    pub(super) fn wake_fd(&self) -> &OwnedFd {
        &self.shared.wake
    }

    /// Forgets wake-ups; says whether the thread is to end.
    pub(super) fn acknowledge(&self) -> bool {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Tells the thread to end.
    pub(super) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// Asks to be woken when the guest has read all input, or not any more.
    pub(super) fn set_hungry(&self, hungry: bool) {
        self.shared.hungry.store(hungry, Ordering::Release);
    }

    /// From now on output goes there, what waits in the queue first.
    pub(super) fn redirect(&self, sink: Sink) {
        let mut outlet = self.shared.lock();
        outlet.sink = sink;
        outlet.flush();
    }

    /// A client has come: it gets what waits in the queue.
    pub(super) fn connect(&self, fd: Arc<OwnedFd>) {
        let mut outlet = self.shared.lock();
        outlet.sink = Sink::Open {
            fd,
            blocking: false,
            next_may_come: true,
        };
        outlet.flush();
    }

    /// The client has gone.
    pub(super) fn disconnect(&self) {
        self.shared.lock().sink = Sink::Absent;
    }

    /// Sends what waits; the descriptor to wait for, if it did not take everything.
    pub(super) fn flush_queue(&self) -> Option<Arc<OwnedFd>> {
        let mut outlet = self.shared.lock();
        outlet.flush();
        match &outlet.sink {
            Sink::Open { fd, .. } if !outlet.queue.is_empty() => Some(Arc::clone(fd)),
            _ => None,
        }
    }

    pub(super) fn dropped_bytes(&self) -> u64 {
        self.shared.lock().dropped_bytes
    }

    /// Gives queued output a moment to go out.
    pub(super) fn drain(&self) {
        let deadline = Instant::now() + DRAIN_TIME;
        while let Some(fd) = self.flush_queue() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let timeout = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::new(&*fd, PollFlags::OUT)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(1..) | Err(Errno::INTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
    }
}

impl Write for ConsoleOutput {
    /// Takes all bytes: what cannot go out is queued, and dropped when the queue is full.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let needs_thread = self.shared.lock().put(bytes);
        if needs_thread {
            self.shared.wake();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outlet {
    /// Sends or queues; says whether the thread now has something to wait for.
    fn put(&mut self, bytes: &[u8]) -> bool {
        if matches!(self.sink, Sink::Discard) {
            return false;
        }
        let was_empty = self.queue.is_empty();
        let sent = if was_empty { self.send(bytes) } else { 0 };
        let rest = &bytes[sent..];
        match self.sink {
            Sink::Discard => {
                self.dropped_bytes += rest.len() as u64;
                false
            }
            Sink::Absent => {
                self.enqueue(rest);
                false
            }
            Sink::Open { .. } => {
                self.enqueue(rest);
                was_empty && !rest.is_empty()
            }
        }
    }

    fn enqueue(&mut self, bytes: &[u8]) {
        self.queue.extend(bytes);
        let excess = self.queue.len().saturating_sub(BACKLOG_BYTES);
        if excess > 0 {
            if self.dropped_bytes == 0 {
                tracing::warn!("nobody reads the serial console: the oldest output is dropped");
            }
            self.queue.drain(..excess);
            self.dropped_bytes += excess as u64;
        }
    }

    /// Sends from the queue until it is empty or the other end takes no more.
    fn flush(&mut self) {
        while !self.queue.is_empty() {
            let (front, _) = self.queue.as_slices();
            let front = front.to_vec();
            let sent = self.send(&front);
            if sent == 0 {
                break;
            }
            self.queue.drain(..sent);
        }
        if matches!(self.sink, Sink::Discard) {
            self.dropped_bytes += self.queue.len() as u64;
            self.queue.clear();
        }
    }

    /// Writes what the other end takes at once. When it is gone, the sink changes.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            let Sink::Open {
                fd,
                blocking,
                next_may_come,
            } = &self.sink
            else {
                break;
            };
            let mut chunk = &bytes[sent..];
            if *blocking {
                if !is_writable(fd) {
                    break;
                }
                chunk = &chunk[..chunk.len().min(CAREFUL_WRITE_BYTES)];
            }
            match rustix::io::write(&**fd, chunk) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    if *next_may_come {
                        self.sink = Sink::Absent;
                    } else {
                        tracing::warn!(%errno, "serial output is dropped from now on");
                        self.sink = Sink::Discard;
                    }
                }
            }
        }
        sent
    }
}

fn is_writable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::OUT)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
}
