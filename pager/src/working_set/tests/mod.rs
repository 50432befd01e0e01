#![forbid(unsafe_code)]

mod format;
mod merge;
mod plan;

use std::time::Duration;

use super::*;
use crate::image::{Index, PageKind, index_of};
use crate::page::PageIndex;

/// Pages of the first image that the properties are tried on; the second has a tenth.
const PAGES: u64 = 2000;

/// Every fourth page of both images is zero or a hole, the others have data.
fn two_backends() -> Index {
    let kinds = |pages: u64| {
        let kind = |page| match page % 8 {
            3 => PageKind::Zero,
            7 => PageKind::Hole,
            _ => PageKind::Data,
        };
        index_of(&(0..pages).map(kind).collect::<Vec<_>>())
    };
    Index::new(vec![
        ("ram0".to_owned(), kinds(PAGES)),
        ("ram1".to_owned(), kinds(PAGES / 10)),
    ])
}

fn only_data(pages: usize) -> Index {
    Index::new(vec![(
        "ram0".to_owned(),
        index_of(&vec![PageKind::Data; pages]),
    )])
}

/// A complete trace of (image, page, write).
fn trace(touches: &[(u32, u64, bool)]) -> Trace {
    let touches = touches.iter().zip(0..);
    Trace {
        client: 1,
        touches: touches
            .map(|(&(image, page, write), at)| Touch {
                image,
                page: PageIndex::new(page),
                write,
                at: Duration::from_micros(at),
            })
            .collect(),
        seen: Vec::new(),
        is_complete: true,
    }
}

/// A trace that reads these pages of the first image.
fn reads(pages: impl IntoIterator<Item = u64>) -> Trace {
    let touches: Vec<_> = pages.into_iter().map(|page| (0, page, false)).collect();
    trace(&touches)
}

fn learned(index: &Index, traces: &[Trace]) -> WorkingSet {
    let mut set = WorkingSet::new(7, index);
    for trace in traces {
        set.merge(trace, index, &MergeRules::default());
    }
    set
}

fn known(set: &WorkingSet, page: u64) -> Option<KnownPage> {
    let mut pages = set.backends()[0].pages().iter();
    pages.find(|known| known.page.get() == page).copied()
}

/// The pages of all backends.
fn places(set: &WorkingSet) -> Vec<(usize, u64)> {
    let backends = set.backends().iter().enumerate();
    backends
        .flat_map(|(number, backend)| {
            let pages = backend.pages().iter();
            pages.map(move |known| (number, known.page.get()))
        })
        .collect()
}
