#![forbid(unsafe_code)]
//! Where the pager thread waits: in a ring, or in epoll(7) where io_uring is refused.

use std::fmt;
use std::fs::File;
use std::io;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use userfaultfd::Uffd;

use crate::fault::{MESSAGE_BYTES, Message, messages};
use crate::poller::Poller;
use crate::source::ReadDone;
use crate::sys::uring::{Completion, MESSAGES_PER_READ, Ring, UffdWait};
use crate::token::ClientSlot;

/// Which way messages and bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPath {
    /// One ring; a READ of the userfaultfd is pending in it.
    UringRead,
    /// One ring; it polls the userfaultfd, read(2) takes the messages.
    UringPoll,
    /// epoll(7) and pread(2).
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
    pub(crate) messages: Vec<(ClientSlot, Message)>,
    /// Clients that may have more messages, to be read.
    pub(crate) more: Vec<ClientSlot>,
    /// Clients whose wait for messages is over, to be armed again.
    pub(crate) unarmed: Vec<ClientSlot>,
    /// Clients whose process ended.
    pub(crate) gone: Vec<ClientSlot>,
    pub(crate) reads: Vec<ReadDone>,
    pub(crate) bell: bool,
}

impl Inbox {
    /// Room for a few batches, so that nothing is allocated per fault.
    pub(crate) fn new() -> Self {
        Self {
            messages: Vec::with_capacity(4 * MESSAGES_PER_READ),
            reads: Vec::with_capacity(MESSAGES_PER_READ),
            ..Self::default()
        }
    }
}

impl Inbox {
    /// Nothing of it is for the client that had this place, which is free for another.
    pub(crate) fn forget(&mut self, slot: ClientSlot) {
        self.messages.retain(|(of, _)| *of != slot);
        for slots in [&mut self.more, &mut self.unarmed, &mut self.gone] {
            slots.retain(|of| *of != slot);
        }
    }
}

/// Takes unread messages off `uffd`, at most `room` of them, until there are none.
pub(crate) fn drain(uffd: &Uffd, room: usize, each: &mut dyn FnMut(Message)) -> io::Result<()> {
    let mut buffer = [0; MESSAGES_PER_READ * MESSAGE_BYTES];
    let mut left = room;
    while left >= MESSAGES_PER_READ {
        match read_now(uffd, &mut buffer) {
            Ok(bytes) => {
                messages(&buffer[..bytes]).for_each(&mut *each);
                // Fewer than fit: there were no more.
                if bytes < buffer.len() {
                    return Ok(());
                }
                left -= MESSAGES_PER_READ;
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Reads without waiting, even if somebody who shares the descriptor made it a blocking one. Kernels
/// that cannot be told so (before 6.10) go by the descriptor: there it is asked first whether it can be
/// waited for.
fn read_now(uffd: &Uffd, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    // Not at any offset.
    const HERE: u64 = u64::MAX;
    let mut buffers = [IoSliceMut::new(buffer)];
    match preadv2(uffd, &mut buffers, HERE, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::SPIPE | Errno::NOSYS) => read_ready(uffd, buffer),
        result => result,
    }
}

fn read_ready(uffd: &Uffd, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    let mut fds = [PollFd::new(uffd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default()))?;
    let events = fds[0].revents();
    if events.contains(PollFlags::ERR) {
        make_nonblocking(uffd);
    }
    if !events.contains(PollFlags::IN) {
        return Err(Errno::AGAIN);
    }
    rustix::io::read(uffd, buffer)
}

/// Undoes what somebody who shares the descriptor did to it: the poll of a blocking userfaultfd is an
/// error at once, and its read may wait for ever.
pub(crate) fn make_nonblocking(uffd: &Uffd) {
    let flags = fcntl_getfl(uffd).unwrap_or(OFlags::RDWR);
    if let Err(error) = fcntl_setfl(uffd, flags | OFlags::NONBLOCK) {
        tracing::debug!(%error, "a userfaultfd stays a blocking one");
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

/// The wait of one shard.
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

    /// From now on reads may name `file` by `number`.
    pub(crate) fn add_file(&mut self, number: usize, file: &Arc<File>) {
        if let Self::Ring(ring) = self {
            ring.add_file(number, file);
        }
    }

    /// Waits for a client: for its messages when it is armed, and for the end of its process.
    pub(crate) fn watch(
        &mut self,
        uffd: &Arc<Uffd>,
        pidfd: Option<OwnedFd>,
    ) -> io::Result<ClientSlot> {
        let pidfd = pidfd.map(Arc::new);
        match self {
            Self::Ring(ring) => Ok(ring.watch(Arc::clone(uffd), pidfd)),
            Self::Poll(poller) => poller.watch(Arc::clone(uffd), pidfd),
        }
    }

    /// Waits for a client no longer.
    pub(crate) fn unwatch(&mut self, slot: ClientSlot) {
        match self {
            Self::Ring(ring) => ring.unwatch(slot),
            Self::Poll(poller) => poller.unwatch(slot),
        }
    }

    /// Waits for the next messages of a client; goes to the kernel with the next submission. False
    /// when there is no room for that now.
    pub(crate) fn arm(&mut self, slot: ClientSlot) -> bool {
        match self {
            Self::Ring(ring) => ring.arm(slot),
            Self::Poll(poller) => poller.arm(slot),
        }
    }

    /// Submits the reads that were started and collects what is complete already. False, and
    /// nothing happened, when there are none to submit.
    pub(crate) fn submit(&mut self, inbox: &mut Inbox) -> io::Result<bool> {
        let Self::Ring(ring) = self else {
            return Ok(false);
        };
        if !ring.has_unsubmitted_reads() {
            return Ok(false);
        }
        ring.submit()?;
        collect(ring, inbox);
        Ok(true)
    }

    /// Submits what is queued and collects what is complete already, without waiting.
    pub(crate) fn look(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        if let Self::Ring(ring) = self {
            ring.submit()?;
            collect(ring, inbox);
        }
        Ok(())
    }

    /// Waits until something happens, within `limits`.
    pub(crate) fn wait(&mut self, limits: WaitLimits, inbox: &mut Inbox) -> io::Result<()> {
        match self {
            Self::Ring(ring) => {
                if !ring.spin(limits)? {
                    ring.wait(limits.total)?;
                }
                collect(ring, inbox);
                Ok(())
            }
            // Without a ring looking costs as many calls as sleeping: not worth it.
            Self::Poll(poller) => poller.wait(limits.total, inbox),
        }
    }

    /// Takes back the pending wait for messages; what it had read comes into the inbox.
    pub(crate) fn disarm(&mut self, slot: ClientSlot) {
        match self {
            Self::Ring(ring) => ring.disarm(slot),
            Self::Poll(poller) => poller.disarm(slot),
        }
    }

    /// Whether the kernel may still hand messages to a pending wait.
    pub(crate) fn is_armed(&self, slot: ClientSlot) -> bool {
        match self {
            Self::Ring(ring) => ring.is_armed(slot),
            Self::Poll(_) => false,
        }
    }
}

fn collect(ring: &mut Ring, inbox: &mut Inbox) {
    while let Some(completion) = ring.next() {
        match completion {
            Completion::Messages(slot, bytes) => {
                let count = inbox.messages.len();
                inbox
                    .messages
                    .extend(messages(bytes).map(|message| (slot, message)));
                if inbox.messages.len() - count == MESSAGES_PER_READ {
                    inbox.more.push(slot);
                }
                inbox.unarmed.push(slot);
            }
            Completion::MessagesReady(slot) => {
                inbox.more.push(slot);
                inbox.unarmed.push(slot);
            }
            Completion::Gone(slot) => inbox.gone.push(slot),
            Completion::Bell => inbox.bell = true,
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_in_a_place_gets_nothing_of_who_was_there() {
        let (left, stays) = (ClientSlot::new(3), ClientSlot::new(4));
        let message = || Message::Unexpected { event: 1 };
        let mut inbox = Inbox::new();
        for slot in [left, stays, left] {
            inbox.messages.push((slot, message()));
            inbox.more.push(slot);
            inbox.unarmed.push(slot);
            inbox.gone.push(slot);
        }
        inbox.forget(left);
        assert!(inbox.messages.iter().all(|(slot, _)| *slot == stays));
        for slots in [&inbox.more, &inbox.unarmed, &inbox.gone] {
            assert_eq!(slots[..], [stays]);
        }
    }
}
