#![forbid(unsafe_code)]
//! A source that delays and fails reads of another: for tests and measurements.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{PageRead, PageSource, ReadDone, ReadPort, Started};
use crate::page::{PAGE_BYTES, PageIndex};

/// What to do to which reads. Chosen by the seed and the read's place, so that a run can be
/// repeated whatever the order of faults. `Default` does nothing.
#[derive(Clone, Debug)]
pub struct FaultPlan {
    /// Chooses the reads.
    pub seed: u64,
    /// Reads of a thousand that are delayed.
    pub delayed_per_mille: u64,
    /// By how much.
    pub delay: Duration,
    /// Reads of ten thousand that fail once, the first time that place is read.
    pub fail_once_per_10_000: u64,
    /// The errno of failing reads.
    pub errno: i32,
    /// Reads that fail by number, counted from 0.
    pub fail_calls: HashSet<u64>,
    /// Reads that end half-way by number, counted from 0.
    pub short_calls: HashSet<u64>,
    /// Pages of any image whose reads always fail.
    pub fail_pages: HashSet<PageIndex>,
    /// Pages of any image whose reads never end.
    pub hang_pages: HashSet<PageIndex>,
    /// The source panics at this read, to see what becomes of the pager.
    pub panic_at: Option<u64>,
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self {
            seed: 0,
            delayed_per_mille: 0,
            delay: Duration::from_millis(1),
            fail_once_per_10_000: 0,
            errno: libc::EIO,
            fail_calls: HashSet::new(),
            short_calls: HashSet::new(),
            fail_pages: HashSet::new(),
            hang_pages: HashSet::new(),
            panic_at: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    fail: bool,
    short: bool,
    hang: bool,
    delay: bool,
}

/// The decorator.
#[derive(Debug)]
pub struct Faulty {
    inner: Box<dyn PageSource>,
    plan: FaultPlan,
    calls: u64,
    failed_once: HashSet<(usize, u64)>,
    fates: Vec<Fate>,
    held: Vec<(Instant, ReadDone)>,
    hung: Vec<ReadDone>,
    ticked: Vec<ReadDone>,
}

impl Faulty {
    /// Puts `plan` around `inner`.
    pub fn new(inner: Box<dyn PageSource>, plan: FaultPlan) -> Self {
        Self {
            inner,
            plan,
            calls: 0,
            failed_once: HashSet::new(),
            fates: Vec::new(),
            held: Vec::new(),
            hung: Vec::new(),
            ticked: Vec::new(),
        }
    }

    fn draw(&self, read: &PageRead, what: u64, of: u64) -> u64 {
        let mut place = [0; 16];
        place[..8].copy_from_slice(&read.offset().get().to_le_bytes());
        place[8..].copy_from_slice(&(read.image() as u64).to_le_bytes());
        xxh3_64_with_seed(&place, self.plan.seed.wrapping_add(what)) % of
    }

    fn fate(&mut self, read: &PageRead) -> Fate {
        let call = self.calls;
        self.calls += 1;
        assert!(
            self.plan.panic_at != Some(call),
            "planned panic at read {call}"
        );
        let first = PageIndex::containing(read.offset()).get();
        let last = first + (read.bytes() as u64).div_ceil(PAGE_BYTES);
        let touches = |pages: &HashSet<PageIndex>| {
            (first..last).any(|page| pages.contains(&PageIndex::new(page)))
        };
        let once = self.draw(read, 1, 10_000) < self.plan.fail_once_per_10_000
            && self.failed_once.insert((read.image(), read.offset().get()));
        Fate {
            fail: once || self.plan.fail_calls.contains(&call) || touches(&self.plan.fail_pages),
            short: self.plan.short_calls.contains(&call),
            hang: touches(&self.plan.hang_pages),
            delay: self.draw(read, 2, 1000) < self.plan.delayed_per_mille,
        }
    }

    /// The read as planned; `None` when it is held back.
    fn change(&mut self, done: ReadDone) -> Option<ReadDone> {
        let fate = self
            .fates
            .get(done.slot().index())
            .copied()
            .unwrap_or_default();
        let result = if fate.fail {
            Err(self.plan.errno)
        } else if fate.short {
            done.result().map(|bytes| bytes / 2)
        } else {
            done.result()
        };
        let done = done.with_result(result);
        if fate.hang {
            self.hung.push(done);
            return None;
        }
        if fate.delay {
            self.held.push((Instant::now() + self.plan.delay, done));
            return None;
        }
        Some(done)
    }
}

impl PageSource for Faulty {
    fn start(&mut self, read: PageRead, port: &mut ReadPort<'_>) -> Started {
        let slot = read.slot().index();
        let fate = self.fate(&read);
        if self.fates.len() <= slot {
            self.fates.resize(slot + 1, Fate::default());
        }
        self.fates[slot] = fate;
        match self.inner.start(read, port) {
            Started::Done(done) => match self.change(done) {
                Some(done) => Started::Done(done),
                None => Started::Pending,
            },
            other => other,
        }
    }

    fn finish(&mut self, done: ReadDone) -> Option<ReadDone> {
        let done = self.inner.finish(done)?;
        self.change(done)
    }

    fn tick(&mut self, now: Instant, done: &mut Vec<ReadDone>) {
        let mut at = 0;
        while at < self.held.len() {
            if self.held[at].0 <= now {
                done.push(self.held.swap_remove(at).1);
            } else {
                at += 1;
            }
        }
        let mut ticked = std::mem::take(&mut self.ticked);
        self.inner.tick(now, &mut ticked);
        for read in ticked.drain(..) {
            done.extend(self.change(read));
        }
        self.ticked = ticked;
    }

    fn next_due(&self) -> Option<Instant> {
        let held = self.held.iter().map(|(due, _)| *due).min();
        match (held, self.inner.next_due()) {
            (Some(held), Some(inner)) => Some(held.min(inner)),
            (held, inner) => held.or(inner),
        }
    }
}
