#![forbid(unsafe_code)]
//! The loop: drain messages, plan, start reads, reap them, install, wake.

mod admit;
mod complete;
mod give_up;
mod place;
mod start;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use userfaultfd::Uffd;

use crate::budget::Budget;
use crate::counts::Tally;
use crate::health::Health;
use crate::image::{ChunkIndex, Image};
use crate::metrics::Metrics;
use crate::page::{PageIndex, PageRange};
use crate::port::{Inbox, Port, WaitLimits};
use crate::prefetch::plan::Streams;
use crate::queue::Queue;
use crate::record::Recorder;
use crate::region::Region;
use crate::residency::{PageState, Residency};
use crate::source::{PageSource, ReadDone};
use crate::stale::StaleFaults;
use crate::sys::buffers::BufferPool;
use crate::sys::uring::MESSAGES_PER_READ;

/// One image and what was done with it.
#[derive(Debug)]
pub(crate) struct Served {
    image: Image,
    region: Region,
    residency: Residency,
    streams: Streams,
    /// One bit per chunk: its bytes were seen to match the index.
    verified: Vec<u64>,
    stale: StaleFaults,
}

impl Served {
    pub(crate) fn new(image: Image, region: Region) -> Self {
        let pages = image.pages();
        let chunks = pages.get().div_ceil(crate::image::CHUNK_PAGES);
        Self {
            residency: Residency::new(pages),
            streams: Streams::default(),
            verified: vec![0; usize::try_from(chunks.div_ceil(64)).unwrap_or(usize::MAX)],
            stale: StaleFaults::default(),
            image,
            region,
        }
    }

    /// Its memory, held mapped; `None` once the clone dropped it.
    pub(crate) fn pin(&self) -> Option<Arc<crate::sys::mmap::ServedMapping>> {
        self.region.pin()
    }

    /// Moves every page of `pages` that legally can to `next`.
    pub(crate) fn set_all(&mut self, pages: PageRange, next: PageState) {
        self.residency.set_all(pages, next);
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    /// All pages.
    fn whole(&self) -> PageRange {
        PageRange::new(PageIndex::default(), self.image.pages())
    }

    fn is_verified(&self, chunk: ChunkIndex) -> bool {
        let word = usize::try_from(chunk.get() / 64).ok();
        let word = word.and_then(|word| self.verified.get(word));
        word.is_some_and(|word| word >> (chunk.get() % 64) & 1 != 0)
    }

    fn set_verified(&mut self, chunk: ChunkIndex) {
        let word = usize::try_from(chunk.get() / 64).ok();
        if let Some(word) = word.and_then(|word| self.verified.get_mut(word)) {
            *word |= 1 << (chunk.get() % 64);
        }
    }
}

/// A read under way.
#[derive(Clone, Copy, Debug)]
struct ActiveRead {
    image: usize,
    /// What is read.
    covers: PageRange,
    /// Which of these pages to install: bit 0 is the first.
    wanted: u64,
    /// It was started for more than the page that was asked for.
    ahead: bool,
    started: Instant,
    /// The pass of the loop that started it.
    pass: u64,
}

impl ActiveRead {
    fn bit(&self, page: PageIndex) -> u64 {
        if self.covers.contains(page) {
            1 << (page.get() - self.covers.start().get())
        } else {
            0
        }
    }

    fn wants(&self, page: PageIndex) -> bool {
        self.wanted & self.bit(page) != 0
    }
}

/// Most pages of one read: its wanted pages are bits of a word.
const READ_PAGES_LIMIT: u64 = 64;

/// Parts that a server is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) uffd: Arc<Uffd>,
    pub(crate) port: Port,
    pub(crate) source: Box<dyn PageSource>,
    pub(crate) pool: BufferPool,
    pub(crate) images: Vec<Served>,
    pub(crate) budget: Budget,
    pub(crate) verify: bool,
    pub(crate) fault_deadline: Duration,
    pub(crate) spin: Duration,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) recorder: Option<Recorder>,
}

/// The state of the pager thread.
#[derive(Debug)]
pub(crate) struct Server {
    parts: Parts,
    queue: Queue,
    reads: Vec<Option<ActiveRead>>,
    inbox: Inbox,
    /// Reads that are over, on their way to be handled.
    done: Vec<ReadDone>,
    pass: u64,
    stopping: bool,
    /// The queue was full when the loop last looked.
    was_full: bool,
}

impl Server {
    pub(crate) fn new(parts: Parts) -> Self {
        let slots = parts.pool.capacity();
        Self {
            // Room for one whole read of messages, or none would ever be taken.
            queue: Queue::new(parts.budget.waiting_faults.max(MESSAGES_PER_READ)),
            reads: (0..slots).map(|_| None).collect(),
            inbox: Inbox::new(),
            done: Vec::with_capacity(slots),
            pass: 0,
            stopping: false,
            was_full: false,
            parts,
        }
    }

    /// Which way messages and bytes take.
    pub(crate) fn path(&self) -> crate::port::IoPath {
        self.parts.port.path()
    }

    /// Serves until told to stop, and then until nobody waits any more.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        loop {
            self.pass += 1;
            self.start_reads();
            let at_once = self.collect()?;
            self.handle_messages();
            self.handle_reads(at_once);
            self.end_overdue();
            if self.inbox.stop && !self.stopping {
                self.stopping = true;
                self.parts.port.disarm();
            }
            if self.stopping && self.is_drained()? {
                self.finish();
                return Ok(());
            }
        }
    }

    /// Fills the inbox; true when what came in was there at once, without waiting for it.
    fn collect(&mut self) -> io::Result<bool> {
        let room = self.room();
        let parts = &mut self.parts;
        if !self.done.is_empty() {
            return Ok(true);
        }
        if parts.port.submit(&parts.uffd, room, &mut self.inbox)? {
            return Ok(true);
        }
        let limit = self.time_to_next_event();
        let parts = &mut self.parts;
        let limits = WaitLimits {
            spin: parts.spin,
            total: limit,
        };
        parts
            .port
            .wait(&parts.uffd, room, limits, &mut self.inbox)?;
        Ok(false)
    }

    /// How many messages may be taken from the kernel now. When there is no room, faults stay in
    /// the kernel's queue, which loses none.
    fn room(&mut self) -> usize {
        if self.stopping {
            return 0;
        }
        let room = self.queue.room();
        let full = room < MESSAGES_PER_READ;
        if full && !self.was_full {
            self.parts.metrics.limit_hit(crate::metrics::Limit::Queue);
            crate::counts::add(&self.parts.tally.waits_for_queue, 1);
        }
        self.was_full = full;
        room
    }

    fn time_to_next_event(&self) -> Option<Duration> {
        let deadline = self.queue.next_deadline(self.parts.fault_deadline);
        let due = self.parts.source.next_due();
        let events = [deadline, due, self.queue.next_try()];
        let next = events.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// After a stop: whether all faults that were raised before it are answered.
    fn is_drained(&mut self) -> io::Result<bool> {
        if self.queue.len() > 0 || !self.done.is_empty() || self.parts.port.is_armed() {
            return Ok(false);
        }
        self.inbox.drain(&self.parts.uffd, usize::MAX / 2)?;
        let nothing = self.inbox.messages.is_empty();
        self.handle_messages();
        Ok(nothing && self.queue.len() == 0)
    }

    /// The last accounts.
    fn finish(&mut self) {
        for served in &mut self.parts.images {
            let verdict = served.streams.finish();
            let (metrics, tally) = (&self.parts.metrics, &self.parts.tally);
            metrics.prefetch(0, 0, verdict.wasted);
            crate::counts::add(&tally.prefetch_wasted, verdict.wasted);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for _ in self.reads.iter().flatten() {
            self.parts.metrics.read_ended(0);
        }
    }
}

#[cfg(test)]
mod tests;
