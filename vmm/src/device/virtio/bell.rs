#![forbid(unsafe_code)]
//! What wakes a worker: its thread's own token, or, where it also waits for a descriptor, an event beside
//! that one.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A bell: what is rung before somebody sleeps is not lost.
#[derive(Debug, Default)]
pub(super) struct Bell(OnceLock<OwnedFd>);

impl Bell {
    /// Makes the event. Before the thread is started.
    pub(super) fn hang(&self) -> io::Result<()> {
        if self.0.get().is_none() {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            // Nobody else makes one.
            let _ = self.0.set(event);
        }
        Ok(())
    }

    /// Wakes the thread.
    pub(super) fn ring(&self, thread: &Thread) {
        match self.0.get() {
            // A full counter is a bell that was rung.
            Some(event) => drop(rustix::io::write(event, &1_u64.to_ne_bytes())),
            None => thread.unpark(),
        }
    }

    /// Sleeps until the bell is rung, the source is readable, or it is `until`; whether the source is readable.
    pub(super) fn sleep(&self, source: Option<&OwnedFd>, until: Option<Instant>) -> bool {
        let time = until.map(|until| until.saturating_duration_since(Instant::now()));
        let Some(event) = self.0.get() else {
            match time {
                Some(time) => thread::park_timeout(time),
                None => thread::park(),
            }
            return false;
        };
        let mut descriptors = vec![PollFd::new(event, PollFlags::IN)];
        descriptors.extend(source.map(|source| PollFd::new(source, PollFlags::IN)));
        // Interrupted, or out of memory: whoever sleeps looks around and sleeps again.
        let _ = poll(&mut descriptors, time.map(timespec).as_ref());
        let is_ready = |at: usize| {
            descriptors
                .get(at)
                .is_some_and(|descriptor| !descriptor.revents().is_empty())
        };
        let (has_rung, has_input) = (is_ready(0), is_ready(1));
        if has_rung {
            let _ = rustix::io::read(event, &mut [0_u8; 8]);
        }
        has_input
    }
}

/// A time that the kernel takes; one that is longer than it can count is that long.
fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}
