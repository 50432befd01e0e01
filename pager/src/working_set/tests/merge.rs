#![forbid(unsafe_code)]

use super::*;
use crate::page::PageRange;
use proptest::prelude::*;

/// Anything, beyond the images too.
fn any_trace() -> impl Strategy<Value = Trace> {
    let touch = (0..3_u32, 0..PAGES + 50, any::<bool>());
    prop::collection::vec(touch, 0..60).prop_map(|touches| trace(&touches))
}

/// Pages that count, of a small range so that runs overlap.
fn near_trace() -> impl Strategy<Value = Trace> {
    let touch = (0..2_u32, 0..60_u64, any::<bool>());
    prop::collection::vec(touch, 1..60).prop_map(|mut touches| {
        touches.push((0, 0, true));
        trace(&touches)
    })
}

fn is_sound(set: &WorkingSet, max_pages: usize) -> Result<(), TestCaseError> {
    prop_assert!(places(set).len() <= max_pages);
    prop_assert!(set.weight() <= 8 * HIT + 7);
    for backend in set.backends() {
        let pages = backend.pages();
        prop_assert!(pages.windows(2).all(|two| two[0].page < two[1].page));
        for known in pages {
            prop_assert!(known.written <= known.hits && known.hits <= set.weight());
            prop_assert!(u64::from(known.hits) * 16 >= u64::from(set.weight()));
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_set_stays_sound_and_bounded(
        traces in prop::collection::vec(any_trace(), 0..30),
        max_pages in 0..80_usize,
    ) {
        let index = two_backends();
        let rules = MergeRules { max_pages };
        let mut set = WorkingSet::new(7, &index);
        for trace in &traces {
            let merged = set.merge(trace, &index, &rules);
            is_sound(&set, max_pages)?;
            let counted = merged.known + merged.new + merged.ignored;
            prop_assert!(counted <= trace.touches.len() as u64);
        }
        for (backend, page) in places(&set) {
            let pages = [PAGES, PAGES / 10][backend];
            prop_assert!(page < pages);
        }
        prop_assert_eq!(WorkingSet::decode(&set.encode()).unwrap(), set);
    }

    /// Whatever the order of up to eight runs, the set of pages is that of all that count.
    #[test]
    fn few_runs_in_any_order_give_the_same_pages(
        runs in prop::collection::vec(near_trace(), 1..8).prop_flat_map(|runs| {
            (Just(runs.clone()), Just(runs).prop_shuffle())
        }),
    ) {
        let index = two_backends();
        let (one, other) = (learned(&index, &runs.0), learned(&index, &runs.1));
        prop_assert_eq!(places(&one), places(&other));
        prop_assert_eq!(one.weight(), other.weight());
        prop_assert_eq!(one.runs(), other.runs());
    }

    /// Two runs that change places change no page's hits by more than what decay takes of one run,
    /// but for a page on the brink: what it had may be forgotten in between.
    #[test]
    fn two_runs_that_change_places_change_little(
        before in prop::collection::vec(near_trace(), 0..12),
        one in near_trace(),
        two in near_trace(),
    ) {
        let index = two_backends();
        let after = |last: [&Trace; 2]| {
            let mut set = learned(&index, &before);
            for trace in last {
                set.merge(trace, &index, &MergeRules::default());
            }
            set
        };
        let (a, b) = (after([&one, &two]), after([&two, &one]));
        for known in a.backends()[0].pages() {
            let other = b.backends()[0].pages().iter().find(|other| other.page == known.page);
            let brink = a.weight() / 16;
            if let Some(other) = other {
                prop_assert!(known.hits.abs_diff(other.hits) <= HIT / 8 + brink + 2);
                prop_assert!(known.written.abs_diff(other.written) <= HIT / 8 + brink + 2);
            } else {
                prop_assert!(known.hits <= HIT / 8 + 2 * brink + 2);
            }
        }
    }

    /// The order within a run moves ranks and nothing else.
    #[test]
    fn a_run_is_a_set(
        before in prop::collection::vec(near_trace(), 0..5),
        run in near_trace().prop_flat_map(|run| {
            let shuffled = Just(run.touches.clone()).prop_shuffle();
            (Just(run), shuffled)
        }),
    ) {
        let index = two_backends();
        let hits = |last: &Trace| {
            let mut set = learned(&index, &before);
            set.merge(last, &index, &MergeRules::default());
            let pages: Vec<_> = set.backends()[0].pages().to_vec();
            pages.iter().map(|known| (known.page, known.hits)).collect::<Vec<_>>()
        };
        let (run, touches) = run;
        let shuffled = Trace { touches, ..run.clone() };
        // A page that is read and written in one run counts as written wherever it is read, which
        // a zero page is dropped for when the read comes first: leave those out.
        let plain = |trace: &Trace| Trace {
            touches: trace.touches.iter().filter(|touch| touch.page.get() % 4 != 3).copied().collect(),
            ..trace.clone()
        };
        prop_assert_eq!(hits(&plain(&run)), hits(&plain(&shuffled)));
    }

    #[test]
    fn what_no_run_touches_any_more_is_forgotten(
        before in prop::collection::vec(near_trace(), 1..20),
    ) {
        let index = two_backends();
        let mut set = learned(&index, &before);
        for _ in 0..21 {
            set.merge(&reads([1000]), &index, &MergeRules::default());
        }
        prop_assert_eq!(places(&set), [(0, 1000)]);
    }
}

#[test]
fn the_formula_is_the_documented_one() {
    let index = only_data(10);
    let set = learned(&index, &[trace(&[(0, 5, false), (0, 4, true)])]);
    let page = PageIndex::new(4);
    let first = KnownPage {
        page,
        hits: 65_536,
        written: 65_536,
        rank: 16,
    };
    assert_eq!(known(&set, 4), Some(first));
    let run = trace(&[(0, 0, false), (0, 1, false), (0, 2, false), (0, 4, false)]);
    let set = learned(&index, &[trace(&[(0, 5, false), (0, 4, true)]), run]);
    // 65536 - 65536 / 8 + 65536; written decays only; 16 + (16 * 3 - 16) / 4.
    let second = KnownPage {
        page,
        hits: 122_880,
        written: 57_344,
        rank: 24,
    };
    assert_eq!(known(&set, 4), Some(second));
    assert_eq!((set.weight(), set.runs()), (122_880, 2));
    assert_eq!(set.permille(second.hits), 1000);
    assert!(!set.is_mostly_written(&second) && set.is_mostly_touched(&second));
}

#[test]
fn forgetting_takes_as_many_runs_as_documented() {
    let index = only_data(10);
    let mut traces = vec![reads([1, 2]); 100];
    traces.extend(vec![reads([1]); 20]);
    assert!(known(&learned(&index, &traces), 2).is_some());
    traces.push(reads([1]));
    assert!(known(&learned(&index, &traces), 2).is_none());

    let mut traces = vec![reads([1]); 100];
    traces.push(reads([1, 2]));
    traces.extend(vec![reads([1]); 5]);
    assert!(known(&learned(&index, &traces), 2).is_some());
    traces.push(reads([1]));
    assert!(known(&learned(&index, &traces), 2).is_none());
}

#[test]
fn zero_pages_count_read_or_written() {
    let index = two_backends();
    let run = trace(&[(0, 3, false), (0, 7, true), (0, 0, false), (1, 3, true)]);
    let mut set = WorkingSet::new(7, &index);
    let merged = set.merge(&run, &index, &MergeRules::default());
    assert_eq!((merged.new, merged.zero_reads, merged.ignored), (4, 1, 0));
    assert_eq!(places(&set), [(0, 0), (0, 3), (0, 7), (1, 3)]);
}

#[test]
fn a_run_without_a_page_that_counts_is_no_run() {
    let index = two_backends();
    let mut set = learned(&index, &[reads([0, 1])]);
    let before = set.clone();
    for run in [reads([]), reads([PAGES]), trace(&[(9, 0, true)])] {
        let merged = set.merge(&run, &index, &MergeRules::default());
        assert_eq!(merged.ignored, run.touches.len() as u64);
    }
    assert_eq!(set, before);
}

#[test]
fn beyond_the_bound_the_rarest_and_latest_go() {
    let index = only_data(100);
    let mut set = learned(&index, &[reads([9, 8]), reads([9, 8])]);
    let rules = MergeRules { max_pages: 4 };
    let merged = set.merge(&reads([30, 20, 10]), &index, &rules);
    assert_eq!((merged.new, merged.over_bound), (3, 1));
    assert_eq!(places(&set), [(0, 8), (0, 9), (0, 20), (0, 30)]);
}

#[test]
fn a_cut_trace_is_counted_as_such() {
    let index = only_data(100);
    let mut run = reads([1]);
    run.is_complete = false;
    let set = learned(&index, &[reads([1]), run]);
    assert_eq!((set.runs(), set.cut_runs()), (2, 1));
}

fn seen(pages: std::ops::Range<u64>, sight: Sight) -> Seen {
    let pages = PageRange::between(PageIndex::new(pages.start), PageIndex::new(pages.end));
    Seen {
        image: 0,
        pages,
        sight,
    }
}

/// What was brought ahead raises no fault: it keeps its share, however many such runs there are.
#[test]
fn a_page_that_was_there_unasked_keeps_its_share() {
    let index = only_data(100);
    let mut first = reads([1, 2, 3]);
    first.touches[1].write = true;
    let mut set = learned(&index, &[first.clone(), first]);
    let run = Trace {
        seen: vec![seen(1..2, Sight::Unwritten), seen(2..3, Sight::Unknown)],
        ..reads([50])
    };
    for _ in 0..100 {
        let merged = set.merge(&run, &index, &MergeRules::default());
        assert_eq!(merged.unseen, 2);
    }
    let share = |page| known(&set, page).map(|known| set.permille(known.hits + 64));
    assert_eq!(
        (share(1), share(2), share(3)),
        (Some(1000), Some(1000), None)
    );
    let two = known(&set, 2).unwrap();
    assert!(set.is_mostly_written(&two), "nobody knows better");
    // Told that it was not written, it is shared before long.
    let run = Trace {
        seen: vec![seen(0..100, Sight::Unwritten)],
        ..reads([50])
    };
    for _ in 0..6 {
        set.merge(&run, &index, &MergeRules::default());
    }
    let two = known(&set, 2).unwrap();
    assert!(!set.is_mostly_written(&two) && set.is_mostly_touched(&two));
}

#[test]
fn a_page_that_was_written_unasked_is_touched_and_keeps_its_rank() {
    let index = two_backends();
    let mut set = learned(&index, &[reads([0, 1, 2])]);
    let run = Trace {
        // Page 3 has no data; page 2 was read first.
        seen: vec![
            seen(0..PAGES, Sight::Unwritten),
            seen(1..4, Sight::Written),
            seen(PAGES - 1..PAGES + 9, Sight::Written),
        ],
        ..reads([2])
    };
    let merged = set.merge(&run, &index, &MergeRules::default());
    assert_eq!((merged.known, merged.new, merged.unseen), (2, 2, 1));
    let at = |page| known(&set, page).map(|known| (known.written, known.rank));
    assert_eq!(at(1), Some((HIT, 16)));
    assert_eq!(at(2), Some((HIT, 32 - 8)), "it moved to its place");
    assert_eq!(at(3), Some((HIT, 16)), "behind the one that has a place");
    assert_eq!(at(PAGES - 1), Some((HIT, 16)));
    // Nothing but pages that nobody asked for or wrote: no run.
    let idle = Trace {
        seen: vec![seen(0..PAGES, Sight::Unwritten)],
        ..reads([])
    };
    let before = set.clone();
    set.merge(&idle, &index, &MergeRules::default());
    assert_eq!(set, before);
}
