#![forbid(unsafe_code)]
//! From waiting faults to reads under way.

use std::sync::Arc;
use std::time::Instant;

use super::Server;
use super::admit::{SINGLE, run_of};
use super::read::{ActiveRead, READ_PAGES_LIMIT};
use super::served::ServedImage;
use crate::counts::add;
use crate::image::{CHUNK_PAGES, ChunkIndex, PageKind};
use crate::metrics::Limit;
use crate::page::{PAGE_BYTES, PageCount, PageIndex, PageRange};
use crate::prefetch::plan::Window;
use crate::queue::{PageKey, RegionKey};
use crate::residency::PageState;
use crate::source::{PageRead, ReadPort, Started};
use crate::token::ReadSlot;

/// A read to be started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) region: RegionKey,
    /// The page that it must bring.
    pub(super) asked: PageIndex,
    /// All that is to be installed.
    pub(super) run: PageRange,
    /// Nobody asked for it: it is of a plan.
    pub(super) is_planned: bool,
}

impl Server {
    /// Starts a read for everybody who has none and need not pause, while there are buffers: of
    /// the clients in turn, the oldest of each first.
    pub(super) fn start_reads(&mut self) {
        if self.queue.next_try().is_some() {
            self.queue.end_pauses(Instant::now());
        }
        if !self.queue.has_ready() {
            return;
        }
        let most = self.parts.budget.client_reads.max(1);
        loop {
            let clients = &self.clients;
            let may = |key| clients.get(key).is_none_or(|client| client.reads < most);
            let Some(key) = self.queue.next_ready(may) else {
                return;
            };
            let Some(served) = self.served(key.region) else {
                self.queue.answer(key);
                continue;
            };
            if served.kind(key.page) != PageKind::Data {
                self.retry_zero(key);
                continue;
            }
            let image = served.image.number();
            if let Some(slot) = self.read_covering(image, PageRange::single(key.page)) {
                self.add_to(slot, key);
                continue;
            }
            if !self.start_read(key) {
                self.queue.put_back(key);
                return;
            }
        }
    }

    /// The read that will install a page, and whether it does so for a plan.
    pub(super) fn read_bringing(&self, key: PageKey) -> Option<(ReadSlot, bool)> {
        let image = self.served(key.region)?.image.number();
        let mut reads = self.reads.iter().enumerate();
        reads.find_map(|(number, read)| {
            let read = read.as_ref()?;
            if read.image.number() != image || read.bit(key.page) == 0 {
                return None;
            }
            let target = read.target_of(key.region, key.page)?;
            Some((slot_of(number), target.is_planned))
        })
    }

    /// A read whose bytes all of `pages` are among.
    pub(super) fn read_covering(&self, image: usize, pages: PageRange) -> Option<ReadSlot> {
        let covers = |read: &ActiveRead| {
            read.image.number() == image
                && read.covers.start() <= pages.start()
                && pages.end() <= read.covers.end()
        };
        let found = self
            .reads
            .iter()
            .position(|read| read.as_ref().is_some_and(covers))?;
        Some(slot_of(found))
    }

    /// Lets a read that is under way install the page too.
    fn add_to(&mut self, slot: ReadSlot, key: PageKey) {
        let page = PageRange::single(key.page);
        let Some(read) = self.reads[slot.index()].as_mut() else {
            return;
        };
        read.add(key.region, page, false);
        let window = self.queue.get(key).map(|want| want.window);
        if let Some(served) = self.served_mut(key.region) {
            served.set_all(page, PageState::Reading);
            if let Some(window) = window
                && window.stream != SINGLE.stream
            {
                served.streams.chosen(window.stream, page);
            }
        }
        self.queue.assign(key, slot);
    }

    /// Starts a read for a page; false when there is no buffer or no room for it now.
    fn start_read(&mut self, key: PageKey) -> bool {
        let (Some(want), Some(served)) = (self.queue.get(key), self.served(key.region)) else {
            return true;
        };
        let window = Window {
            pages: want.window.pages.min(READ_PAGES_LIMIT - 2 * CHUNK_PAGES),
            ..want.window
        };
        let run = run_of(served, key.page, window, |kind| kind == PageKind::Data);
        let wanted = Wanted {
            region: key.region,
            asked: key.page,
            run,
            is_planned: false,
        };
        let Some((slot, run)) = self.read(wanted) else {
            if let Some(served) = self.served(key.region) {
                served.image.metrics().limit_hit(Limit::Buffers);
            }
            add(&self.parts.tally.waits_for_buffer, 1);
            return false;
        };
        if window.stream != SINGLE.stream
            && let Some(served) = self.served_mut(key.region)
        {
            served.streams.chosen(window.stream, run);
        }
        for page in run.iter() {
            self.queue.assign(key.region.page(page), slot);
        }
        true
    }

    /// Starts a read of what is wanted, or of as much as there are buffers for; `None` when there
    /// are none.
    pub(super) fn read(&mut self, wanted: Wanted) -> Option<(ReadSlot, PageRange)> {
        let number = *self.free_reads.last()?;
        let image = Arc::clone(self.served(wanted.region)?.image());
        let bytes = self.extent(&image, wanted.run);
        let chunks = bytes.count().get().div_ceil(CHUNK_PAGES);
        let lease = self
            .parts
            .pool
            .lend(usize::try_from(chunks).unwrap_or(usize::MAX))?;
        let room = lease.len() as u64 / PAGE_BYTES;
        let (run, bytes) = shrink(wanted.run, bytes, wanted.asked, room);
        let slot = slot_of(number);
        let read = PageRead {
            slot,
            number: image.number(),
            file: Arc::clone(image.image().file()),
            offset: image.image().offset_of(bytes),
            bytes: usize::try_from(bytes.bytes()).unwrap_or(0),
            lease,
        };
        let started = Instant::now();
        let mut port = ReadPort(self.parts.port.ring());
        match self.parts.source.start(read, &mut port) {
            Started::Busy(read) => {
                self.parts.pool.take_back(read.lease);
                return None;
            }
            Started::Pending => {}
            Started::Done(done) => self.done.push(done),
        }
        image.metrics().read_started();
        let mut active = ActiveRead {
            image,
            owner: wanted.region.client,
            covers: bytes,
            targets: self.spare_targets.pop().unwrap_or_default(),
            ahead: run.count().get() > 1,
            is_planned: wanted.is_planned,
            started,
            pass: self.pass,
        };
        active.add(wanted.region, run, wanted.is_planned);
        self.free_reads.pop();
        self.reads[number] = Some(active);
        if let Some(client) = self.clients.get_mut(wanted.region.client) {
            client.reads += 1;
            client.regions[wanted.region.region as usize].set_all(run, PageState::Reading);
        }
        add(&self.parts.tally.reads, 1);
        Some((slot, run))
    }

    /// What to read for `run`: whole chunks while their checksum is not proven, else just the
    /// pages.
    fn extent(&self, image: &ServedImage, run: PageRange) -> PageRange {
        let proven = |page| image.is_verified(ChunkIndex::containing(page));
        if !self.parts.verify || run.iter().all(proven) {
            return run;
        }
        run.aligned(CHUNK_PAGES, image.image().pages())
    }
}

fn slot_of(number: usize) -> ReadSlot {
    ReadSlot::new(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Cuts a read to `room` pages around the page that was asked for.
fn shrink(run: PageRange, bytes: PageRange, asked: PageIndex, room: u64) -> (PageRange, PageRange) {
    if bytes.count().get() <= room {
        return (run, bytes);
    }
    // A walk forward asks for the first chunk of the read, one backward for the last.
    let start = if asked.get() - bytes.start().get() < room {
        bytes.start()
    } else {
        PageIndex::new(bytes.end().get() - room)
    };
    let bytes = PageRange::new(start, PageCount::new(room));
    let run = PageRange::between(run.start().max(bytes.start()), run.end().min(bytes.end()));
    (run, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_shrunk_read_still_brings_the_page(
            start in 0u64..100, count in 1u64..20, backward: bool, chunks in 1u64..6, aligned: bool,
        ) {
            let run = PageRange::new(PageIndex::new(start), PageCount::new(count));
            let asked = PageIndex::new(if backward { run.end().get() - 1 } else { start });
            let bytes = if aligned {
                run.aligned(CHUNK_PAGES, PageCount::new(1000))
            } else {
                run
            };
            let room = chunks * CHUNK_PAGES;
            let (cut_run, cut) = shrink(run, bytes, asked, room);
            prop_assert!(cut.count().get() <= room);
            prop_assert!(cut_run.contains(asked));
            prop_assert!(cut.contains(cut_run.start()) && cut_run.end() <= cut.end());
            if aligned {
                prop_assert_eq!(cut.start().get() % CHUNK_PAGES, 0);
            }
        }
    }
}
