#![forbid(unsafe_code)]

use std::os::unix::fs::FileExt;
use std::time::Duration;

use pando_pager::image::BackendIndex;
use pando_pager::working_set::{MergeRules, Touch, Trace};

use super::*;

/// 32 pages of data, 32 of holes.
fn index() -> Index {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 4096).unwrap();
    file.write_all_at(&[7; 32 * 4096], 0).unwrap();
    let backend = BackendIndex::scan(&file, 64 * 4096, &mut |_, _| ()).unwrap();
    Index::new(vec![("ram0".to_owned(), backend)])
}

/// Reads pages 20 to 23 and 8, then writes 9 and 40.
fn set(index: &Index) -> WorkingSet {
    let pages = [20, 21, 22, 23, 8, 9, 40];
    let touches = pages.into_iter().zip(0..).map(|(page, at)| Touch {
        image: 0,
        page: PageIndex::new(page),
        write: matches!(page, 9 | 40),
        at: Duration::from_micros(at),
    });
    let trace = Trace {
        client: 0,
        touches: touches.collect(),
        is_complete: true,
        ..Trace::default()
    };
    let mut set = WorkingSet::new(7, index);
    set.merge(&trace, index, &MergeRules::default());
    set
}

#[test]
fn the_facts_count_what_there_is() {
    let index = index();
    let facts = Facts::of(&set(&index), &index);
    assert_eq!((facts.runs, facts.cut_runs), (1, 0));
    assert_eq!((facts.pages, facts.bytes), (7, 7 * 4096));
    assert_eq!(
        (facts.steady_pages, facts.written_pages, facts.zero_pages),
        (7, 2, 1)
    );
    assert_eq!((facts.plan.shared_pages, facts.plan.private_pages), (5, 2));
    let runs: Vec<_> = facts
        .touched
        .iter()
        .map(|run| (run.first_page, run.pages, run.place, run.is_written))
        .collect();
    assert_eq!(
        runs,
        [
            (20, 4, 0, false),
            (8, 1, 4, false),
            (9, 1, 5, true),
            (40, 1, 6, true)
        ]
    );
}

#[test]
fn the_document_says_which_state_it_is() {
    let index = index();
    let json = |found: &Found| serde_json::to_value(WorkingSetSummary::of(found, &index)).unwrap();
    assert_eq!(json(&Found::Absent)["state"], "absent");
    let ignored = json(&Found::Ignored {
        reason: "why".to_owned(),
    });
    assert_eq!(
        (&ignored["state"], &ignored["reason"]),
        (&"ignored".into(), &"why".into())
    );
    let known = json(&Found::Known(set(&index)));
    assert_eq!(
        (&known["state"], &known["pages"]),
        (&"known".into(), &7.into())
    );
}

#[test]
fn the_maps_show_where_and_when() {
    let index = index();
    let set = set(&index);
    let map = TouchMap::new(&set, &set.backends()[0], 64, 8, 2);
    assert_eq!(map.cell_bytes(), 4 * 4096);
    let lines = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .map(|line| line.split("MiB  ").nth(1).unwrap_or(""));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(lines(&map.where_text()), ["··w··█··", "··w·····"]);
    assert_eq!(lines(&map.when_text()), ["··5··0··", "··8·····"]);
    let [places, order] = map.panels("ram0");
    assert_eq!((places.colours.len(), order.colours.len()), (16, 16));
    assert_eq!(places.title, "ram0: what clones touch");
    let tiny = TouchMap::new(&set, &set.backends()[0], 0, 0, 0);
    assert_eq!(tiny.where_text(), "");
}
