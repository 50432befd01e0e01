#![forbid(unsafe_code)]
//! Faults of clones in holes of their root: heard of from pagers, proven, added up, and told to the
//! root, which fills what is worth it for the clones to come.

use std::collections::BTreeMap;

use pando_pager::{ImageId, PageCount};

use super::forks::Forks;
use super::supervise::Supervisor;
use crate::observe::metrics;
use crate::root::faults::{RawRangeFaults, prove};
use crate::root::protocol::RangeFaults;

/// Most ranges whose faults are kept until the root hears of them. Where there are more, all counts
/// are halved, so that those which clones ask for no more make room.
const MAX_FAULT_RANGES: usize = 4096;

/// Faults of clones in holes of the root, until it hears of them.
#[derive(Debug, Default)]
pub(super) struct HoleFaults {
    counts: BTreeMap<(u32, u64), u64>,
    /// How many pages each backend has, once a root has said so.
    backends: Vec<PageCount>,
    /// The root has not heard of all of it.
    is_news: bool,
    /// It was told of some and has not answered.
    is_told: bool,
    /// Answers of all roots.
    pub(super) answers: u64,
    /// Faults that were reported.
    pub(super) heard: u64,
    /// Holes that roots filled because of them.
    pub(super) promoted_ranges: u64,
}

impl HoleFaults {
    /// A new root knows of nothing and owes no answer.
    pub(super) fn root_is_new(&mut self) {
        self.is_news = !self.counts.is_empty();
        self.is_told = false;
    }

    /// A root has said how many pages each backend has.
    pub(super) fn backends_are(&mut self, pages: &[u64]) {
        self.backends = pages.iter().copied().map(PageCount::new).collect();
    }

    /// The pager of a fork counts images as its root does backends.
    fn backend_of(&self, image: ImageId) -> Option<(u32, PageCount)> {
        let pages = self.backends.get(usize::try_from(image.number()).ok()?)?;
        Some((image.number(), *pages))
    }

    fn note(&mut self, faults: &[RangeFaults]) {
        self.is_news |= !faults.is_empty();
        let mut is_full = false;
        for fault in faults {
            let place = (fault.backend, fault.unit);
            self.heard = self.heard.saturating_add(fault.faults);
            if self.counts.len() < MAX_FAULT_RANGES || self.counts.contains_key(&place) {
                let count = self.counts.entry(place).or_default();
                *count = count.saturating_add(fault.faults);
            } else {
                is_full = true;
            }
        }
        if is_full {
            self.counts.retain(|_, count| {
                *count /= 2;
                *count > 0
            });
        }
    }

    fn message(&mut self) -> Option<Vec<RangeFaults>> {
        if self.is_told || !self.is_news {
            return None;
        }
        self.is_told = true;
        self.is_news = false;
        let all = self
            .counts
            .iter()
            .map(|(&(backend, unit), &faults)| RangeFaults {
                backend,
                unit,
                faults,
            });
        Some(all.collect())
    }
}

impl Forks {
    /// How often a root has looked at what clones asked pagers for, and filled what is worth it.
    pub fn hole_faults_answered(&self) -> u64 {
        self.hole_faults.answers
    }

    /// Faults in holes of roots that pagers have reported.
    pub fn hole_faults_heard(&self) -> u64 {
        self.hole_faults.heard
    }

    /// Holes that roots filled for clones to come because of them.
    pub fn promoted_ranges(&self) -> u64 {
        self.hole_faults.promoted_ranges
    }
}

impl Supervisor {
    /// Engine `root`: clones asked their pagers so often for pages of ranges that the root does not
    /// hold. The root fills what is worth it, when it has nothing else to do; forks to come find it
    /// there. Counts add up over calls, as long as the root lives.
    pub fn note_hole_faults(&mut self, faults: &[RangeFaults]) {
        let before = self.forks.hole_faults.heard;
        self.forks.hole_faults.note(faults);
        let heard = self.forks.hole_faults.heard - before;
        metrics::count_hole_faults(&self.options.name, heard);
        self.tell_hole_faults();
    }

    /// The pager of a fork reports.
    pub(super) fn hear_fork_faults(&mut self, number: usize, report: &[RawRangeFaults]) {
        let known = &self.forks.hole_faults;
        let proven = prove(report, |image| known.backend_of(image));
        self.take_hole_faults(&format!("clone {number}"), proven);
    }

    /// Takes what `who` reported, if it was proven.
    pub(super) fn take_hole_faults(&mut self, who: &str, proven: Option<Vec<RangeFaults>>) {
        match proven {
            Some(faults) => self.note_hole_faults(&faults),
            None => tracing::warn!("{who} reports faults of memory that does not exist"),
        }
    }

    /// One message at a time, and none while a fork is under way.
    pub(super) fn tell_hole_faults(&mut self) {
        let forks = &mut self.forks;
        if !forks.is_ready || !forks.flying.is_empty() || !forks.waiting.is_empty() {
            return;
        }
        if let Some(root) = &forks.root
            && let Some(faults) = forks.hole_faults.message()
            && let Err(error) = root.note_hole_faults(faults)
        {
            // Its end will be heard of.
            tracing::debug!("{}", crate::report::chain(&error));
        }
    }

    /// The root has looked at what it was told: `filled` are the bytes that it holds and those of its
    /// holes.
    pub(super) fn root_filled(&mut self, filled: (u64, u64), promoted_ranges: u64) {
        let forks = &mut self.forks;
        forks.hole_faults.is_told = false;
        forks.hole_faults.answers += 1;
        let promoted = &mut forks.hole_faults.promoted_ranges;
        *promoted = promoted.saturating_add(promoted_ranges);
        forks.filled = Some(filled);
        if promoted_ranges > 0 {
            let (filled_bytes, hole_bytes) = filled;
            tracing::info!(
                promoted_ranges,
                filled_bytes,
                hole_bytes,
                "the root holds what clones asked for"
            );
        }
        metrics::count_promoted(&self.options.name, promoted_ranges);
        metrics::set_root_memory(&self.options.name, filled.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(unit: u64, faults: u64) -> RangeFaults {
        RangeFaults {
            backend: 0,
            unit,
            faults,
        }
    }

    #[test]
    fn faults_add_up_and_are_told_once_until_they_are_answered() {
        let mut known = HoleFaults::default();
        assert_eq!(known.message(), None);
        known.note(&[fault(4, 10), fault(4, 5), fault(1, u64::MAX), fault(1, 1)]);
        assert_eq!(
            known.message(),
            Some(vec![fault(1, u64::MAX), fault(4, 15)])
        );
        assert_eq!(known.message(), None);
        known.is_told = false;
        assert_eq!(known.message(), None, "there is no news");
        known.note(&[fault(4, 1)]);
        assert!(known.message().is_some());
        known.root_is_new();
        assert!(known.message().is_some(), "another root knows nothing");
    }

    #[test]
    fn ranges_that_are_asked_for_stay_when_there_are_too_many() {
        let mut known = HoleFaults::default();
        let many: Vec<_> = (0..MAX_FAULT_RANGES as u64)
            .map(|unit| fault(unit, 1 + u64::from(unit == 7) * 99))
            .collect();
        known.note(&many);
        assert_eq!(known.counts.len(), MAX_FAULT_RANGES);
        // One more than are kept: the others fade, and it has room the next time.
        known.note(&[fault(1 << 20, 3)]);
        assert_eq!(known.counts, BTreeMap::from([((0, 7), 50)]));
        known.note(&[fault(1 << 20, 3)]);
        assert_eq!(known.counts.len(), 2);
    }
}
