#![forbid(unsafe_code)]
//! Where the bytes of a page come from.
//!
//! A source starts reads and says when they are done; it knows files and offsets, never pages of
//! a clone, and never issues a userfaultfd ioctl. Decorators (see [`faulty`]) are sources around
//! a source.

pub mod faulty;
mod file;
mod pread;

pub(crate) use file::FileSource;
pub(crate) use pread::PreadSource;

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use crate::page::ByteOffset;
use crate::sys::buffers::Lease;
use crate::sys::uring::Ring;
pub use crate::token::ReadSlot;

/// One read that the pager asks for. It owns the buffer; whoever holds the read may fill it.
#[derive(Debug)]
pub struct PageRead {
    pub(crate) slot: ReadSlot,
    pub(crate) number: usize,
    pub(crate) file: Arc<File>,
    pub(crate) offset: ByteOffset,
    pub(crate) bytes: usize,
    pub(crate) lease: Lease,
}

impl PageRead {
    /// Which of the reads in flight this is.
    pub fn slot(&self) -> ReadSlot {
        self.slot
    }

    /// Which image it reads, counted in the order in which the pager was given them.
    pub fn image(&self) -> usize {
        self.number
    }

    /// First byte in the image's file; a multiple of the page size.
    pub fn offset(&self) -> ByteOffset {
        self.offset
    }

    /// Number of bytes; a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A read that is over, and its buffer.
#[derive(Debug)]
pub struct ReadDone {
    pub(crate) slot: ReadSlot,
    pub(crate) lease: Lease,
    pub(crate) result: Result<usize, i32>,
}

impl ReadDone {
    /// Which read this was.
    pub fn slot(&self) -> ReadSlot {
        self.slot
    }

    /// Bytes read, or the errno.
    pub fn result(&self) -> Result<usize, i32> {
        self.result
    }

    /// The same read with another result; decorators change it so. More bytes than were read
    /// cannot be claimed.
    #[must_use]
    pub fn with_result(self, result: Result<usize, i32>) -> Self {
        let most = self.result.unwrap_or(0);
        Self {
            result: result.map(|bytes| bytes.min(most)),
            ..self
        }
    }
}

/// What became of a read that was started.
#[derive(Debug)]
pub enum Started {
    /// It is under way: `finish` or `tick` will tell.
    Pending,
    /// It is over already.
    Done(ReadDone),
    /// There is no room now; the pager tries again when another read is done.
    Busy(PageRead),
}

/// The ring that reads can be put into, when the pager has one.
pub struct ReadPort<'a>(pub(crate) Option<&'a mut Ring>);

impl fmt::Debug for ReadPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadPort(ring: {})", self.0.is_some())
    }
}

/// Reads template files.
///
/// The pager thread owns the source and calls it; a source must neither block nor panic, and must
/// not touch served memory. Every [`PageRead`] comes back exactly once: as `Busy`, as `Done`, from
/// `finish`, or from `tick`. A read that never comes back costs one buffer; its fault is ended by
/// the pager's deadline.
pub trait PageSource: fmt::Debug + Send {
    /// Starts a read. With a ring in `port` it is only queued: the pager submits.
    fn start(&mut self, read: PageRead, port: &mut ReadPort<'_>) -> Started;

    /// A read of this source completed in the ring. `None` keeps it back; `tick` brings it later.
    fn finish(&mut self, done: ReadDone) -> Option<ReadDone>;

    /// Appends to `done` every read that is over by `now` and was not reported otherwise.
    fn tick(&mut self, now: Instant, done: &mut Vec<ReadDone>);

    /// When `tick` should be called at the latest, apart from completions.
    fn next_due(&self) -> Option<Instant>;
}
