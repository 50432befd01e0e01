#![forbid(unsafe_code)]
//! One run, page by page: what its trace says of each page.

use std::collections::BTreeMap;

use super::merge::{MAX_TOUCHES, Merged};
use super::set::WorkingSet;
use super::types::{Sight, Trace};
use crate::image::{Index, PageKind};
use crate::page::{PageIndex, PageRange};

/// What a run says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// It was touched, as the page at this place in the order.
    Touched { place: u32, write: bool },
    /// It was written; when first touched is not known.
    Written,
    /// It was there before anybody could ask for it and was not written.
    Unwritten,
    /// It was there before anybody could ask for it.
    Unknown,
    /// It was not touched.
    Absent,
}

/// One backend in one run.
#[derive(Clone, Debug, Default)]
pub(super) struct RunOf {
    /// Pages that were touched or written.
    touched: BTreeMap<PageIndex, Told>,
    /// Pages that were there unasked, by their first page.
    unasked: Vec<(PageRange, Told)>,
}

impl RunOf {
    /// Takes what the run says of `page` out of it.
    pub(super) fn take(&mut self, page: PageIndex) -> Told {
        if let Some(told) = self.touched.remove(&page) {
            return told;
        }
        let next = self
            .unasked
            .partition_point(|(pages, _)| pages.start() <= page);
        match next.checked_sub(1).and_then(|at| self.unasked.get(at)) {
            Some((pages, told)) if pages.contains(page) => *told,
            _ => Told::Absent,
        }
    }

    /// The pages that were touched and not taken.
    pub(super) fn rest(self) -> impl ExactSizeIterator<Item = (PageIndex, Told)> {
        self.touched.into_iter()
    }

    /// Whether no page was touched.
    pub(super) fn is_empty(&self) -> bool {
        self.touched.is_empty()
    }
}

/// A run by backend, and how many places its order has.
pub(super) struct Run {
    pub(super) backends: Vec<RunOf>,
    pub(super) places: u32,
}

impl Run {
    /// What `trace` says of the pages of `set`, whose template has this `index`.
    pub(super) fn of(set: &WorkingSet, trace: &Trace, index: &Index, merged: &mut Merged) -> Self {
        let mut run = Self {
            backends: vec![RunOf::default(); set.backends.len()],
            places: 0,
        };
        run.see(set, trace, index);
        merged.ignored = trace.touches.len().saturating_sub(MAX_TOUCHES) as u64;
        for touch in trace.touches.iter().take(MAX_TOUCHES) {
            let backend = usize::try_from(touch.image).unwrap_or(usize::MAX);
            let (Some(own), Some((_, kinds))) =
                (run.backends.get_mut(backend), index.backends().get(backend))
            else {
                merged.ignored += 1;
                continue;
            };
            let pages = set.backends[backend].image_pages.min(kinds.pages());
            if touch.page.get() >= pages.get() {
                merged.ignored += 1;
                continue;
            }
            let told = own.touched.get_mut(&touch.page);
            let write = match told {
                Some(Told::Touched { write, .. }) => {
                    *write |= touch.write;
                    continue;
                }
                Some(_) => true,
                None => touch.write,
            };
            let has_data = kinds.kind(touch.page) == PageKind::Data;
            // Reading one needs no I/O, and yet a fault where it is not mapped ahead.
            merged.zero_reads += u64::from(!has_data && !write);
            let place = run.places;
            own.touched
                .insert(touch.page, Told::Touched { place, write });
            run.places += 1;
        }
        run
    }

    /// Takes in what the memory showed at the end.
    fn see(&mut self, set: &WorkingSet, trace: &Trace, index: &Index) {
        let mut room = MAX_TOUCHES;
        for seen in &trace.seen {
            let backend = usize::try_from(seen.image).unwrap_or(usize::MAX);
            let (Some(own), Some((_, kinds))) = (
                self.backends.get_mut(backend),
                index.backends().get(backend),
            ) else {
                continue;
            };
            let told = match seen.sight {
                Sight::Written => Told::Written,
                Sight::Unwritten => Told::Unwritten,
                Sight::Unknown => Told::Unknown,
            };
            if told != Told::Written {
                own.unasked.push((seen.pages, told));
                continue;
            }
            let pages = set.backends[backend].image_pages.min(kinds.pages());
            let inside = seen.pages.iter().take(room);
            for page in inside.take_while(|page| page.get() < pages.get()) {
                own.touched.insert(page, told);
                room -= 1;
            }
        }
        for own in &mut self.backends {
            own.unasked.sort_by_key(|(pages, _)| pages.start());
        }
    }
}
