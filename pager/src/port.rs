#![forbid(unsafe_code)]
//! Where the pager thread waits: in a ring, or in poll(2) where io_uring is refused.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use userfaultfd::Uffd;

use crate::fault::{MESSAGE_BYTES, Message, messages};
use crate::source::ReadDone;
use crate::sys::uring::{Completion, MESSAGES_PER_READ, Ring, UffdWait};

/// Which way messages and bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPath {
    /// One ring; a READ of the userfaultfd is pending in it.
    UringRead,
    /// One ring; it polls the userfaultfd, read(2) takes the messages.
    UringPoll,
    /// poll(2) and pread(2).
    Pread,
}

impl IoPath {
    pub(crate) const ALL: [Self; 3] = [Self::UringRead, Self::UringPoll, Self::Pread];

    /// The label of `pando_pager_io_info`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UringRead => "uring_read",
            Self::UringPoll => "uring_poll",
            Self::Pread => "pread",
        }
    }
}

impl fmt::Display for IoPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What came in and is not handled yet. Vectors are emptied and used again.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) messages: Vec<Message>,
    pub(crate) reads: Vec<ReadDone>,
    pub(crate) stop: bool,
}

impl Inbox {
    /// Room for a few batches, so that nothing is allocated per fault.
    pub(crate) fn new() -> Self {
        Self {
            messages: Vec::with_capacity(4 * MESSAGES_PER_READ),
            reads: Vec::with_capacity(MESSAGES_PER_READ),
            stop: false,
        }
    }

    /// Takes every unread message off `uffd`; at most `room` more.
    pub(crate) fn drain(&mut self, uffd: &Uffd, room: usize) -> io::Result<()> {
        let mut buffer = [0; MESSAGES_PER_READ * MESSAGE_BYTES];
        let limit = self.messages.len() + room;
        while self.messages.len() + MESSAGES_PER_READ <= limit {
            match rustix::io::read(uffd, &mut buffer) {
                Ok(bytes) => {
                    self.messages.extend(messages(&buffer[..bytes]));
                    // Fewer than fit: there were no more.
                    if bytes < buffer.len() {
                        return Ok(());
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitLimits {
    /// Awake, at first.
    pub(crate) spin: Duration,
    /// Altogether; `None` for as long as it takes.
    pub(crate) total: Option<Duration>,
}

/// The wait of one pager.
#[derive(Debug)]
pub(crate) enum Port {
    Ring(Box<Ring>),
    Poll(Poller),
}

impl Port {
    pub(crate) fn path(&self) -> IoPath {
        match self {
            Self::Ring(ring) if ring.uffd_wait() == UffdWait::Read => IoPath::UringRead,
            Self::Ring(_) => IoPath::UringPoll,
            Self::Poll(_) => IoPath::Pread,
        }
    }

    /// The ring, for reads to be put into.
    pub(crate) fn ring(&mut self) -> Option<&mut Ring> {
        match self {
            Self::Ring(ring) => Some(ring),
            Self::Poll(_) => None,
        }
    }

    /// Submits the reads that were started and collects what is complete already. False, and
    /// nothing happened, when there are none to submit.
    pub(crate) fn submit(
        &mut self,
        uffd: &Uffd,
        room: usize,
        inbox: &mut Inbox,
    ) -> io::Result<bool> {
        let Self::Ring(ring) = self else {
            return Ok(false);
        };
        if !ring.has_unsubmitted_reads() {
            return Ok(false);
        }
        // The wait for messages goes with the reads: one call for both.
        ring.arm(room >= MESSAGES_PER_READ);
        ring.submit()?;
        collect(ring, uffd, room, inbox)?;
        Ok(true)
    }

    /// Waits until something happens, within `limits`. Messages are taken only while there is
    /// `room` for them.
    pub(crate) fn wait(
        &mut self,
        uffd: &Uffd,
        room: usize,
        limits: WaitLimits,
        inbox: &mut Inbox,
    ) -> io::Result<()> {
        match self {
            Self::Ring(ring) => {
                ring.arm(room >= MESSAGES_PER_READ);
                if !ring.spin(limits)? {
                    ring.wait(limits.total)?;
                }
                collect(ring, uffd, room, inbox)
            }
            // Without a ring looking costs as many calls as sleeping: not worth it.
            Self::Poll(poller) => poller.wait(uffd, room, limits.total, inbox),
        }
    }

    /// Takes back the pending wait for messages; what it had read comes into the inbox.
    pub(crate) fn disarm(&mut self) {
        if let Self::Ring(ring) = self {
            ring.disarm();
        }
    }

    /// Whether the kernel may still hand messages to a pending wait.
    pub(crate) fn is_armed(&self) -> bool {
        match self {
            Self::Ring(ring) => ring.is_armed(),
            Self::Poll(_) => false,
        }
    }
}

fn collect(ring: &mut Ring, uffd: &Uffd, room: usize, inbox: &mut Inbox) -> io::Result<()> {
    let mut more = false;
    while let Some(completion) = ring.next() {
        match completion {
            Completion::Messages(bytes) => {
                inbox.messages.extend(messages(bytes));
                more |= bytes.len() == MESSAGES_PER_READ * MESSAGE_BYTES;
            }
            Completion::MessagesReady => more = true,
            Completion::Stop => inbox.stop = true,
            Completion::Read {
                slot,
                lease,
                result,
            } => inbox.reads.push(ReadDone {
                slot,
                lease,
                result: usize::try_from(result).map_err(|_| -result),
            }),
        }
    }
    if more {
        inbox.drain(uffd, room.saturating_sub(inbox.messages.len()))?;
    }
    Ok(())
}

/// The wait without a ring.
#[derive(Debug)]
pub(crate) struct Poller {
    stop: Arc<OwnedFd>,
    /// Readable when a reading thread is done.
    signal: Arc<OwnedFd>,
}

impl Poller {
    pub(crate) fn new(stop: Arc<OwnedFd>, signal: Arc<OwnedFd>) -> Self {
        Self { stop, signal }
    }

    fn wait(
        &self,
        uffd: &Uffd,
        room: usize,
        limit: Option<Duration>,
        inbox: &mut Inbox,
    ) -> io::Result<()> {
        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let none = PollFlags::empty();
        let want = |wanted: bool| if wanted { PollFlags::IN } else { none };
        let mut fds = [
            PollFd::from_borrowed_fd(uffd.as_fd(), want(room >= MESSAGES_PER_READ)),
            // Once seen it stays readable.
            PollFd::from_borrowed_fd(self.stop.as_fd(), want(!inbox.stop)),
            PollFd::from_borrowed_fd(self.signal.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [messages, stop, signal] = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        inbox.stop |= stop;
        if signal {
            let _empty = rustix::io::read(&self.signal, &mut [0; 8]);
        }
        if messages {
            inbox.drain(uffd, room)?;
        }
        Ok(())
    }
}
