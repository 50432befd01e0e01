#![forbid(unsafe_code)]
//! From bytes to pages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;

use super::Server;
use super::read::{ActiveRead, Target};
use super::served::ServedImage;
use crate::counts::add;
use crate::health::PoisonReason;
use crate::image::ChunkIndex;
use crate::install::{Content, Installed, Stopped};
use crate::metrics::{Origin, Stages};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::queue::{PageKey, RegionKey};
use crate::residency::PageState;
use crate::retry::{Decision, ReadFailure, RetryReason, decide};
use crate::source::ReadDone;
use crate::token::ReadSlot;

/// What a read brought.
struct Brought<'a> {
    read: &'a ActiveRead,
    image: &'a ServedImage,
    bytes: &'a [u8],
    origin: Origin,
    ended: Instant,
    /// Chunks that are not what the index says.
    bad: Vec<(ChunkIndex, PoisonReason)>,
}

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
        let Some(mut read) = self.reads.get_mut(done.slot.index()).and_then(Option::take) else {
            tracing::error!(slot = done.slot.index(), "a source reported a read twice");
            self.parts.pool.take_back(done.lease);
            return;
        };
        self.free_reads.push(done.slot.index());
        self.planned_reads -= usize::from(read.is_planned);
        if let Some(owner) = self.clients.get_mut(read.owner) {
            owner.reads -= 1;
        }
        let ended = Instant::now();
        let bytes = done.result.unwrap_or(0);
        add(&self.parts.tally.bytes_read, bytes as u64);
        read.image.metrics().read_ended(bytes as u64);
        let expected = usize::try_from(read.covers.bytes()).unwrap_or(usize::MAX);
        match done.result {
            Ok(actual) if actual >= expected => {
                let origin = if at_once && read.pass == self.pass {
                    Origin::Cache
                } else {
                    Origin::Disk
                };
                let brought = Brought {
                    read: &read,
                    image: &read.image,
                    bytes: &done.lease.bytes()[..expected.min(done.lease.len())],
                    origin,
                    ended,
                    bad: Vec::new(),
                };
                self.install_read(brought);
            }
            Ok(actual) => {
                self.read_failed(done.slot, &read, ReadFailure::Short { expected, actual });
            }
            Err(errno) => {
                let errno = Errno::from_raw_os_error(errno);
                self.read_failed(done.slot, &read, ReadFailure::Errno(errno));
            }
        }
        read.targets.clear();
        self.spare_targets.push(read.targets);
        self.parts.pool.take_back(done.lease);
    }

    /// Verifies what a read brought, and installs it for everybody who gets something of it.
    fn install_read(&mut self, mut brought: Brought<'_>) {
        let read = brought.read;
        for target in &read.targets {
            let done = self.install_target(&mut brought, target);
            if target.is_planned {
                self.planned_done(target, done);
            }
        }
    }

    /// Installs one target's pages in runs of neighbours: how many are there now.
    fn install_target(&mut self, brought: &mut Brought<'_>, target: &Target) -> u64 {
        let read = brought.read;
        let mut at = read.covers.start();
        let mut all = 0;
        while let Some(first) = read.next_of(target.wanted, at) {
            if let Err(reason) = self.verify(brought, first) {
                let chunk = ChunkIndex::containing(first).pages(brought.image.image().pages());
                self.refuse(read, target, chunk, reason);
                at = chunk.end();
                continue;
            }
            let mut end = first.plus(1);
            while target.wanted & read.bit(end) != 0 && self.verify(brought, end).is_ok() {
                end = end.plus(1);
            }
            let run = PageRange::between(first, end);
            let slice = slice_of(brought.bytes, read.covers, run);
            let started = Instant::now();
            let content = Content::Bytes(slice);
            let report = self.install(target.region, run, content, brought.origin, None);
            let installed = PageRange::between(run.start(), run.start().plus(report.done()));
            all += report.done();
            let times = Times {
                read,
                ended: brought.ended,
                installing: started,
                now: Instant::now(),
            };
            self.answer(target.region, installed, brought, &times);
            let rest = PageRange::between(installed.end(), run.end());
            if !rest.is_empty() {
                self.install_failed(target.region, rest, report);
            }
            at = end;
        }
        all
    }

    /// Whether the chunk of `page` is what the index says; checked once per chunk.
    fn verify(&mut self, brought: &mut Brought<'_>, page: PageIndex) -> Result<(), PoisonReason> {
        let chunk = ChunkIndex::containing(page);
        let image = brought.image;
        let is_summed = image.image().index().is_summed();
        if !self.parts.verify || !is_summed || image.is_verified(chunk) {
            return Ok(());
        }
        if let Some(&(_, reason)) = brought.bad.iter().find(|(bad, _)| *bad == chunk) {
            return Err(reason);
        }
        let pages = chunk.pages(image.image().pages());
        let actual = xxh3_64(slice_of(brought.bytes, brought.read.covers, pages));
        // A chunk with a data page always has one: the index was proven when it was decoded.
        let expected = image.image().index().checksum(chunk).unwrap_or(!actual);
        if actual == expected {
            image.set_verified(chunk);
            return Ok(());
        }
        image.metrics().verify_failed();
        add(&self.parts.tally.verify_failures, 1);
        let reason = PoisonReason::Checksum { expected, actual };
        brought.bad.push((chunk, reason));
        Err(reason)
    }

    /// Bytes that must not be used: who asked for them gets an error, the others nothing.
    fn refuse(
        &mut self,
        read: &ActiveRead,
        target: &Target,
        chunk: PageRange,
        reason: PoisonReason,
    ) {
        for page in read.pages(target.wanted & read.bits(chunk)) {
            let key = target.region.page(page);
            if self.queue.waits_for(key) {
                self.poison(key, reason);
            } else if let Some(served) = self.served_mut(target.region) {
                served.set(page, PageState::Absent);
            }
        }
    }

    fn read_failed(&mut self, slot: ReadSlot, read: &ActiveRead, failure: ReadFailure) {
        let mut waiting: Vec<PageKey> = Vec::new();
        for target in &read.targets {
            if let Some(served) = self.served_mut(target.region) {
                let pages = read.pages(target.wanted);
                pages.for_each(|page| served.set(page, PageState::Absent));
            }
            if target.is_planned {
                self.planned_done(target, 0);
            }
            let keys = read
                .pages(target.wanted)
                .map(|page| target.region.page(page));
            waiting.extend(keys.filter(|&key| self.queue.waits_for_read(key, slot)));
        }
        if waiting.is_empty() {
            // Nobody asked, or everybody who did was told already that it took too long.
            return;
        }
        let metrics = Arc::clone(read.image.metrics());
        if read.ahead || read.is_planned {
            waiting.iter().for_each(|&key| self.queue.narrow(key));
            self.retried(&metrics, failure.reason(), 1);
            return;
        }
        let attempts = waiting.iter().filter_map(|&key| self.queue.get(key));
        let attempts = attempts.map(|want| want.attempts).max().unwrap_or(0);
        match decide(failure, attempts) {
            Decision::Again(reason) => {
                let now = Instant::now();
                for &key in &waiting {
                    self.queue.put_off(key, now, None);
                }
                self.retried(&metrics, reason, 1);
            }
            Decision::GiveUp(reason) => waiting.iter().for_each(|&key| self.poison(key, reason)),
        }
    }

    /// Pages could not be installed though their bytes are there: given up, or tried again until
    /// their deadline.
    pub(super) fn install_failed(
        &mut self,
        region: RegionKey,
        pages: PageRange,
        report: Installed,
    ) {
        let Some(stopped) = report.stopped else {
            return;
        };
        if let Some(served) = self.served_mut(region) {
            served.set_all(pages, PageState::Absent);
        }
        let keys = pages.iter().map(|page| region.page(page));
        let put_off = match stopped {
            Stopped::Gone => {
                keys.for_each(|key| _ = self.queue.answer(key));
                self.lost_if_remote(region);
                return;
            }
            Stopped::Unmapped => return self.unmapped(region, pages),
            Stopped::Refused(errno) => {
                let errno = errno.raw_os_error();
                for key in keys {
                    if self.queue.waits_for(key) {
                        self.poison(key, PoisonReason::Install { errno });
                    }
                }
                return;
            }
            Stopped::Changing => Errno::AGAIN,
            Stopped::NoMemory => Errno::NOMEM,
        };
        let now = Instant::now();
        keys.for_each(|key| self.queue.put_off(key, now, Some(put_off)));
    }

    /// The memory of another process is gone, and with it the client. What a clone of this process
    /// dropped is one region: its others are served on.
    fn lost_if_remote(&mut self, region: RegionKey) {
        if self
            .served(region)
            .is_some_and(|served| served.pin().is_some())
        {
            self.lost.push(region.client);
        }
    }

    /// The first of `pages` lies in no registered mapping. Who waits for it is woken, to meet
    /// whatever is there now; the pages behind it are tried one by one.
    fn unmapped(&mut self, region: RegionKey, pages: PageRange) {
        let first = PageRange::single(pages.start());
        tracing::warn!(%first, "memory of a clone is no longer served: something was mapped over it");
        if let Some(served) = self.served(region) {
            self.retried(served.image.metrics(), RetryReason::InstallUnmapped, 1);
        }
        self.queue.answer(region.page(pages.start()));
        self.wake(region, first);
        for page in PageRange::between(first.end(), pages.end()).iter() {
            self.queue.narrow(region.page(page));
        }
    }

    /// Everybody who waited for `pages` was woken by their install.
    fn answer(
        &mut self,
        region: RegionKey,
        pages: PageRange,
        brought: &Brought<'_>,
        times: &Times<'_>,
    ) {
        let metrics = brought.image.metrics();
        for page in pages.iter() {
            let Some(want) = self.queue.answer(region.page(page)) else {
                continue;
            };
            for arrived in std::iter::once(want.arrived).chain(want.joined) {
                metrics.answered(brought.origin, &times.stages(arrived));
            }
        }
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
