#![forbid(unsafe_code)]
//! From bytes to pages.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;

use super::{ActiveRead, Server};
use crate::counts::add;
use crate::health::PoisonReason;
use crate::image::ChunkIndex;
use crate::install::{Content, Installed, Stopped};
use crate::metrics::{Origin, Stages};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::residency::PageState;
use crate::retry::{Decision, ReadFailure, RetryReason, decide};
use crate::source::ReadDone;

impl Server {
    /// Handles every read that is over. `at_once`: nothing was waited for since the last pass.
    pub(super) fn handle_reads(&mut self, at_once: bool) {
        let mut done = std::mem::take(&mut self.done);
        for read in &done {
            debug_assert!(self.reads[read.slot.index()].is_some());
        }
        for raw in self.inbox.reads.drain(..) {
            done.extend(self.parts.source.finish(raw));
        }
        self.parts.source.tick(Instant::now(), &mut done);
        for read in done.drain(..) {
            self.complete(read, at_once);
        }
        // Given back for its capacity: nothing is added to it meanwhile.
        self.done = done;
    }

    fn complete(&mut self, done: ReadDone, at_once: bool) {
        let Some(read) = self.reads.get_mut(done.slot.index()).and_then(Option::take) else {
            tracing::error!(slot = done.slot.index(), "a source reported a read twice");
            self.parts.pool.take_back(done.lease);
            return;
        };
        let ended = Instant::now();
        let bytes = done.result.unwrap_or(0);
        self.parts.metrics.read_ended(bytes as u64);
        add(&self.parts.tally.bytes_read, bytes as u64);
        let expected = usize::try_from(read.covers.bytes()).unwrap_or(usize::MAX);
        match done.result {
            Ok(actual) if actual >= expected => {
                let origin = if at_once && read.pass == self.pass {
                    Origin::Cache
                } else {
                    Origin::Disk
                };
                let pages = &done.lease.bytes()[..expected.min(done.lease.len())];
                self.install_read(&done, read, pages, origin, ended);
            }
            Ok(actual) => self.read_failed(&done, &read, ReadFailure::Short { expected, actual }),
            Err(errno) => {
                let errno = Errno::from_raw_os_error(errno);
                self.read_failed(&done, &read, ReadFailure::Errno(errno));
            }
        }
        self.parts.pool.take_back(done.lease);
    }

    /// Verifies and installs what a read brought, in runs of neighbouring pages.
    fn install_read(
        &mut self,
        done: &ReadDone,
        mut read: ActiveRead,
        bytes: &[u8],
        origin: Origin,
        ended: Instant,
    ) {
        let mut at = read.covers.start();
        while let Some(first) = next_wanted(&read, at) {
            if let Err(reason) = self.verify(&read, first, bytes) {
                let chunk = self.chunk_of(read.image, first);
                self.refuse(&read, chunk, reason);
                at = chunk.end();
                continue;
            }
            let mut end = first.plus(1);
            while read.wants(end) && self.verify(&read, end, bytes).is_ok() {
                end = end.plus(1);
            }
            let run = PageRange::between(first, end);
            let slice = slice_of(bytes, read.covers, run);
            let started = Instant::now();
            let report = self.install(read.image, run, Content::Bytes(slice), origin);
            let installed = PageRange::between(run.start(), run.start().plus(report.done()));
            let times = Times {
                read: &read,
                ended,
                installing: started,
                now: Instant::now(),
            };
            self.answer(read.image, installed, origin, &times);
            let rest = PageRange::between(installed.end(), run.end());
            if !rest.is_empty() {
                self.install_failed(read.image, rest, report);
            }
            read.wanted &= !mask_of(&read, run);
            at = end;
        }
        debug_assert!(self.queue.first_of(done.slot).is_none());
    }

    /// Whether the chunk of `page` is what the index says; checked once per chunk.
    fn verify(
        &mut self,
        read: &ActiveRead,
        page: PageIndex,
        bytes: &[u8],
    ) -> Result<(), PoisonReason> {
        let served = &mut self.parts.images[read.image];
        let chunk = ChunkIndex::containing(page);
        let is_summed = served.image.index().is_summed();
        if !self.parts.verify || !is_summed || served.is_verified(chunk) {
            return Ok(());
        }
        let pages = chunk.pages(served.image.pages());
        let actual = xxh3_64(slice_of(bytes, read.covers, pages));
        // A chunk with a data page always has one: the index was proven when it was decoded.
        let expected = served.image.index().checksum(chunk).unwrap_or(!actual);
        if actual == expected {
            served.set_verified(chunk);
            return Ok(());
        }
        self.parts.metrics.verify_failed();
        add(&self.parts.tally.verify_failures, 1);
        Err(PoisonReason::Checksum { expected, actual })
    }

    fn chunk_of(&self, image: usize, page: PageIndex) -> PageRange {
        ChunkIndex::containing(page).pages(self.parts.images[image].image.pages())
    }

    /// Bytes that must not be used: who asked for them gets an error, the others nothing.
    fn refuse(&mut self, read: &ActiveRead, pages: PageRange, reason: PoisonReason) {
        for page in pages.iter().filter(|&page| read.wants(page)) {
            if self.queue.waits_for(read.image, page) {
                self.poison(read.image, page, reason);
            } else {
                let residency = &mut self.parts.images[read.image].residency;
                residency.set(page, PageState::Absent);
            }
        }
    }

    fn read_failed(&mut self, done: &ReadDone, read: &ActiveRead, failure: ReadFailure) {
        let residency = &mut self.parts.images[read.image].residency;
        for page in read.covers.iter().filter(|&page| read.wants(page)) {
            residency.set(page, PageState::Absent);
        }
        if self.queue.first_of(done.slot).is_none() {
            // Everybody who asked was told already that it took too long.
            return;
        }
        if read.ahead {
            self.queue.narrow(done.slot);
            self.retried(failure.reason(), 1);
            return;
        }
        let attempts = self.queue.attempts_of(done.slot);
        match decide(failure, attempts) {
            Decision::Again(reason) => {
                self.queue.release(done.slot, Instant::now());
                self.retried(reason, 1);
            }
            Decision::GiveUp(reason) => {
                while let Some(waiter) = self.queue.first_of(done.slot) {
                    self.poison(waiter.image, waiter.page, reason);
                }
            }
        }
    }

    /// Pages could not be installed though their bytes are there: given up, or tried again until
    /// their deadline.
    pub(super) fn install_failed(&mut self, image: usize, pages: PageRange, report: Installed) {
        let Some(stopped) = report.stopped else {
            return;
        };
        let residency = &mut self.parts.images[image].residency;
        residency.set_all(pages, PageState::Absent);
        let put_off = match stopped {
            Stopped::Gone => return self.queue.answer(image, pages, |_| ()),
            Stopped::Unmapped => return self.unmapped(image, pages),
            Stopped::Refused(errno) => {
                let reason = PoisonReason::Install {
                    errno: errno.raw_os_error(),
                };
                for page in pages.iter() {
                    if self.queue.waits_for(image, page) {
                        self.poison(image, page, reason);
                    }
                }
                return;
            }
            Stopped::Changing => Errno::AGAIN,
            Stopped::NoMemory => Errno::NOMEM,
        };
        self.queue.put_off(image, pages, Instant::now(), put_off);
    }

    /// The first of `pages` lies in no registered mapping. Who waits for it is woken, to meet
    /// whatever is there now; the pages behind it are tried one by one.
    fn unmapped(&mut self, image: usize, pages: PageRange) {
        let first = PageRange::single(pages.start());
        tracing::warn!(%first, "memory of a clone is no longer served: something was mapped over it");
        self.retried(RetryReason::InstallUnmapped, 1);
        self.queue.answer(image, first, |_| ());
        self.wake(image, first);
        self.queue
            .narrow_pages(image, PageRange::between(first.end(), pages.end()));
    }

    /// Everybody who waited for `pages` was woken by their install.
    fn answer(&mut self, image: usize, pages: PageRange, origin: Origin, times: &Times<'_>) {
        let metrics = &self.parts.metrics;
        self.queue.answer(image, pages, |waiter| {
            metrics.answered(origin, &times.stages(waiter.arrived));
        });
    }
}

/// When the steps of one read happened.
struct Times<'a> {
    read: &'a ActiveRead,
    ended: Instant,
    installing: Instant,
    now: Instant,
}

impl Times<'_> {
    /// The stages of a fault that arrived at `arrived`: who joined a read under way did not wait
    /// for it to start, and waited only for the rest of it.
    fn stages(&self, arrived: Instant) -> Stages {
        let since = |from: Instant, to: Instant| -> Duration { to.saturating_duration_since(from) };
        Stages {
            queue: since(arrived, self.read.started),
            read: Some(since(arrived.max(self.read.started), self.ended)),
            install: since(self.installing, self.now),
            total: since(arrived, self.now),
        }
    }
}

/// The first page at or behind `at` that `read` is to install.
fn next_wanted(read: &ActiveRead, at: PageIndex) -> Option<PageIndex> {
    let rest = PageRange::between(at, read.covers.end());
    rest.iter().find(|&page| read.wants(page))
}

fn mask_of(read: &ActiveRead, pages: PageRange) -> u64 {
    pages.iter().fold(0, |bits, page| bits | read.bit(page))
}

/// The bytes of `pages` in a buffer that holds those of `covers`; empty if it does not.
fn slice_of(bytes: &[u8], covers: PageRange, pages: PageRange) -> &[u8] {
    let before = pages.start().get().checked_sub(covers.start().get());
    let range = before.and_then(|before| {
        let start = usize::try_from(before * PAGE_BYTES).ok()?;
        let length = usize::try_from(pages.bytes()).ok()?;
        bytes.get(start..start + length)
    });
    range.unwrap_or(&[])
}
