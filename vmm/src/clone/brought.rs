#![forbid(unsafe_code)]
//! What was brought ahead of a clone, and what that was good for.

use std::collections::BTreeSet;

use pando_pager::PageIndex;
use pando_pager::working_set::{Plan, PlannedRun, Seen, Sight, Trace};

use super::sight::Unasked;
use crate::observe::metrics::Judged;

/// What was brought ahead of a clone that is recorded.
#[derive(Debug, Default)]
pub struct Brought {
    /// Pages that it had unasked.
    pub unasked: Vec<Unasked>,
    /// What was planned for it, before any page was held back.
    pub whole_plan: Plan,
    /// What was brought of that.
    pub plan: Plan,
}

impl Brought {
    /// A clone for which all of `plan` was brought but what `probes` chooses is held back.
    pub fn with_probes(whole_plan: Plan, probes: u64) -> Self {
        let (plan, _) = whole_plan.with_probes(probes);
        let read_or_written = plan.private.iter().chain(&plan.share);
        let unasked = read_or_written
            .chain(&plan.whole)
            .chain(&plan.zero)
            .map(|run| Unasked {
                backend: run.backend,
                pages: run.pages,
            })
            .collect();
        Self {
            unasked,
            whole_plan,
            plan,
        }
    }

    /// A clone for which all of `plan` was brought, and that nobody records.
    pub fn all(plan: Plan) -> Self {
        Self {
            plan,
            ..Self::default()
        }
    }

    /// What `trace` says of it.
    pub(super) fn judge(&self, trace: &Trace) -> Judged {
        let pages = |lists: [&Vec<_>; 2]| -> BTreeSet<(u32, PageIndex)> {
            let runs = lists.into_iter().flatten();
            runs.flat_map(|run: &PlannedRun| run.pages.iter().map(|page| (run.backend, page)))
                .collect()
        };
        let none = Vec::new();
        let brought = pages([&self.plan.private, &self.plan.share]);
        let to_write = pages([&self.plan.private, &none]);
        let held_back: BTreeSet<_> = pages([&self.whole_plan.private, &self.whole_plan.share])
            .difference(&brought)
            .copied()
            .collect();
        let is_written = |seen: &&Seen| seen.sight == Sight::Written;
        let written: BTreeSet<_> = trace
            .seen
            .iter()
            .filter(is_written)
            .flat_map(|seen| seen.pages.iter().map(|page| (seen.image, page)))
            .collect();
        let touched: BTreeSet<_> = trace
            .touches
            .iter()
            .map(|touch| (touch.image, touch.page))
            .chain(written.iter().copied())
            .collect();
        let probes_touched = held_back.intersection(&touched).count() as u64;
        Judged {
            useful: brought.intersection(&written).count() as u64,
            wasted: to_write.difference(&written).count() as u64,
            probes_touched,
            probes_untouched: held_back.len() as u64 - probes_touched,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_pager::{PageCount, PageRange};

    #[test]
    fn what_was_brought_is_judged_by_what_was_written() {
        let run = |start, count| PlannedRun {
            backend: 0,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
            rank: 0,
        };
        let plan = Plan {
            private: vec![run(0, 640)],
            share: vec![run(1000, 640)],
            ..Plan::default()
        };
        let brought = Brought::with_probes(plan, 5);
        let all = |lists: [&[_]; 2]| lists.map(Plan::pages_of).iter().sum::<u64>();
        let held_back = 1280 - all([&brought.plan.private, &brought.plan.share]);
        let mut trace = Trace {
            seen: vec![Seen {
                image: 0,
                pages: PageRange::new(PageIndex::new(0), PageCount::new(1100)),
                sight: Sight::Written,
            }],
            ..Trace::default()
        };
        let judgement = brought.judge(&trace);
        let written = Plan::pages_of(&brought.plan.private)
            + (1000..1100)
                .filter(|&page| {
                    let runs = brought.plan.share.iter();
                    runs.into_iter()
                        .any(|run| run.pages.contains(PageIndex::new(page)))
                })
                .count() as u64;
        assert_eq!((judgement.useful, judgement.wasted), (written, 0));
        assert_eq!(
            judgement.probes_touched + judgement.probes_untouched,
            held_back
        );
        assert!(judgement.probes_touched > 0 && judgement.probes_untouched > 0);
        trace.seen.clear();
        let judgement = brought.judge(&trace);
        let wasted = Plan::pages_of(&brought.plan.private);
        assert_eq!((judgement.useful, judgement.wasted), (0, wasted));
    }
}
