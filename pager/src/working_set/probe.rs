#![forbid(unsafe_code)]
//! Holding pages back from a clone that is recorded. Pure.
//!
//! What is brought ahead raises no fault, so a page that clones stopped reading would be brought for
//! ever. So each run that is recorded does without one page in [`PROBE_SHARE`], another one each
//! time: if it is still of use the clone asks for it, and if not it decays as any other.

use super::plan::{Plan, PlannedRun};
use crate::page::{PageIndex, PageRange};

/// One page in so many is held back.
pub const PROBE_SHARE: u64 = 32;

impl Plan {
    /// The plan less some of its pages, which `run`, any number, chooses; and how many they are. Ranges that are filled whole stay whole.
    #[must_use]
    pub fn with_probes(&self, run: u64) -> (Self, u64) {
        let mut held_back = 0;
        let mut without = |list: &[PlannedRun]| -> Vec<PlannedRun> {
            list.iter()
                .flat_map(|planned| parts(planned, run, &mut held_back))
                .collect()
        };
        let plan = Self {
            share: without(&self.share),
            private: without(&self.private),
            zero: without(&self.zero),
            ..self.clone()
        };
        (plan, held_back)
    }
}

/// What is left of `planned`.
fn parts(planned: &PlannedRun, run: u64, held_back: &mut u64) -> Vec<PlannedRun> {
    let mut parts = Vec::new();
    let mut start = planned.pages.start();
    let mut keep = |from: PageIndex, to: PageIndex| {
        if from < to {
            let pages = PageRange::between(from, to);
            parts.push(PlannedRun { pages, ..*planned });
        }
    };
    for page in planned.pages.iter() {
        if is_probe(planned.backend, page, run) {
            keep(start, page);
            start = page.plus(1);
            *held_back += 1;
        }
    }
    keep(start, planned.pages.end());
    parts
}

/// Each page is one in one of [`PROBE_SHARE`] runs in a row.
fn is_probe(backend: u32, page: PageIndex, run: u64) -> bool {
    let place = u64::from(backend) << 56 ^ page.get();
    // Neighbours must not be probes of the same run: a walk would bring them all.
    let mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    mixed.wrapping_add(run).is_multiple_of(PROBE_SHARE)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::page::PageCount;

    #[test]
    fn each_page_is_held_back_in_one_run_of_many() {
        let run = |start, count| PlannedRun {
            backend: 1,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
            rank: 7,
        };
        let plan = Plan {
            share: vec![run(1000, 3000), run(5000, 1)],
            private: vec![run(10_000, 500)],
            zero: vec![run(20_000, 64)],
            ..Plan::default()
        };
        let pages = |plan: &Plan| -> BTreeSet<u64> {
            let runs = plan.share.iter().chain(&plan.private);
            let runs = runs.chain(&plan.zero);
            runs.flat_map(|run| run.pages.iter().map(PageIndex::get))
                .collect()
        };
        let all = pages(&plan);
        let mut probed = BTreeSet::new();
        for number in 0..PROBE_SHARE {
            let (left, held_back) = plan.with_probes(number);
            let missing: BTreeSet<_> = all.difference(&pages(&left)).copied().collect();
            assert_eq!(missing.len() as u64, held_back);
            assert!((60..180).contains(&held_back), "{held_back}");
            assert!(
                left.share
                    .iter()
                    .all(|run| run.rank == 7 && run.backend == 1)
            );
            assert!(probed.is_disjoint(&missing));
            probed.extend(missing);
        }
        assert_eq!(probed, all);
    }
}
