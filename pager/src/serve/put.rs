#![forbid(unsafe_code)]
//! Content into a client's memory: what was done is recorded, the rest is the caller's.

use super::Server;
use super::client::Client;
use super::place::Place;
use super::served::Served;
use crate::counts::{Tally, add};
use crate::install::{Content, Installed, Stopped, install};
use crate::metrics::{Metrics, Origin};
use crate::page::{PAGE_BYTES, PageIndex, PageRange};
use crate::queue::{Queue, RegionKey};
use crate::region::Pinned;
use crate::retry::RetryReason;
use crate::sys::userfaultfd::{self as sys, Tracking};

impl Server {
    /// Installs `content` at `pages` of a region. `written` is one of them that is about to be
    /// written, besides those that the queue knows of.
    pub(super) fn install(
        &mut self,
        region: RegionKey,
        pages: PageRange,
        content: Content<'_>,
        origin: Origin,
        written: Option<PageIndex>,
    ) -> Installed {
        let gone = Installed {
            stopped: Some(Stopped::Gone),
            ..Installed::default()
        };
        let Some(client) = self.clients.get_mut(region.client) else {
            return gone;
        };
        let Some(memory) = client.regions[region.region as usize].pin() else {
            return gone;
        };
        let mut report = Installed::default();
        while report.stopped.is_none() && report.done() < pages.count().get() {
            let rest = PageRange::between(pages.start().plus(report.done()), pages.end());
            let (part, tracking) = alike(client, region, rest, written, &self.queue);
            let served = &client.regions[region.region as usize];
            let (part, is_discarded) = alike_discarded(served, part);
            // What the template has there is the clone's no more.
            let content = if is_discarded && origin != Origin::Zero {
                Content::Zero
            } else {
                content.behind(report.done() * PAGE_BYTES)
            };
            let one = put(client, region, &memory, (part, tracking), content);
            report.add(&one);
        }
        if !client.pending.is_empty() && !std::mem::replace(&mut client.in_turn, true) {
            self.turns.push_back(region.client);
        }
        let metrics = client.regions[region.region as usize].image.metrics();
        account(&self.parts.tally, metrics, origin, &report);
        report
    }

    pub(super) fn wake(&self, region: RegionKey, pages: PageRange) {
        if let Some(client) = self.clients.get(region.client)
            && let Some(memory) = client.regions[region.region as usize].pin()
        {
            sys::wake(&client.uffd, &memory, pages);
        }
    }

    pub(super) fn retried(&self, metrics: &Metrics, reason: RetryReason, times: u64) {
        retried(&self.parts.tally, metrics, reason, times);
    }
}

fn retried(tally: &Tally, metrics: &Metrics, reason: RetryReason, times: u64) {
    if times > 0 {
        metrics.retried(reason, times);
        add(&tally.retries, times);
    }
}

/// Counts what an install did.
fn account(tally: &Tally, metrics: &Metrics, origin: Origin, report: &Installed) {
    metrics.installed(origin, report.fresh);
    let pages = match origin {
        Origin::Zero => &tally.pages_zero,
        Origin::Cache => &tally.pages_cache,
        Origin::Disk => &tally.pages_disk,
    };
    add(pages, report.fresh);
    add(&tally.pages_already_present, report.present);
    let again = [
        (RetryReason::InstallAgain, report.again),
        (RetryReason::InstallNoMemory, report.no_memory),
        (RetryReason::InstallSplit, report.split),
    ];
    for (reason, times) in again {
        retried(tally, metrics, reason, times.into());
    }
}

/// The first of `pages` that can be installed by one call, and how.
fn alike(
    client: &Client,
    region: RegionKey,
    pages: PageRange,
    written: Option<PageIndex>,
    queue: &Queue,
) -> (PageRange, Tracking) {
    let served: &Served = &client.regions[region.region as usize];
    if client.tracking == Tracking::Off && !served.has_forgotten() {
        return (pages, Tracking::Off);
    }
    let tracking = |page| {
        // What is written at once need not be protected first.
        let is_written =
            written == Some(page) || queue.get(region.page(page)).is_some_and(|want| want.write);
        if is_written {
            Tracking::Off
        } else {
            client.tracking
        }
    };
    let first = pages.start();
    let alone = served.is_forgotten(first);
    let mut end = first.plus(1);
    while !alone
        && end < pages.end()
        && !served.is_forgotten(end)
        && tracking(end) == tracking(first)
    {
        end = end.plus(1);
    }
    (PageRange::between(first, end), tracking(first))
}

/// The first of `pages` that were all discarded by the clone, or all not.
fn alike_discarded(served: &Served, pages: PageRange) -> (PageRange, bool) {
    if served.discards.is_none() {
        return (pages, false);
    }
    let is_first = served.is_discarded(pages.start());
    let mut rest = pages.iter().skip(1);
    let other = rest.find(|&page| served.is_discarded(page) != is_first);
    let end = other.unwrap_or(pages.end());
    (PageRange::between(pages.start(), end), is_first)
}

/// One install of pages that are alike.
fn put(
    client: &mut Client,
    region: RegionKey,
    memory: &Pinned,
    (pages, tracking): (PageRange, Tracking),
    content: Content<'_>,
) -> Installed {
    let mut place = Place {
        uffd: &client.uffd,
        memory,
        pending: &mut client.pending,
        tracking,
    };
    let report = install(&mut place, pages, content);
    let done = PageRange::between(pages.start(), pages.start().plus(report.done()));
    client.regions[region.region as usize].installed(done, report.fresh);
    report
}
