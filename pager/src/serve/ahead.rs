#![forbid(unsafe_code)]
//! Pages of a plan, brought in bounded batches while nobody waits for a read to start.

use std::collections::VecDeque;

use super::Server;
use super::read::Target;
use super::served::Served;
use super::start::Wanted;
use crate::ahead::Ahead;
use crate::client::ClientEvent;
use crate::image::PageKind;
use crate::install::Content;
use crate::metrics::Origin;
use crate::page::{PageIndex, PageRange};
use crate::queue::{ClientKey, RegionKey};
use crate::residency::PageState;

/// Pages that one read for a plan brings at most.
const DATA_BATCH_PAGES: u64 = 16;
/// Pages without data that are installed at a time.
const ZERO_BATCH_PAGES: u64 = 64;

/// What is left to do of a client's plan.
#[derive(Debug, Default)]
pub(crate) struct AheadWork {
    /// Regions and pages, in the plan's order.
    left: VecDeque<(u32, PageRange)>,
    /// Batches that are being read.
    batches: usize,
    report: Ahead,
}

impl AheadWork {
    /// The plan in pieces of regions; at most `limit` pages of it.
    pub(crate) fn new(pieces: impl IntoIterator<Item = (u32, PageRange)>, limit: u64) -> Self {
        let mut room = limit;
        let mut work = Self::default();
        for (region, pages) in pieces {
            let count = pages.count().get();
            if count <= room {
                work.left.push_back((region, pages));
                room -= count;
            } else {
                work.report.failed_pages += count;
            }
        }
        work
    }

    /// Whether there is anything to start.
    pub(super) fn has_left(&self) -> bool {
        !self.left.is_empty()
    }
}

impl Server {
    /// Starts one batch of the next client's plan, if nobody waits for a read to start and few
    /// enough are in flight: who faults meanwhile comes before the next batch.
    pub(super) fn start_planned(&mut self) {
        if self.planned.is_empty()
            || self.stopping.is_some()
            || self.queue.has_ready()
            || self.planned_reads >= self.parts.budget.ahead_reads
        {
            return;
        }
        while self
            .planned
            .front()
            .is_some_and(|&key| self.clients.get(key).is_none())
        {
            self.planned.pop_front();
        }
        let Some(key) = self.planned.pop_front() else {
            return;
        };
        let took = self.start_batch(key);
        let client = self.clients.get(key);
        if client.is_some_and(|client| client.ahead.has_left()) {
            self.planned.push_back(key);
        } else {
            self.tell_when_done(key);
        }
        // Whatever was done: the next batch need not wait for anything but messages.
        self.goes_on |= took;
    }

    /// Whether a batch was started or done.
    fn start_batch(&mut self, key: ClientKey) -> bool {
        let Some(client) = self.clients.get_mut(key) else {
            return false;
        };
        let Some((number, pages)) = client.ahead.left.pop_front() else {
            return false;
        };
        let (batch, kind) = next_batch(&client.regions[number as usize], pages);
        let rest = PageRange::between(batch.end(), pages.end());
        let region = RegionKey {
            client: key,
            region: number,
        };
        let started = match kind {
            _ if batch.is_empty() => true,
            PageKind::Data => self.read_planned(region, batch),
            PageKind::Zero | PageKind::Hole => {
                let report = self.install(region, batch, Content::Zero, Origin::Zero, None);
                self.count_planned(region, batch.count().get(), report.done());
                if report.done() < batch.count().get() {
                    let left = batch.start().plus(report.done());
                    self.install_failed(region, PageRange::between(left, batch.end()), report);
                }
                true
            }
        };
        let left = if started { rest } else { pages };
        if let Some(client) = self.clients.get_mut(key)
            && !left.is_empty()
        {
            client.ahead.left.push_front((number, left));
        }
        started
    }

    /// Reads pages of a plan, or has a read that is under way bring them too.
    fn read_planned(&mut self, region: RegionKey, batch: PageRange) -> bool {
        let Some(served) = self.served(region) else {
            return true;
        };
        let covering = self.read_covering(served.image.number(), batch);
        if let Some(read) = covering.and_then(|slot| self.reads[slot.index()].as_mut()) {
            read.add(region, batch, true);
            if let Some(served) = self.served_mut(region) {
                served.set_all(batch, PageState::Reading);
            }
        } else {
            let wanted = Wanted {
                region,
                asked: batch.start(),
                run: batch,
                is_planned: true,
            };
            let Some((_, run)) = self.read(wanted) else {
                return false;
            };
            self.planned_reads += 1;
            let missed = batch.count().get() - run.count().get();
            if missed > 0
                && let Some(client) = self.clients.get_mut(region.client)
            {
                let rest = PageRange::between(run.end(), batch.end());
                client.ahead.left.push_front((region.region, rest));
            }
        }
        if let Some(client) = self.clients.get_mut(region.client) {
            client.ahead.batches += 1;
        }
        true
    }

    /// A read for a plan is over: `done` of its pages are there.
    pub(super) fn planned_done(&mut self, target: &Target, done: u64) {
        self.count_planned(target.region, target.wanted.count_ones().into(), done);
        let key = target.region.client;
        if let Some(client) = self.clients.get_mut(key) {
            client.ahead.batches = client.ahead.batches.saturating_sub(1);
            self.tell_when_done(key);
        }
    }

    fn count_planned(&mut self, region: RegionKey, pages: u64, done: u64) {
        if let Some(client) = self.clients.get_mut(region.client) {
            client.ahead.report.pages += done;
            client.ahead.report.failed_pages += pages.saturating_sub(done);
            let image = client.regions[region.region as usize].image();
            image.metrics().ahead(done);
        }
    }

    fn tell_when_done(&mut self, key: ClientKey) {
        if let Some(client) = self.clients.get_mut(key)
            && client.ahead.batches == 0
            && !client.ahead.has_left()
        {
            let event = ClientEvent::AheadDone {
                client: client.id,
                ahead: client.ahead.report,
            };
            client.tells.tell(event);
        }
    }
}

/// The first pages of `pages` that can be brought at once, and what they are; empty, and at the
/// right place, when the first are there already or must not be brought.
fn next_batch(served: &Served, pages: PageRange) -> (PageRange, PageKind) {
    let may = |page: PageIndex| served.may_bring_ahead(page);
    let mut start = pages.start();
    if !may(start) {
        while start < pages.end() && !may(start) {
            start = start.plus(1);
        }
        return (PageRange::between(start, start), PageKind::Hole);
    }
    let is_data = served.kind(start) == PageKind::Data;
    let limit = if is_data {
        DATA_BATCH_PAGES
    } else {
        ZERO_BATCH_PAGES
    };
    let mut end = start.plus(1);
    while end < pages.end()
        && end.get() - start.get() < limit
        && may(end)
        && (served.kind(end) == PageKind::Data) == is_data
    {
        end = end.plus(1);
    }
    let kind = served.kind(start);
    (PageRange::between(start, end), kind)
}
