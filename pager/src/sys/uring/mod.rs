// UNSAFETY: entries pushed to the ring hold raw addresses of buffers that the kernel writes to
// later. The ring owns every such buffer from the push to the completion, and leaks it when the
// kernel cannot be made to let go of it.
#![expect(unsafe_code, reason = "submission entries with raw buffer addresses")]
//! The ring: messages of all clients, template reads and the bell, waited for in one call.

mod build;
mod end;
mod watch;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use userfaultfd::Uffd;

use super::buffers::{BufferPool, Lease};
use crate::fault::MESSAGE_BYTES;
use crate::port::{WaitLimits, make_nonblocking};
use crate::token::{ClientSlot, ReadSlot, Token};
use build::{Entries, build};
use watch::{Watch, Watched};

pub(crate) use build::probe;

/// Messages that one read of a userfaultfd takes.
pub(crate) const MESSAGES_PER_READ: usize = 64;
const MESSAGE_BUFFER_BYTES: usize = MESSAGES_PER_READ * MESSAGE_BYTES;
/// Reads after which the buffers are registered: pinning them costs a tenth of a millisecond and
/// their memory, and a clone that reads little should pay neither.
const REGISTER_AFTER_READS: u32 = 64;
/// Files that the ring knows by number; reads of further ones name a descriptor.
const FIXED_FILES: usize = 64;
/// Requests of clients that are submitted at once; more take another call.
const CLIENTS_AT_ONCE: usize = 128;
/// Completions that fit without the kernel keeping a list: two of each client, up to this.
const MOST_COMPLETIONS: usize = 8192;

/// How a ring waits for messages of a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UffdWait {
    /// A READ stays pending in the kernel and brings the messages with it.
    Read,
    /// A POLL says when there are some; read(2) gets them.
    Poll,
}

/// Whether the kernel holds the read buffers pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Buffers {
    /// Not yet.
    Later,
    /// They are.
    Registered,
    /// It refused (memlock): reads name them by address.
    Unregistered,
}

/// What the ring reports.
#[derive(Debug)]
pub(crate) enum Completion<'a> {
    /// Messages read by the kernel; empty if it could not. The request must be armed again.
    Messages(ClientSlot, &'a [u8]),
    /// There are messages to be read. The request must be armed again.
    MessagesReady(ClientSlot),
    /// The client's process ended.
    Gone(ClientSlot),
    /// Somebody rang.
    Bell,
    /// A read is over; a negative result is an errno.
    Read {
        slot: ReadSlot,
        lease: Lease,
        result: i32,
    },
}

/// An io_uring with the buffers that are in it.
pub(crate) struct Ring {
    ring: IoUring,
    /// By number of the image.
    files: Vec<Option<Arc<File>>>,
    files_registered: bool,
    buffers: Buffers,
    arena: libc::iovec,
    reads: u32,
    bell: Arc<OwnedFd>,
    bell_armed: bool,
    wait: UffdWait,
    watch: Watch,
    in_flight: Vec<Option<Lease>>,
    unsubmitted_reads: usize,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("wait", &self.wait)
            .field("files_registered", &self.files_registered)
            .field("buffers", &self.buffers)
            .field("in_flight", &self.in_flight.iter().flatten().count())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for the calling thread, which must be the only one to use it, and at most `clients`
    /// clients. It tries to wait for messages by `wait`, and polls where the kernel cannot READ
    /// them without a worker thread.
    pub(crate) fn new(
        pool: &BufferPool,
        bell: Arc<OwnedFd>,
        wait: UffdWait,
        clients: usize,
    ) -> io::Result<Self> {
        let reads = pool.capacity();
        let number = |entries: usize| u32::try_from(entries).unwrap_or(u32::MAX);
        let submissions = reads + 2 * clients.min(CLIENTS_AT_ONCE) + 4;
        let completions = (2 * (clients + reads) + 8).min(MOST_COMPLETIONS);
        let (ring, deferred) = build(Entries {
            submissions: number(submissions.next_power_of_two()),
            completions: number(completions.next_power_of_two()),
        })?;
        let files_registered = ring.submitter().register_files(&[-1; FIXED_FILES]).is_ok();
        let mut ring = Self {
            ring,
            files: Vec::new(),
            files_registered,
            buffers: Buffers::Later,
            arena: pool.iovec(),
            reads: 0,
            bell,
            bell_armed: false,
            wait,
            watch: Watch::default(),
            in_flight: (0..reads).map(|_| None).collect(),
            unsubmitted_reads: 0,
        };
        // Kernels without deferred task work (before 6.1) may wait for all requests to end before
        // they register anything: there it must happen before the first.
        if !deferred {
            ring.register_buffers();
        }
        Ok(ring)
    }

    fn register_buffers(&mut self) {
        // SAFETY: registration pins the arena, and reads into it are only submitted together with
        // a lease, which `in_flight` keeps and which keeps the arena mapped.
        let registered = unsafe { self.ring.submitter().register_buffers(&[self.arena]) };
        self.buffers = match registered {
            Ok(()) => Buffers::Registered,
            Err(error) => {
                tracing::debug!(%error, "read buffers are not registered with the ring");
                Buffers::Unregistered
            }
        };
    }

    /// From now on `file` can be read as number `number`.
    pub(crate) fn add_file(&mut self, number: usize, file: &Arc<File>) {
        if self.files.len() <= number {
            self.files.resize(number + 1, None);
        }
        if self.files[number].is_some() {
            return;
        }
        self.files[number] = Some(Arc::clone(file));
        if self.files_registered && number < FIXED_FILES {
            let at = u32::try_from(number).unwrap_or(u32::MAX);
            let update = self.ring.submitter();
            let update = update.register_files_update(at, &[file.as_raw_fd()]);
            // Without it all reads name descriptors.
            self.files_registered = update.is_ok();
        }
    }

    /// Waits for `uffd` (when armed) and for the end of a process.
    pub(crate) fn watch(&mut self, uffd: Arc<Uffd>, pidfd: Option<Arc<OwnedFd>>) -> ClientSlot {
        let slot = self.watch.add(Watched::new(uffd, pidfd));
        if let Some(watched) = self.watch.get(slot)
            && let Some(pidfd) = &watched.pidfd
        {
            let poll = opcode::PollAdd::new(Fd(pidfd.as_raw_fd()), POLL_IN).build();
            let pushed = self.push(poll, Token::Gone(slot));
            if let Some(watched) = self.watch.get_mut(slot) {
                watched.watches_end = pushed;
            }
        }
        slot
    }

    /// Waits for a client no longer. What it had pending is taken back.
    pub(crate) fn unwatch(&mut self, slot: ClientSlot) {
        let Some(watched) = self.watch.get_mut(slot) else {
            return;
        };
        watched.is_closing = true;
        let watches_end = watched.watches_end;
        self.disarm(slot);
        if watches_end {
            let cancel = opcode::AsyncCancel::new(Token::Gone(slot).encode()).build();
            self.push(cancel, Token::Cancel);
        }
        self.watch.settle(slot);
    }

    /// How this ring waits for messages.
    pub(crate) fn uffd_wait(&self) -> UffdWait {
        self.wait
    }

    /// Queues the wait for messages of a client, unless it is pending; false when there is no room.
    pub(crate) fn arm(&mut self, slot: ClientSlot) -> bool {
        let wait = self.wait;
        let Some(watched) = self.watch.get_mut(slot) else {
            return true;
        };
        if watched.is_armed || watched.is_closing {
            return true;
        }
        let fd = Fd(watched.uffd.as_raw_fd());
        let length = u32::try_from(MESSAGE_BUFFER_BYTES).unwrap_or(0);
        let entry = match wait {
            UffdWait::Read => opcode::Read::new(fd, watched.messages.as_mut_ptr(), length).build(),
            UffdWait::Poll => opcode::PollAdd::new(fd, POLL_IN).build(),
        };
        let pushed = self.push(entry, Token::Uffd(slot));
        if let Some(watched) = self.watch.get_mut(slot) {
            watched.is_armed = pushed;
        }
        pushed
    }

    fn arm_bell(&mut self) {
        if !self.bell_armed {
            let poll = opcode::PollAdd::new(Fd(self.bell.as_raw_fd()), POLL_IN).build();
            self.bell_armed = self.push(poll, Token::Bell);
        }
    }

    /// Queues a read of `bytes` bytes of a file into a lease, which the ring keeps until it
    /// reports the completion. Gives the lease back when there is no room.
    pub(crate) fn read(
        &mut self,
        slot: ReadSlot,
        file: usize,
        offset: u64,
        bytes: usize,
        lease: Lease,
    ) -> Result<(), Lease> {
        let free = matches!(self.in_flight.get(slot.index()), Some(None));
        let length = u32::try_from(bytes.min(lease.len())).unwrap_or(0);
        let (Some(Some(known)), true) = (self.files.get(file), free) else {
            return Err(lease);
        };
        let raw = known.as_raw_fd();
        let address = lease.address();
        let index = u32::try_from(file).unwrap_or(u32::MAX);
        self.reads = self.reads.saturating_add(1);
        if self.buffers == Buffers::Later && self.reads > REGISTER_AFTER_READS {
            self.register_buffers();
        }
        let registered = self.buffers == Buffers::Registered;
        let fixed = self.files_registered && file < FIXED_FILES;
        let entry = match (fixed, registered) {
            (true, true) => opcode::ReadFixed::new(Fixed(index), address, length, 0)
                .offset(offset)
                .build(),
            (true, false) => opcode::Read::new(Fixed(index), address, length)
                .offset(offset)
                .build(),
            (false, true) => opcode::ReadFixed::new(Fd(raw), address, length, 0)
                .offset(offset)
                .build(),
            (false, false) => opcode::Read::new(Fd(raw), address, length)
                .offset(offset)
                .build(),
        };
        if !self.push(entry, Token::Read(slot)) {
            return Err(lease);
        }
        self.unsubmitted_reads += 1;
        self.in_flight[slot.index()] = Some(lease);
        Ok(())
    }

    /// Whether reads are queued that the kernel has not seen yet.
    pub(crate) fn has_unsubmitted_reads(&self) -> bool {
        self.unsubmitted_reads > 0
    }

    /// Queues an entry; with a full queue, everything before it is submitted first.
    fn push(&mut self, entry: squeue::Entry, token: Token) -> bool {
        let entry = entry.user_data(token.encode());
        if self.ring.submission().is_full() && self.ring.submit().is_err() {
            return false;
        }
        // SAFETY: what the entry points to is owned by this ring (message buffers, leases, files)
        // and outlives the request: `drop` waits for it, or leaks the buffer.
        unsafe { self.ring.submission().push(&entry) }.is_ok()
    }

    /// Hands everything queued to the kernel without waiting. Reads from the page cache are
    /// complete when this returns.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.arm_bell();
        self.unsubmitted_reads = 0;
        settle(self.ring.submit())
    }

    /// Hands everything queued to the kernel and waits for a completion, at most `limit`.
    pub(crate) fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.arm_bell();
        self.unsubmitted_reads = 0;
        let result = match limit {
            None => self.ring.submit_and_wait(1),
            Some(limit) => {
                let time = Timespec::from(limit);
                let args = SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        settle(result)
    }

    /// Looks for a completion without sleeping, for as long as `limits` say. Whether there is one.
    pub(crate) fn spin(&mut self, limits: WaitLimits) -> io::Result<bool> {
        let limit = limits.spin.min(limits.total.unwrap_or(limits.spin));
        if limit.is_zero() {
            return Ok(false);
        }
        self.submit()?;
        let started = Instant::now();
        loop {
            if !self.ring.completion().is_empty() {
                return Ok(true);
            }
            // Work that the kernel wants this thread to do before it can complete.
            if self.ring.submission().taskrun() {
                self.submit()?;
                continue;
            }
            if started.elapsed() >= limit {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Takes one completion, if there is one.
    pub(crate) fn next(&mut self) -> Option<Completion<'_>> {
        loop {
            let entry = self.ring.completion().next()?;
            let result = entry.result();
            match Token::decode(entry.user_data()) {
                Some(Token::Uffd(slot)) => {
                    if self.messages_completed(slot, result) {
                        return Some(self.messages(slot, result));
                    }
                }
                Some(Token::Gone(slot)) => {
                    let Some(watched) = self.watch.get_mut(slot) else {
                        continue;
                    };
                    watched.watches_end = false;
                    if watched.is_closing {
                        self.watch.settle(slot);
                    } else {
                        return Some(Completion::Gone(slot));
                    }
                }
                Some(Token::Bell) => {
                    self.bell_armed = false;
                    return Some(Completion::Bell);
                }
                Some(Token::Read(slot)) => {
                    let lease = self.in_flight.get_mut(slot.index()).and_then(Option::take);
                    if let Some(lease) = lease {
                        return Some(Completion::Read {
                            slot,
                            lease,
                            result,
                        });
                    }
                }
                Some(Token::Cancel | Token::Signal) | None => {}
            }
        }
    }

    /// Whether anybody is interested in what the wait for a client's messages came to.
    fn messages_completed(&mut self, slot: ClientSlot, result: i32) -> bool {
        let Some(watched) = self.watch.get_mut(slot) else {
            return false;
        };
        watched.is_armed = false;
        let wanted = !watched.is_closing;
        self.watch.settle(slot);
        if result == -libc::EAGAIN {
            // A kernel that cannot wait for them by READ.
            self.wait = UffdWait::Poll;
        }
        wanted
    }

    fn messages(&self, slot: ClientSlot, result: i32) -> Completion<'_> {
        if self.wait == UffdWait::Poll {
            let is_error = result > 0 && result & i32::from(libc::POLLERR) != 0;
            if let Some(watched) = self.watch.get(slot).filter(|_| is_error) {
                make_nonblocking(&watched.uffd);
            }
            return Completion::MessagesReady(slot);
        }
        let length = usize::try_from(result).unwrap_or(0);
        let buffer = self.watch.get(slot).map_or(&[][..], |watched| {
            &watched.messages[..length.min(MESSAGE_BUFFER_BYTES)]
        });
        Completion::Messages(slot, buffer)
    }

    /// Asks for the pending wait for messages back; it completes like any other.
    pub(crate) fn disarm(&mut self, slot: ClientSlot) {
        if self.is_armed(slot) {
            let cancel = opcode::AsyncCancel::new(Token::Uffd(slot).encode()).build();
            self.push(cancel, Token::Cancel);
        }
    }

    /// Whether a wait for messages is pending.
    pub(crate) fn is_armed(&self, slot: ClientSlot) -> bool {
        self.watch.get(slot).is_some_and(|watched| watched.is_armed)
    }
}

const POLL_IN: u32 = libc::POLLIN as u32;

/// A wait that ended early is no error: the caller looks at completions and waits again.
fn settle(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) => match error.raw_os_error() {
            // EBUSY, EAGAIN: the completion queue must be emptied first.
            Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(error),
        },
    }
}
