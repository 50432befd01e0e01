#![forbid(unsafe_code)]
//! The part of a plan that lies in some pages: of a fork, the holes of its root. Pure.

use super::plan::{Plan, PlannedRun};
use crate::page::PageRange;

impl Plan {
    /// The parts of its runs that lie in `ranges`, one list for each backend, each in ascending
    /// order, and the parts that do not. Pages that it left out stay uncounted.
    #[must_use]
    pub fn split(&self, ranges: &[Vec<PageRange>]) -> (Self, Self) {
        let (mut inside, mut outside) = (Self::default(), Self::default());
        for (from, to, rest) in [
            (&self.whole, &mut inside.whole, &mut outside.whole),
            (&self.share, &mut inside.share, &mut outside.share),
            (&self.private, &mut inside.private, &mut outside.private),
            (&self.zero, &mut inside.zero, &mut outside.zero),
        ] {
            for run in from {
                let own = usize::try_from(run.backend).ok();
                let own = own.and_then(|backend| ranges.get(backend));
                cut(run, own.map_or(&[], Vec::as_slice), to, rest);
            }
        }
        (inside, outside)
    }
}

/// Puts the parts of `run` in `ranges` to `inside`, the others to `outside`.
fn cut(
    run: &PlannedRun,
    ranges: &[PageRange],
    inside: &mut Vec<PlannedRun>,
    outside: &mut Vec<PlannedRun>,
) {
    let put = |list: &mut Vec<PlannedRun>, from, to| {
        let pages = PageRange::between(from, to);
        if !pages.is_empty() {
            list.push(PlannedRun { pages, ..*run });
        }
    };
    let mut at = run.pages.start();
    let first = ranges.partition_point(|range| range.end() <= at);
    for range in &ranges[first..] {
        if range.start() >= run.pages.end() {
            break;
        }
        let (start, end) = (range.start().max(at), range.end().min(run.pages.end()));
        put(outside, at, start);
        put(inside, start, end);
        at = end;
    }
    put(outside, at, run.pages.end());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageIndex;

    #[test]
    fn every_page_is_inside_or_outside() {
        let pages = |start, end| PageRange::between(PageIndex::new(start), PageIndex::new(end));
        let run = |backend, start, end| PlannedRun {
            backend,
            pages: pages(start, end),
            rank: 3,
        };
        let plan = Plan {
            share: vec![run(0, 0, 100), run(0, 200, 201), run(1, 0, 5), run(7, 1, 2)],
            zero: vec![run(0, 15, 25)],
            ..Plan::default()
        };
        let holes = [vec![pages(10, 20), pages(20, 30), pages(90, 300)], vec![]];
        let (inside, outside) = plan.split(&holes);
        let shared = [
            run(0, 10, 20),
            run(0, 20, 30),
            run(0, 90, 100),
            run(0, 200, 201),
        ];
        assert_eq!(inside.share, shared);
        let rest = [run(0, 0, 10), run(0, 30, 90), run(1, 0, 5), run(7, 1, 2)];
        assert_eq!(outside.share, rest);
        assert_eq!(inside.zero, [run(0, 15, 20), run(0, 20, 25)]);
        assert_eq!(outside.zero, []);
    }
}
