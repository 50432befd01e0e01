#![forbid(unsafe_code)]
//! From waiting faults to reads under way.

use std::time::Instant;

use super::admit::SINGLE;
use super::{ActiveRead, READ_PAGES_LIMIT, Server};
use crate::counts::add;
use crate::image::{CHUNK_PAGES, ChunkIndex, PageKind};
use crate::metrics::Limit;
use crate::page::{PageCount, PageIndex, PageRange};
use crate::queue::Waiter;
use crate::residency::PageState;
use crate::source::{PageRead, ReadPort, Started};
use crate::token::ReadSlot;

impl Server {
    /// Starts a read for everybody who has none and need not pause, oldest first, while there are
    /// buffers.
    pub(super) fn start_reads(&mut self) {
        if self.queue.len() > 0 {
            self.queue.end_pauses(Instant::now());
        }
        let mut from = 0;
        while let Some((at, waiter)) = self.queue.unassigned(from) {
            from = at + 1;
            if self.parts.images[waiter.image]
                .image
                .index()
                .kind(waiter.page)
                != PageKind::Data
            {
                self.retry_zero(&waiter);
                from = 0;
                continue;
            }
            if let Some(slot) = self.read_covering(waiter.image, waiter.page) {
                self.add_to(slot, &waiter);
                continue;
            }
            if !self.start_read(&waiter) {
                return;
            }
        }
    }

    /// The read that will install `page`.
    pub(super) fn read_bringing(&self, image: usize, page: PageIndex) -> Option<ReadSlot> {
        self.find_read(|read| read.image == image && read.wants(page))
    }

    /// A read whose bytes `page` is among.
    fn read_covering(&self, image: usize, page: PageIndex) -> Option<ReadSlot> {
        self.find_read(|read| read.image == image && read.covers.contains(page))
    }

    fn find_read(&self, wanted: impl Fn(&ActiveRead) -> bool) -> Option<ReadSlot> {
        let found = self
            .reads
            .iter()
            .position(|read| read.as_ref().is_some_and(&wanted))?;
        Some(ReadSlot::new(u32::try_from(found).ok()?))
    }

    /// Lets a read that is under way install the waiter's page too.
    fn add_to(&mut self, slot: ReadSlot, waiter: &Waiter) {
        if let Some(read) = self.reads[slot.index()].as_mut() {
            read.wanted |= read.bit(waiter.page);
        }
        let page = PageRange::single(waiter.page);
        let served = &mut self.parts.images[waiter.image];
        served.residency.set_all(page, PageState::Reading);
        if waiter.window.stream != SINGLE.stream {
            served.streams.chosen(waiter.window.stream, page);
        }
        self.queue.assign(waiter.image, page, slot);
    }

    /// Starts a read for `waiter`; false when there is no buffer or no room for it now.
    fn start_read(&mut self, waiter: &Waiter) -> bool {
        let slot = self.reads.iter().position(Option::is_none);
        let (run, bytes) = self.extent(waiter);
        let chunks = bytes.count().get().div_ceil(CHUNK_PAGES);
        let lease = slot.and_then(|_| {
            let chunks = usize::try_from(chunks).unwrap_or(usize::MAX);
            self.parts.pool.lend(chunks)
        });
        let (Some(number), Some(lease)) = (slot, lease) else {
            self.parts.metrics.limit_hit(Limit::Buffers);
            add(&self.parts.tally.waits_for_buffer, 1);
            return false;
        };
        let room = lease.len() as u64 / crate::page::PAGE_BYTES;
        let (run, bytes) = shrink(run, bytes, waiter.page, room);
        let read = PageRead {
            slot: ReadSlot::new(u32::try_from(number).unwrap_or(u32::MAX)),
            file: waiter.image,
            offset: self.parts.images[waiter.image].image.offset_of(bytes),
            bytes: usize::try_from(bytes.bytes()).unwrap_or(0),
            lease,
        };
        let slot = read.slot;
        let started = Instant::now();
        let mut port = ReadPort(self.parts.port.ring());
        match self.parts.source.start(read, &mut port) {
            Started::Busy(read) => {
                self.parts.pool.take_back(read.lease);
                return false;
            }
            Started::Pending => {}
            Started::Done(done) => self.done.push(done),
        }
        let mut active = ActiveRead {
            image: waiter.image,
            covers: bytes,
            wanted: 0,
            ahead: run.count().get() > 1,
            started,
            pass: self.pass,
        };
        active.wanted = run.iter().fold(0, |bits, page| bits | active.bit(page));
        self.reads[number] = Some(active);
        let served = &mut self.parts.images[waiter.image];
        served.residency.set_all(run, PageState::Reading);
        if waiter.window.stream != SINGLE.stream {
            served.streams.chosen(waiter.window.stream, run);
        }
        self.queue.assign(waiter.image, run, slot);
        self.parts.metrics.read_started();
        add(&self.parts.tally.reads, 1);
        true
    }

    /// Which pages to install for `waiter`, and which to read for that: whole chunks while their
    /// checksum is not proven, else just the pages.
    fn extent(&self, waiter: &Waiter) -> (PageRange, PageRange) {
        let served = &self.parts.images[waiter.image];
        let mut window = waiter.window;
        window.pages = window.pages.min(READ_PAGES_LIMIT - 2 * CHUNK_PAGES);
        let run = self.run_of(waiter.image, waiter.page, window, |kind| {
            kind == PageKind::Data
        });
        let proven = |page| served.is_verified(ChunkIndex::containing(page));
        if !self.parts.verify || run.iter().all(proven) {
            return (run, run);
        }
        (run, run.aligned(CHUNK_PAGES, served.image.pages()))
    }
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
