#![forbid(unsafe_code)]
//! From a fault message to an answer, or to a place in the queue.

use std::time::Instant;

use super::Server;
use super::served::Served;
use crate::counts::add;
use crate::health::PoisonReason;
use crate::image::PageKind;
use crate::install::Content;
use crate::metrics::{FaultKind, Origin, Stages};
use crate::page::{PageIndex, PageRange};
use crate::prefetch::plan::{Direction, Window};
use crate::queue::{ClientKey, PageKey, RegionKey};
use crate::residency::PageState;

/// Pages of zeros to copy from.
const ZERO_PAGES: u64 = 16;
static ZEROS: [u8; 16 * 4096] = [0; 16 * 4096];

/// A fault on its way.
#[derive(Clone, Copy, Debug)]
struct Fault {
    key: PageKey,
    write: bool,
    arrived: Instant,
}

impl Server {
    pub(super) fn admit(&mut self, client: ClientKey, address: u64, write: bool, arrived: Instant) {
        add(&self.parts.tally.faults, 1);
        let Some(asking) = self.clients.get_mut(client) else {
            return;
        };
        let Some((region, page)) = asking.page_at(address) else {
            // Memory that a clone dropped a moment ago: its waiters are gone with it.
            tracing::debug!(address, "a fault outside every image");
            return;
        };
        let fault = Fault {
            key: RegionKey { client, region }.page(page),
            write,
            arrived,
        };
        let served = &asking.regions[region as usize];
        match served.state(page) {
            PageState::Present if served.is_discarded(page) => self.admit_discarded(fault),
            PageState::Present | PageState::Poisoned => self.admit_stale(fault),
            PageState::Reading => self.join(fault),
            PageState::Absent if self.queue.waits_for(fault.key) => self.join(fault),
            PageState::Absent => {
                if let Some(recorder) = &asking.recorder {
                    recorder.touched(served.image.number(), page, write);
                }
                self.admit_absent(fault);
            }
        }
    }

    fn admit_absent(&mut self, fault: Fault) {
        let Some(served) = self.served(fault.key.region) else {
            return;
        };
        match served.kind(fault.key.page) {
            PageKind::Data => self.admit_data(fault),
            PageKind::Zero | PageKind::Hole if fault.write => {
                let limit = self.parts.budget.data_window_pages.min(ZERO_PAGES);
                self.admit_zero(fault, Content::Bytes(&ZEROS), limit);
            }
            PageKind::Zero | PageKind::Hole => {
                let limit = self.parts.budget.zero_window_pages;
                self.admit_zero(fault, Content::Zero, limit);
            }
        }
    }

    /// The page was brought and then discarded for good; or the message was overtaken, and it is there.
    fn admit_discarded(&mut self, fault: Fault) {
        self.count(fault.key.region, FaultKind::Zero);
        let run = PageRange::single(fault.key.page);
        let report = self.install(fault.key.region, run, Content::Zero, Origin::Zero, None);
        if report.done() == 0 {
            self.queue
                .push(fault.key, fault.arrived, fault.write, SINGLE);
            self.install_failed(fault.key.region, run, report);
        }
    }

    /// The message was overtaken by the install that answers it. Its thread is awake, or woken.
    fn admit_stale(&mut self, fault: Fault) {
        let (region, page) = (fault.key.region, fault.key.page);
        self.count(region, FaultKind::Stale);
        let Some(served) = self.served_mut(region) else {
            return;
        };
        if served.state(page) == PageState::Present && served.stale.is_discarded(page) {
            self.queue
                .push(fault.key, fault.arrived, fault.write, SINGLE);
            self.poison(fault.key, PoisonReason::Discarded);
            return;
        }
        self.wake(region, PageRange::single(page));
    }

    /// Somebody asked for the page before, or it is on its way; the same answer will do.
    fn join(&mut self, fault: Fault) {
        let Fault {
            key,
            write,
            arrived,
        } = fault;
        self.count(key.region, FaultKind::Joined);
        self.count_range(key);
        if self.queue.join(key, arrived, write) {
            return;
        }
        let read = self.read_bringing(key);
        let planned = read.is_some_and(|(_, is_planned)| is_planned);
        if let Some(served) = self.served_mut(key.region)
            && (served.streams.late(key.page) || planned)
        {
            served.image.metrics().prefetch(0, 1, 0);
            add(&self.parts.tally.prefetch_late, 1);
        }
        self.queue.push(key, arrived, write, SINGLE);
        if let Some((slot, _)) = read {
            self.queue.assign(key, slot);
        }
    }

    fn admit_data(&mut self, fault: Fault) {
        self.count(fault.key.region, FaultKind::Data);
        self.count_range(fault.key);
        let limit = self.parts.budget.data_window_pages;
        let window = self.plan(fault.key, limit);
        self.queue
            .push(fault.key, fault.arrived, fault.write, window);
    }

    /// A page without data. Who reads it gets the kernel's zero page; who writes it gets a page
    /// of zeros of its own at once, as the kernel would have to make one right behind.
    fn admit_zero(&mut self, fault: Fault, content: Content<'_>, limit: u64) {
        let (key, arrived) = (fault.key, fault.arrived);
        self.count(key.region, FaultKind::Zero);
        let window = self.plan(key, limit);
        let Some(served) = self.served_mut(key.region) else {
            return;
        };
        let run = run_of(served, key.page, window, |kind| kind != PageKind::Data);
        served.streams.chosen(window.stream, run);
        let started = Instant::now();
        let written = fault.write.then_some(key.page);
        let report = self.install(key.region, run, content, Origin::Zero, written);
        let rest = PageRange::between(run.start().plus(report.done()), run.end());
        if !rest.contains(key.page) {
            let now = Instant::now();
            let stages = Stages {
                queue: started.saturating_duration_since(arrived),
                read: None,
                install: now.saturating_duration_since(started),
                total: now.saturating_duration_since(arrived),
            };
            if let Some(served) = self.served(key.region) {
                served.image.metrics().answered(Origin::Zero, &stages);
            }
            return;
        }
        // A window backward ends with the page asked for: it may be left though others are done.
        self.queue.push(key, arrived, fault.write, SINGLE);
        self.install_failed(key.region, rest, report);
    }

    /// A waiter whose install failed is asked again as a single page.
    pub(super) fn retry_zero(&mut self, key: PageKey) {
        let run = PageRange::single(key.page);
        let report = self.install(key.region, run, Content::Zero, Origin::Zero, None);
        if report.done() == 1 {
            self.queue.answer(key);
        } else {
            self.install_failed(key.region, run, report);
        }
    }

    /// How far to go for a page: alone where touches are recorded, for what is brought ahead
    /// would never be seen to be touched.
    fn plan(&mut self, key: PageKey, limit: u64) -> Window {
        let Some(client) = self.clients.get_mut(key.client()) else {
            return SINGLE;
        };
        let limit = if client.recorder.is_some() { 1 } else { limit };
        let served = &mut client.regions[key.region.region as usize];
        let (window, verdict) = served.streams.on_fault(key.page, limit);
        let tally = &self.parts.tally;
        let metrics = served.image.metrics();
        metrics.prefetch(verdict.useful, 0, verdict.wasted);
        add(&tally.prefetch_useful, verdict.useful);
        add(&tally.prefetch_wasted, verdict.wasted);
        window
    }

    /// Counts a fault on a page that was not there, if it has data and somebody asks for such counts.
    fn count_range(&self, key: PageKey) {
        if let Some(served) = self.served(key.region)
            && let Some(ranges) = served.image.ranges()
            && served.kind(key.page) == PageKind::Data
        {
            ranges.count(key.page);
        }
    }

    fn count(&self, region: RegionKey, kind: FaultKind) {
        if let Some(served) = self.served(region) {
            served.image.metrics().fault(kind);
        }
        let tally = &self.parts.tally;
        let counter = match kind {
            FaultKind::Data => &tally.faults_data,
            FaultKind::Zero => &tally.faults_zero,
            FaultKind::Joined => &tally.faults_joined,
            FaultKind::Stale => &tally.faults_stale,
        };
        add(counter, 1);
    }
}

/// The pages from `page` on, in the window's direction, that may be brought and are of a wanted
/// kind; `page` itself in any case.
pub(super) fn run_of(
    served: &Served,
    page: PageIndex,
    window: Window,
    wanted: impl Fn(PageKind) -> bool,
) -> PageRange {
    let fits = |candidate| served.may_bring_ahead(candidate) && wanted(served.kind(candidate));
    let (mut start, mut end) = (page, page.plus(1));
    for _ in 1..window.pages {
        match window.direction {
            Direction::Forward if fits(end) => end = end.plus(1),
            Direction::Backward if start.get() > 0 && fits(PageIndex::new(start.get() - 1)) => {
                start = PageIndex::new(start.get() - 1);
            }
            _ => break,
        }
    }
    PageRange::between(start, end)
}

/// One page, of no walk.
pub(super) const SINGLE: Window = Window {
    direction: Direction::Forward,
    pages: 1,
    stream: usize::MAX,
};
