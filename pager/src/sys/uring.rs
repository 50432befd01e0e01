// UNSAFETY: entries pushed to the ring hold raw addresses of buffers that the kernel writes to
// later. The ring owns every such buffer from the push to the completion, and leaks it when the
// kernel cannot be made to let go of it.
#![expect(unsafe_code, reason = "submission entries with raw buffer addresses")]
//! The ring: userfaultfd messages, template reads and the stop signal, waited for in one call.

use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use userfaultfd::Uffd;

use super::buffers::{BufferPool, Lease};
use super::userfaultfd as uffd_sys;
use crate::fault::MESSAGE_BYTES;
use crate::port::WaitLimits;
use crate::token::{ReadSlot, Token};

/// Messages that one read of the userfaultfd takes.
pub(crate) const MESSAGES_PER_READ: usize = 64;
const MESSAGE_BUFFER_BYTES: usize = MESSAGES_PER_READ * MESSAGE_BYTES;
/// Reads after which the buffers are registered: pinning them costs a tenth of a millisecond and
/// their memory, and a clone that reads little should pay neither.
const REGISTER_AFTER_READS: u32 = 64;
/// How long `drop` waits for the kernel to give buffers back before it leaks them.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// How a ring waits for messages of the userfaultfd.
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
    Messages(&'a [u8]),
    /// There are messages to be read. The request must be armed again.
    MessagesReady,
    /// Somebody asked to stop.
    Stop,
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
    files: Vec<Arc<File>>,
    files_registered: bool,
    buffers: Buffers,
    arena: libc::iovec,
    reads: u32,
    uffd: Arc<Uffd>,
    stop: Arc<OwnedFd>,
    wait: UffdWait,
    messages: Box<[u8; MESSAGE_BUFFER_BYTES]>,
    uffd_armed: bool,
    stop_armed: bool,
    in_flight: Vec<Option<Lease>>,
    /// Result of the first wait for messages, if it was over before it was waited for.
    early: Option<i32>,
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

/// A ring of the best kind that this kernel makes; errors only when it makes none that can be
/// waited on with a time limit.
/// The flag says whether it defers its work to the waiting thread (kernels from 6.1).
fn build(entries: u32) -> io::Result<(IoUring, bool)> {
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    let is_deferred = deferred.is_ok();
    let ring = deferred
        .or_else(|_| {
            let mut builder = IoUring::builder();
            builder.setup_coop_taskrun().setup_taskrun_flag();
            builder.build(entries)
        })
        .or_else(|_| IoUring::new(entries))?;
    if !ring.params().is_feature_ext_arg() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    Ok((ring, is_deferred))
}

/// Whether a READ of a userfaultfd without messages stays pending, as it must; else it would
/// occupy a worker thread or fail at once. Seen on a throw-away userfaultfd, not deduced.
///
/// The userfaultfd is non-blocking: a kernel that can wait for it natively arms a poll and tries
/// again when that fires, one that cannot says EAGAIN at once.
pub(crate) fn probe() -> io::Result<UffdWait> {
    let (mut ring, _) = build(4)?;
    let (uffd, _) = uffd_sys::open()?;
    let mut buffer = [0u8; MESSAGE_BYTES];
    let length = u32::try_from(buffer.len()).unwrap_or(0);
    let read = opcode::Read::new(Fd(uffd.as_raw_fd()), buffer.as_mut_ptr(), length)
        .build()
        .user_data(Token::Uffd.encode());
    // SAFETY: `buffer` and `uffd` outlive the request: nothing is ever read from this userfaultfd,
    // as no memory is registered with it, and the request is cancelled below.
    unsafe { ring.submission().push(&read) }.map_err(|_| io::Error::other("ring is full"))?;
    ring.submit()?;
    if ring.completion().next().is_some() {
        return Ok(UffdWait::Poll);
    }
    let cancel = opcode::AsyncCancel::new(Token::Uffd.encode())
        .build()
        .user_data(Token::Cancel.encode());
    // SAFETY: the entry points to no memory.
    unsafe { ring.submission().push(&cancel) }.map_err(|_| io::Error::other("ring is full"))?;
    ring.submit_and_wait(2)?;
    Ok(UffdWait::Read)
}

impl Ring {
    /// A ring for the calling thread, which must be the only one to use it. It tries to wait for
    /// messages by `wait`, and polls where the kernel cannot READ them without a worker thread.
    pub(crate) fn new(
        files: Vec<Arc<File>>,
        pool: &BufferPool,
        uffd: Arc<Uffd>,
        stop: Arc<OwnedFd>,
        wait: UffdWait,
    ) -> io::Result<Self> {
        let reads = pool.capacity();
        // Every read, the two waits and a cancel fit at once: a push never fails.
        let entries = u32::try_from(reads + 4).unwrap_or(u32::MAX);
        let (ring, deferred) = build(entries.next_power_of_two())?;
        let fds: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
        let files_registered = !fds.is_empty() && ring.submitter().register_files(&fds).is_ok();
        let mut ring = Self {
            ring,
            files,
            files_registered,
            buffers: Buffers::Later,
            arena: pool.iovec(),
            reads: 0,
            uffd,
            stop,
            wait,
            messages: Box::new([0; MESSAGE_BUFFER_BYTES]),
            uffd_armed: false,
            stop_armed: false,
            in_flight: (0..reads).map(|_| None).collect(),
            early: None,
            unsubmitted_reads: 0,
        };
        // Kernels without deferred task work (before 6.1) may wait for all requests to end before
        // they register anything: there it must happen before the first.
        if !deferred {
            ring.register_buffers();
        }
        ring.settle_wait()?;
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

    /// Arms the first wait for messages. A READ that says EAGAIN at once (see [`probe`]) is not
    /// tried again; one that brings messages of threads that were early is kept.
    fn settle_wait(&mut self) -> io::Result<()> {
        self.arm(true);
        self.submit()?;
        if self.wait == UffdWait::Read
            && let Some(entry) = self.ring.completion().next()
        {
            self.early = Some(entry.result());
        }
        if self.early == Some(-libc::EAGAIN) {
            self.wait = UffdWait::Poll;
        }
        Ok(())
    }

    /// How this ring waits for messages.
    pub(crate) fn uffd_wait(&self) -> UffdWait {
        self.wait
    }

    /// Queues the waits that are not pending: for the stop signal always, for messages if wanted.
    pub(crate) fn arm(&mut self, want_messages: bool) {
        if !self.stop_armed {
            let poll = opcode::PollAdd::new(Fd(self.stop.as_raw_fd()), POLL_IN).build();
            self.stop_armed = self.push(poll, Token::Stop);
        }
        if want_messages && !self.uffd_armed {
            let fd = Fd(self.uffd.as_raw_fd());
            let length = u32::try_from(MESSAGE_BUFFER_BYTES).unwrap_or(0);
            let entry = match self.wait {
                UffdWait::Read => opcode::Read::new(fd, self.messages.as_mut_ptr(), length).build(),
                UffdWait::Poll => opcode::PollAdd::new(fd, POLL_IN).build(),
            };
            self.uffd_armed = self.push(entry, Token::Uffd);
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
        let (Some(raw), true) = (self.files.get(file).map(|file| file.as_raw_fd()), free) else {
            return Err(lease);
        };
        let address = lease.address();
        let index = u32::try_from(file).unwrap_or(u32::MAX);
        self.reads = self.reads.saturating_add(1);
        if self.buffers == Buffers::Later && self.reads > REGISTER_AFTER_READS {
            self.register_buffers();
        }
        let registered = self.buffers == Buffers::Registered;
        let entry = match (self.files_registered, registered) {
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

    fn push(&mut self, entry: squeue::Entry, token: Token) -> bool {
        let entry = entry.user_data(token.encode());
        // SAFETY: what the entry points to is owned by this ring (message buffer, leases, files)
        // and outlives the request: `drop` waits for it, or leaks the buffer.
        unsafe { self.ring.submission().push(&entry) }.is_ok()
    }

    /// Hands everything queued to the kernel without waiting. Reads from the page cache are
    /// complete when this returns.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.unsubmitted_reads = 0;
        settle(self.ring.submit())
    }

    /// Hands everything queued to the kernel and waits for a completion, at most `limit`.
    pub(crate) fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        if self.early.is_some() {
            return self.submit();
        }
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
        if let Some(result) = self.early.take() {
            return Some(self.messages_completed(result));
        }
        loop {
            let entry = self.ring.completion().next()?;
            let result = entry.result();
            match Token::decode(entry.user_data()) {
                Some(Token::Uffd) => return Some(self.messages_completed(result)),
                Some(Token::Stop) => {
                    self.stop_armed = false;
                    return Some(Completion::Stop);
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
                Some(Token::Cancel) | None => {}
            }
        }
    }

    fn messages_completed(&mut self, result: i32) -> Completion<'_> {
        self.uffd_armed = false;
        if result == -libc::EAGAIN {
            // A kernel that cannot wait for them by READ.
            self.wait = UffdWait::Poll;
        }
        if self.wait == UffdWait::Poll {
            return Completion::MessagesReady;
        }
        let length = usize::try_from(result).unwrap_or(0);
        Completion::Messages(&self.messages[..length.min(MESSAGE_BUFFER_BYTES)])
    }

    /// Asks for the pending wait for messages back; it completes like any other.
    pub(crate) fn disarm(&mut self) {
        if self.uffd_armed {
            let cancel = opcode::AsyncCancel::new(Token::Uffd.encode()).build();
            self.push(cancel, Token::Cancel);
        }
    }

    /// Whether a wait for messages is pending.
    pub(crate) fn is_armed(&self) -> bool {
        self.uffd_armed
    }

    fn is_busy(&self) -> bool {
        self.uffd_armed || self.stop_armed || self.in_flight.iter().any(Option::is_some)
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

impl Drop for Ring {
    fn drop(&mut self) {
        let started = Instant::now();
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        // Kernels before 5.19 cannot cancel everything at once: there, reads end by themselves.
        let cancel_uffd = opcode::AsyncCancel::new(Token::Uffd.encode()).build();
        let cancel_stop = opcode::AsyncCancel::new(Token::Stop.encode()).build();
        for entry in [cancel, cancel_uffd, cancel_stop] {
            self.push(entry, Token::Cancel);
        }
        while self.is_busy() && started.elapsed() < DRAIN_LIMIT {
            if self.wait(Some(Duration::from_millis(50))).is_err() {
                break;
            }
            while self.next().is_some() {}
        }
        if self.is_busy() {
            tracing::warn!(ring = ?self, "the kernel keeps buffers of a closed ring; leaking them");
            for lease in self.in_flight.drain(..).flatten() {
                mem::forget(lease);
            }
            mem::forget(mem::replace(
                &mut self.messages,
                Box::new([0; MESSAGE_BUFFER_BYTES]),
            ));
        }
    }
}
