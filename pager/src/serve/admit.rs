#![forbid(unsafe_code)]
//! From a fault message to an answer, or to a place in the queue.

use std::time::Instant;

use super::Server;
use super::place::Place;
use crate::counts::add;
use crate::fault::Message;
use crate::health::PoisonReason;
use crate::image::PageKind;
use crate::install::{Content, Installed, Stopped, install};
use crate::metrics::{FaultKind, Origin, Stages};
use crate::page::{PageIndex, PageRange};
use crate::prefetch::plan::{Direction, Verdict, Window};
use crate::queue::Waiter;
use crate::residency::PageState;
use crate::retry::RetryReason;

/// Pages of zeros to copy from.
const ZERO_PAGES: u64 = 16;
static ZEROS: [u8; 16 * 4096] = [0; 16 * 4096];

impl Server {
    /// Handles all messages of the inbox. All of them were taken off the userfaultfd before.
    pub(super) fn handle_messages(&mut self) {
        if self.inbox.messages.is_empty() {
            return;
        }
        let arrived = Instant::now();
        let mut at = 0;
        // By position: installing may drain further messages into the inbox.
        while let Some(&message) = self.inbox.messages.get(at) {
            at += 1;
            match message {
                Message::Fault { address, write } => self.admit(address, write, arrived),
                Message::Unexpected { event } => {
                    tracing::error!(
                        event,
                        "the userfaultfd sent an event that was not asked for"
                    );
                }
            }
        }
        self.inbox.messages.clear();
    }

    fn admit(&mut self, address: u64, write: bool, arrived: Instant) {
        add(&self.parts.tally.faults, 1);
        let mut images = self.parts.images.iter().enumerate();
        let place =
            images.find_map(|(number, served)| Some((number, served.region.page_at(address)?)));
        let Some((image, page)) = place else {
            // Memory that a clone dropped a moment ago: its waiters are gone with it.
            tracing::debug!(address, "a fault outside every image");
            return;
        };
        match self.parts.images[image].residency.get(page) {
            PageState::Present | PageState::Poisoned => self.admit_stale(image, page, arrived),
            PageState::Reading => self.join(image, page, arrived),
            PageState::Absent if self.queue.waits_for(image, page) => {
                self.join(image, page, arrived);
            }
            PageState::Absent => {
                if let Some(recorder) = &self.parts.recorder {
                    recorder.touched(image, page, write);
                }
                self.admit_absent(image, page, write, arrived);
            }
        }
    }

    fn admit_absent(&mut self, image: usize, page: PageIndex, write: bool, arrived: Instant) {
        match self.parts.images[image].image.index().kind(page) {
            PageKind::Data => self.admit_data(image, page, arrived),
            PageKind::Zero | PageKind::Hole if write => {
                let limit = self.parts.budget.data_window_pages.min(ZERO_PAGES);
                self.admit_zero(image, page, arrived, Content::Bytes(&ZEROS), limit);
            }
            PageKind::Zero | PageKind::Hole => {
                let limit = self.parts.budget.zero_window_pages;
                self.admit_zero(image, page, arrived, Content::Zero, limit);
            }
        }
    }

    /// The message was overtaken by the install that answers it. Its thread is awake, or woken.
    fn admit_stale(&mut self, image: usize, page: PageIndex, arrived: Instant) {
        self.count(FaultKind::Stale);
        let served = &mut self.parts.images[image];
        let installed = served.residency.get(page) == PageState::Present;
        if installed && served.stale.is_discarded(page) {
            let waiter = self.waiter(image, page, arrived, SINGLE);
            self.queue.push(waiter);
            self.poison(image, page, PoisonReason::Discarded);
            return;
        }
        self.wake(image, PageRange::single(page));
    }

    /// Somebody asked for the page before; the same answer will do.
    fn join(&mut self, image: usize, page: PageIndex, arrived: Instant) {
        self.count(FaultKind::Joined);
        if !self.queue.waits_for(image, page) && self.parts.images[image].streams.late(page) {
            self.parts.metrics.prefetch(0, 1, 0);
            add(&self.parts.tally.prefetch_late, 1);
        }
        let mut waiter = self.waiter(image, page, arrived, SINGLE);
        if let Some(first) = self.queue.oldest_for(image, page) {
            // Who comes later does not cut a pause short.
            waiter.attempts = first.attempts;
            waiter.not_before = first.not_before;
            waiter.refused = first.refused;
        }
        waiter.read = self.read_bringing(image, page);
        self.queue.push(waiter);
    }

    fn admit_data(&mut self, image: usize, page: PageIndex, arrived: Instant) {
        self.count(FaultKind::Data);
        let limit = self.parts.budget.data_window_pages;
        let window = self.plan(image, page, limit);
        let waiter = self.waiter(image, page, arrived, window);
        self.queue.push(waiter);
    }

    /// A page without data. Who reads it gets the kernel's zero page; who writes it gets a page
    /// of zeros of its own at once, as the kernel would have to make one right behind.
    fn admit_zero(
        &mut self,
        image: usize,
        page: PageIndex,
        arrived: Instant,
        content: Content<'_>,
        limit: u64,
    ) {
        self.count(FaultKind::Zero);
        let window = self.plan(image, page, limit);
        let run = self.run_of(image, page, window, |kind| kind != PageKind::Data);
        self.parts.images[image].streams.chosen(window.stream, run);
        let started = Instant::now();
        let report = self.install(image, run, content, Origin::Zero);
        let rest = PageRange::between(run.start().plus(report.done()), run.end());
        if !rest.contains(page) {
            let now = Instant::now();
            let stages = Stages {
                queue: started.saturating_duration_since(arrived),
                read: None,
                install: now.saturating_duration_since(started),
                total: now.saturating_duration_since(arrived),
            };
            self.parts.metrics.answered(Origin::Zero, &stages);
            return;
        }
        // A window backward ends with the page asked for: it may be left though others are done.
        let waiter = self.waiter(image, page, arrived, SINGLE);
        self.queue.push(waiter);
        self.install_failed(image, rest, report);
    }

    /// A waiter whose install failed is asked again as a single page.
    pub(super) fn retry_zero(&mut self, waiter: &Waiter) {
        let run = PageRange::single(waiter.page);
        let report = self.install(waiter.image, run, Content::Zero, Origin::Zero);
        if report.done() == 1 {
            self.queue.answer(waiter.image, run, |_| ());
        } else {
            self.install_failed(waiter.image, run, report);
        }
    }

    fn plan(&mut self, image: usize, page: PageIndex, limit: u64) -> Window {
        let (window, verdict) = self.parts.images[image].streams.on_fault(page, limit);
        self.judge(verdict);
        window
    }

    fn judge(&self, verdict: Verdict) {
        let (metrics, tally) = (&self.parts.metrics, &self.parts.tally);
        metrics.prefetch(verdict.useful, 0, verdict.wasted);
        add(&tally.prefetch_useful, verdict.useful);
        add(&tally.prefetch_wasted, verdict.wasted);
    }

    /// The pages from `page` on, in the window's direction, that are absent and of a wanted kind.
    pub(super) fn run_of(
        &self,
        image: usize,
        page: PageIndex,
        window: Window,
        wanted: impl Fn(PageKind) -> bool,
    ) -> PageRange {
        let served = &self.parts.images[image];
        let fits = |candidate: PageIndex| {
            candidate.get() < served.image.pages().get()
                && served.residency.get(candidate) == PageState::Absent
                && wanted(served.image.index().kind(candidate))
        };
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

    /// Installs `content` at `pages` and records what was done; the rest is the caller's.
    pub(super) fn install(
        &mut self,
        image: usize,
        pages: PageRange,
        content: Content<'_>,
        origin: Origin,
    ) -> Installed {
        let Some(mapping) = self.parts.images[image].region.pin() else {
            return Installed {
                stopped: Some(Stopped::Gone),
                ..Installed::default()
            };
        };
        let mut place = Place {
            uffd: &self.parts.uffd,
            mapping: &mapping,
            inbox: &mut self.inbox,
        };
        let report = install(&mut place, pages, content);
        let done = PageRange::between(pages.start(), pages.start().plus(report.done()));
        let residency = &mut self.parts.images[image].residency;
        residency.set_all(done, PageState::Present);
        let (metrics, tally) = (&self.parts.metrics, &self.parts.tally);
        metrics.installed(origin, report.fresh);
        let pages = match origin {
            Origin::Zero => &tally.pages_zero,
            Origin::Cache => &tally.pages_cache,
            Origin::Disk => &tally.pages_disk,
        };
        add(pages, report.fresh);
        add(&tally.pages_already_present, report.present);
        self.retried(RetryReason::InstallAgain, report.again.into());
        self.retried(RetryReason::InstallNoMemory, report.no_memory.into());
        self.retried(RetryReason::InstallSplit, report.split.into());
        report
    }

    pub(super) fn wake(&self, image: usize, pages: PageRange) {
        if let Some(mapping) = self.parts.images[image].region.pin() {
            crate::sys::userfaultfd::wake(&self.parts.uffd, &mapping, pages);
        }
    }

    pub(super) fn retried(&self, reason: RetryReason, times: u64) {
        if times > 0 {
            self.parts.metrics.retried(reason, times);
            add(&self.parts.tally.retries, times);
        }
    }

    fn count(&self, kind: FaultKind) {
        self.parts.metrics.fault(kind);
        let tally = &self.parts.tally;
        let counter = match kind {
            FaultKind::Data => &tally.faults_data,
            FaultKind::Zero => &tally.faults_zero,
            FaultKind::Joined => &tally.faults_joined,
            FaultKind::Stale => &tally.faults_stale,
        };
        add(counter, 1);
    }

    fn waiter(&self, image: usize, page: PageIndex, arrived: Instant, window: Window) -> Waiter {
        Waiter {
            image,
            page,
            arrived,
            attempts: 0,
            not_before: None,
            refused: None,
            window,
            read: None,
        }
    }
}

/// One page, of no walk.
pub(super) const SINGLE: Window = Window {
    direction: Direction::Forward,
    pages: 1,
    stream: usize::MAX,
};
