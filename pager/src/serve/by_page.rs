#![forbid(unsafe_code)]
//! Which regions of a client have which pages of an image.

use super::served::Served;
use crate::page::{PageIndex, PageRange};

/// Numbers of a client's regions by image and page. No page of an image is in two of them, so that
/// finding some takes no look at the others: a peer may have thousands, and ask for thousands.
#[derive(Debug)]
pub(super) struct ByPage(Vec<u32>);

impl ByPage {
    pub(super) fn new(regions: &[Served]) -> Self {
        let mut keyed: Vec<_> = (0..).zip(regions).map(|(at, of)| (first(of), at)).collect();
        keyed.sort_unstable();
        Self(keyed.into_iter().map(|(_, number)| number).collect())
    }

    /// The parts of an image's `pages` that lie in `regions`, with their numbers.
    pub(super) fn parts(
        &self,
        regions: &[Served],
        image: usize,
        pages: PageRange,
    ) -> Vec<(u32, PageRange)> {
        let numbered = |number: u32| Some((number, regions.get(number as usize)?));
        let ends_before = |&number: &u32| {
            numbered(number).is_some_and(|(_, served)| {
                (served.image.number(), served.region.pages().end()) <= (image, pages.start())
            })
        };
        let from = self.0.partition_point(ends_before);
        let rest = self.0.iter().skip(from);
        let rest = rest.filter_map(|&number| numbered(number));
        let reached = rest.take_while(|(_, served)| first(served) < (image, pages.end()));
        let parts = reached.map(|(number, served)| {
            let own = served.region.pages();
            let start = pages.start().max(own.start());
            let end = pages.end().min(own.end());
            (number, PageRange::between(start, end))
        });
        parts.filter(|(_, part)| !part.is_empty()).collect()
    }
}

fn first(served: &Served) -> (usize, PageIndex) {
    (served.image.number(), served.region.pages().start())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::page::PageCount;
    use crate::region::Region;
    use crate::serve::served::empty_image;
    use proptest::prelude::*;

    const IMAGE_PAGES: u64 = 64;

    fn pages(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex::new(start), PageCount::new(count))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever lies where: the same as looking at each region.
        #[test]
        fn parts_are_found_in_all_regions(
            cuts in prop::collection::btree_set(0..IMAGE_PAGES, 2..20),
            places in Just((0_u64..20).collect::<Vec<_>>()).prop_shuffle(),
            asked in (0..IMAGE_PAGES, 0..IMAGE_PAGES),
        ) {
            let image = empty_image(IMAGE_PAGES);
            let cuts: Vec<u64> = cuts.into_iter().collect();
            // Every second run is not in any region.
            let runs = cuts.windows(2).step_by(2).map(|two| pages(two[0], two[1] - two[0]));
            let regions = runs.zip(&places).map(|(run, place)| {
                Served::new(Arc::clone(&image), Region::other((place + 1) << 20, run))
            });
            let regions: Vec<Served> = regions.collect();
            let by_page = ByPage::new(&regions);
            let asked = pages(asked.0, asked.1);
            let mut expected = Vec::new();
            for (number, served) in (0..).zip(&regions) {
                let own = served.region.pages();
                let page = |page: &PageIndex| own.contains(*page);
                expected.extend(asked.iter().filter(page).map(|page| (number, page.get())));
            }
            let parts = by_page.parts(&regions, image.number(), asked);
            let mut found: Vec<(u32, u64)> = parts
                .iter()
                .flat_map(|(number, part)| part.iter().map(|page| (*number, page.get())))
                .collect();
            found.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
            prop_assert!(by_page.parts(&regions, image.number() + 1, asked).is_empty());
        }
    }
}
