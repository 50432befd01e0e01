#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use super::*;
use crate::page::{PageCount, PageRange};
use proptest::prelude::*;

const RULES: PlanRules = PlanRules {
    share_pages: u64::MAX,
    private_pages: u64::MAX,
    zero_pages: u64::MAX,
    whole_ranges: true,
};

/// All pages of a list; fails if one is there twice.
fn pages(list: &[PlannedRun]) -> BTreeSet<(u32, u64)> {
    let all: Vec<_> = list
        .iter()
        .flat_map(|run| run.pages.iter().map(|page| (run.backend, page.get())))
        .collect();
    let set: BTreeSet<_> = all.iter().copied().collect();
    assert_eq!(set.len(), all.len());
    set
}

fn numbers(list: &[PlannedRun]) -> Vec<(u64, u64)> {
    let range = |pages: PageRange| (pages.start().get(), pages.end().get());
    list.iter().map(|run| range(run.pages)).collect()
}

fn run() -> impl Strategy<Value = Trace> {
    let walk = (0..2_u32, 0..PAGES, 1..400_u64, any::<bool>());
    prop::collection::vec(walk, 1..8).prop_map(|walks| {
        let touches: Vec<_> = walks
            .into_iter()
            .flat_map(|(image, start, count, write)| {
                (start..start + count).map(move |page| (image, page, write))
            })
            .collect();
        trace(&touches)
    })
}

proptest! {
    #[test]
    fn a_plan_keeps_its_promises(
        runs in prop::collection::vec(run(), 0..6),
        share_pages in prop_oneof![Just(u64::MAX), 0..1500_u64],
        private_pages in prop_oneof![Just(u64::MAX), 0..800_u64],
        zero_pages in prop_oneof![Just(u64::MAX), 0..300_u64],
        whole_ranges: bool,
    ) {
        let index = two_backends();
        let mut set = WorkingSet::new(7, &index);
        for run in &runs {
            set.merge(run, &index, &MergeRules::default());
        }
        let rules = PlanRules { share_pages, private_pages, zero_pages, whole_ranges };
        let plan = Plan::new(&set, &index, &rules);
        let (whole, share, private) = (pages(&plan.whole), pages(&plan.share), pages(&plan.private));
        // Never outside an image.
        for &(backend, page) in whole.iter().chain(&share).chain(&private) {
            let (_, image) = &index.backends()[backend as usize];
            prop_assert!(page < image.pages().get());
        }
        // No page in two lists.
        prop_assert!(whole.is_disjoint(&share));
        prop_assert!(whole.is_disjoint(&private));
        prop_assert!(share.is_disjoint(&private));
        let zero = pages(&plan.zero);
        for list in [&whole, &share, &private] {
            prop_assert!(zero.is_disjoint(list));
        }
        // Zero pages, near known ones.
        for &(backend, page) in &zero {
            let (_, image) = &index.backends()[backend as usize];
            prop_assert!(page < image.pages().get());
            prop_assert_ne!(image.kind(PageIndex::new(page)), PageKind::Data);
            let known = set.backends()[backend as usize].pages().iter();
            prop_assert!(known.map(|known| known.page.get() / 64).any(|block| block == page / 64));
        }
        prop_assert!(zero.len() as u64 <= zero_pages);
        // Within the budgets.
        prop_assert!(Plan::pages_of(&plan.whole) + Plan::pages_of(&plan.share) <= share_pages);
        prop_assert!(Plan::pages_of(&plan.private) <= private_pages);
        // In order of rank.
        for list in [&plan.whole, &plan.share, &plan.private, &plan.zero] {
            prop_assert!(list.windows(2).all(|two| two[0].rank <= two[1].rank));
        }
        // Nothing that clones do not touch but to make a range whole, nothing lost without a word.
        let touched: BTreeSet<(u32, u64)> = places(&set)
            .into_iter()
            .map(|(backend, page)| (u32::try_from(backend).unwrap(), page))
            .collect();
        prop_assert!(share.is_subset(&touched) && private.is_subset(&touched));
        for range in &plan.whole {
            prop_assert!(whole_ranges);
            prop_assert_eq!(range.pages.start().get() % HUGE_RANGE_PAGES, 0);
            prop_assert_eq!(range.pages.count(), PageCount::new(HUGE_RANGE_PAGES));
            let wanted = touched.iter().filter(|(backend, page)| {
                *backend == range.backend && range.pages.contains(PageIndex::new(*page))
            });
            prop_assert!(wanted.count() >= 128);
        }
        let planned = touched.iter().filter(|place| {
            whole.contains(place) || share.contains(place) || private.contains(place)
        });
        let skipped_zeros = set.backends().iter().zip(index.backends()).zip(0..).flat_map(
            |((backend, (_, image)), number)| {
                let (whole, set) = (&whole, &set);
                backend.pages().iter().filter(move |known| {
                    let zero = image.kind(known.page) != PageKind::Data;
                    let seen = whole.contains(&(number, known.page.get()));
                    zero && !set.is_mostly_written(known) && !seen
                })
            },
        );
        let expected = touched.len() as u64 - plan.left_out - skipped_zeros.count() as u64;
        prop_assert_eq!(planned.count() as u64, expected);
    }
}

#[test]
fn what_is_written_in_half_of_the_runs_is_private() {
    let index = only_data(100);
    let (read, write) = (
        trace(&[(0, 1, false)]),
        trace(&[(0, 1, true), (0, 2, false)]),
    );
    let plan = |runs: &[Trace]| Plan::new(&learned(&index, runs), &index, &RULES);
    let both = plan(&[read.clone(), write.clone()]);
    assert_eq!(
        numbers(&both.private),
        [(1, 2)],
        "the later run counts more"
    );
    assert_eq!(numbers(&both.share), [(2, 3)]);
    let once = plan(&[write, read]);
    assert_eq!(numbers(&once.private), []);
    assert_eq!(numbers(&once.share), [(1, 3)]);
}

#[test]
fn a_range_is_filled_whole_from_a_quarter_on_unless_clones_write_in_it() {
    let index = only_data(1024 + 200);
    let plan = |run: &Trace| Plan::new(&learned(&index, std::slice::from_ref(run)), &index, &RULES);
    assert_eq!(numbers(&plan(&reads(600..728)).whole), [(512, 1024)]);
    assert_eq!(numbers(&plan(&reads(600..728)).share), []);
    assert_eq!(numbers(&plan(&reads(600..727)).whole), []);
    assert_eq!(numbers(&plan(&reads(600..727)).share), [(600, 727)]);
    let partial = plan(&reads(1024..1224));
    assert_eq!(numbers(&partial.whole), [], "behind it the image ends");
    let mut written = reads(600..900);
    written.touches[7].write = true;
    let written = plan(&written);
    assert_eq!(numbers(&written.whole), []);
    assert_eq!(numbers(&written.private), [(607, 608)]);
    assert_eq!(numbers(&written.share), [(600, 607), (608, 900)]);
}

#[test]
fn a_range_that_would_break_the_budget_stays_in_pieces() {
    let index = only_data(2048);
    let run = reads((1024..1184).chain(0..160));
    let set = learned(&index, &[run]);
    let plan = |share_pages| {
        let rules = PlanRules {
            share_pages,
            ..RULES
        };
        Plan::new(&set, &index, &rules)
    };
    // 320 pages are wanted; each range takes 352 more.
    let both = plan(1024);
    assert_eq!(numbers(&both.whole), [(1024, 1536), (0, 512)], "by rank");
    let one = plan(320 + 352);
    assert_eq!(numbers(&one.whole), [(1024, 1536)]);
    assert_eq!(numbers(&one.share), [(0, 160)]);
    let none = plan(320);
    assert_eq!(numbers(&none.share), [(1024, 1184), (0, 160)]);
    let short = plan(100);
    assert_eq!(numbers(&short.share), [(1024, 1124)]);
    assert_eq!(short.left_out, 220);
}

#[test]
fn what_has_no_room_to_be_private_is_shared_if_it_has_data() {
    let index = two_backends();
    let run = trace(&[(0, 0, true), (0, 1, true), (0, 3, true), (0, 5, false)]);
    let rules = PlanRules {
        private_pages: 1,
        ..RULES
    };
    let plan = Plan::new(&learned(&index, &[run]), &index, &rules);
    assert_eq!(numbers(&plan.private), [(0, 1)]);
    assert_eq!(numbers(&plan.share), [(1, 2), (5, 6)]);
    assert_eq!(plan.left_out, 1, "a page of zeros");
}

#[test]
fn pages_of_many_runs_come_before_those_of_few() {
    let index = only_data(100);
    let set = learned(&index, &[reads([50, 51]), reads([1, 50]), reads([51, 50])]);
    let rules = PlanRules {
        share_pages: 2,
        ..RULES
    };
    let plan = Plan::new(&set, &index, &rules);
    assert_eq!(pages(&plan.share), BTreeSet::from([(0, 50), (0, 51)]));
}

#[test]
fn zero_pages_near_known_ones_are_mapped_in_the_order_of_their_blocks() {
    let index = two_backends();
    let set = learned(&index, &[reads([130, 0, 64 * 20 + 5])]);
    let plan = |zero_pages| {
        let rules = PlanRules {
            zero_pages,
            ..RULES
        };
        Plan::new(&set, &index, &rules)
    };
    // Two pages of eight have no data.
    let all = plan(u64::MAX);
    assert_eq!(Plan::pages_of(&all.zero), 3 * 16);
    assert_eq!(numbers(&all.zero)[..2], [(131, 132), (135, 136)]);
    assert_eq!(numbers(&all.zero)[16..18], [(3, 4), (7, 8)]);
    assert_eq!(numbers(&plan(17).zero)[15..], [(191, 192), (3, 4)]);
    assert_eq!(plan(0).zero, []);
}
