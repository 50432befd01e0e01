#![forbid(unsafe_code)]
//! How many pages to install at one fault. Pure.
//!
//! Blind fault-around on random access costs memory and gains nothing, so the answer is *one*
//! until faults are seen to walk: a fault on the page right behind (or right before) what an
//! earlier fault installed. Then the window grows fourfold with each such fault, up to its limit.
//!
//! Whether a page that was installed ahead is ever touched cannot be seen. What can be seen is
//! whether the walk went on: a fault just behind the window means that it was walked through
//! (*useful*); a walk that is forgotten without one leaves its last window *wasted*, which is
//! therefore an upper bound.

use crate::page::{PageIndex, PageRange};

/// Walks remembered per image; one vCPU rarely follows more.
const STREAMS: usize = 8;
/// Growth of the window from one fault of a walk to the next.
const GROWTH: u64 = 4;

/// Where a window extends to from the page that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// To higher pages.
    Forward,
    /// To lower pages.
    Backward,
}

/// How much to install.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Where to, from the page asked for.
    pub(crate) direction: Direction,
    /// Pages at most, the one asked for included.
    pub(crate) pages: u64,
    /// The walk that this window belongs to.
    pub(crate) stream: usize,
}

/// What became known about pages installed ahead earlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Walked through.
    pub(crate) useful: u64,
    /// Never reached, as far as is known.
    pub(crate) wasted: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    covered: PageRange,
    window: u64,
    ahead: u64,
    used: u64,
}

/// The walks of one image.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
}

impl Streams {
    /// A fault on `page`: how far to go, at most `limit` pages.
    pub(crate) fn on_fault(&mut self, page: PageIndex, limit: u64) -> (Window, Verdict) {
        self.clock += 1;
        for (number, stream) in self.streams.iter_mut().enumerate() {
            let forward = stream.covered.end() == page;
            let backward = page.plus(1) == stream.covered.start();
            if stream.covered.is_empty() || !(forward || backward) {
                continue;
            }
            stream.used = self.clock;
            stream.window = (stream.window * GROWTH).clamp(1, limit.max(1));
            let verdict = Verdict {
                useful: std::mem::take(&mut stream.ahead),
                wasted: 0,
            };
            let direction = if forward {
                Direction::Forward
            } else {
                Direction::Backward
            };
            let window = Window {
                direction,
                pages: stream.window,
                stream: number,
            };
            return (window, verdict);
        }
        self.begin()
    }

    /// Forgets the walk that was quiet for longest and begins another with a single page.
    fn begin(&mut self) -> (Window, Verdict) {
        let oldest = (0..STREAMS).min_by_key(|&number| self.streams[number].used);
        let number = oldest.unwrap_or(0);
        let verdict = Verdict {
            useful: 0,
            wasted: self.streams[number].ahead,
        };
        self.streams[number] = Stream {
            used: self.clock,
            window: 1,
            ..Stream::default()
        };
        let window = Window {
            direction: Direction::Forward,
            pages: 1,
            stream: number,
        };
        (window, verdict)
    }

    /// `pages` were chosen for a fault of walk `stream`: one asked for, the rest ahead.
    pub(crate) fn chosen(&mut self, stream: usize, pages: PageRange) {
        if let Some(stream) = self.streams.get_mut(stream) {
            stream.covered = pages;
            stream.ahead = pages.count().get().saturating_sub(1);
        }
    }

    /// `page` was asked for while it was on its way: it is ahead no more. Whether it was.
    pub(crate) fn late(&mut self, page: PageIndex) -> bool {
        let hit = self
            .streams
            .iter_mut()
            .find(|stream| stream.covered.contains(page) && stream.ahead > 0);
        if let Some(stream) = hit {
            stream.ahead -= 1;
            return true;
        }
        false
    }

    /// The end: what was ahead stays unconfirmed.
    pub(crate) fn finish(&mut self) -> Verdict {
        let wasted = self.streams.iter().map(|stream| stream.ahead).sum();
        *self = Self::default();
        Verdict { useful: 0, wasted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageCount;
    use proptest::prelude::*;

    /// Faults on every page of `order` that no earlier window brought; pages installed per fault.
    fn walk(order: &[u64], limit: u64) -> (Vec<u64>, Verdict) {
        let mut streams = Streams::default();
        let mut present = std::collections::HashSet::new();
        let (mut sizes, mut total) = (Vec::new(), Verdict::default());
        for &page in order {
            if present.contains(&page) {
                continue;
            }
            let page = PageIndex::new(page);
            let (window, verdict) = streams.on_fault(page, limit);
            total.useful += verdict.useful;
            total.wasted += verdict.wasted;
            let count = PageCount::new(window.pages);
            let run = match window.direction {
                Direction::Forward => PageRange::new(page, count),
                Direction::Backward => PageRange::between(
                    PageIndex::new(page.plus(1).get().saturating_sub(window.pages)),
                    page.plus(1),
                ),
            };
            streams.chosen(window.stream, run);
            present.extend(run.iter().map(PageIndex::get));
            sizes.push(run.count().get());
        }
        total.wasted += streams.finish().wasted;
        (sizes, total)
    }

    #[test]
    fn a_walk_forward_and_a_walk_backward_grow_to_the_limit() {
        let forward: Vec<u64> = (100..164).collect();
        let (sizes, verdict) = walk(&forward, 16);
        assert_eq!(sizes, [1, 4, 16, 16, 16, 16]);
        assert_eq!((verdict.useful, verdict.wasted), (3 + 15 * 3, 15));
        let backward: Vec<u64> = (100..164).rev().collect();
        assert_eq!(walk(&backward, 16).0, [1, 4, 16, 16, 16, 16]);
    }

    #[test]
    fn scattered_faults_install_one_page_each() {
        let scattered: Vec<u64> = (0..500).map(|page| page * 7919 % 100_003).collect();
        let (sizes, verdict) = walk(&scattered, 64);
        assert!(sizes.iter().all(|&size| size == 1));
        assert_eq!(verdict, Verdict::default());
    }

    #[test]
    fn two_walks_at_once_both_grow() {
        let both: Vec<u64> = (0..32).flat_map(|page| [page, 5000 + page]).collect();
        assert_eq!(walk(&both, 16).0.len(), 2 * 4);
    }

    proptest! {
        #[test]
        fn pages_ahead_are_accounted_for_once(
            order in prop::collection::vec(0u64..300, 0..300),
            limit in 1u64..64,
        ) {
            let (sizes, verdict) = walk(&order, limit);
            prop_assert!(sizes.iter().all(|&size| size <= limit));
            let ahead: u64 = sizes.iter().map(|size| size - 1).sum();
            prop_assert_eq!(verdict.useful + verdict.wasted, ahead);
        }
    }
}
