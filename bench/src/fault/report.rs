#![forbid(unsafe_code)]
//! The figures of a run as tables, and how they stand to the targets.

use super::{Faults, Figures, Group};
use crate::host::Host;
use crate::report::{Report, TextTable, ratio, size, time};
use crate::targets::Target;

pub(crate) const SAME_CPU: &str = "copy, same CPU";
pub(crate) const MEMCPY: &str = "memcpy, 64 KiB a call";
pub(crate) const COPY: &str = "UFFDIO_COPY, 64 KiB a call";
pub(crate) const ZEROPAGE: &str = "UFFDIO_ZEROPAGE, 256 KiB a call";

pub(super) fn report(host: Host, faults: Faults) -> Report<Faults> {
    let mut tables: Vec<TextTable> = faults.groups.iter().map(group).collect();
    tables.push(bulk(&faults));
    tables.push(Target::table(&faults.targets));
    let mut report = Report::new("fault", host, faults);
    report.marks = vec![
        format!(
            "image: {} in the page cache, data in its lower half, a hole in the upper",
            size(report.results.memory_bytes as f64)
        ),
        "a touch: one byte of a page read or written by a thread of this process; the clock is \
         read once between two touches"
            .to_owned(),
        "a page: clock starts before the first touch and stops after the last of all threads; \
         that time by the pages touched; the p50 is of rounds"
            .to_owned(),
        "not on the clock: making the memory, the pager and the threads; stopping them".to_owned(),
        "faults a second: as the pager counts them; fewer than pages where it installs ahead"
            .to_owned(),
    ];
    report.tables = tables;
    report
}

/// One table for what is compared.
pub(crate) fn group(group: &Group) -> TextTable {
    let vs = group
        .ways
        .first()
        .map_or_else(String::new, |first| format!("vs {}", first.page.name));
    let mut table = TextTable::new(
        &group.title,
        &[
            "",
            "a page p50",
            "min",
            "max",
            &vs,
            "touch p50",
            "p90",
            "p99",
            "max",
            "CPU a page",
            "pages/s",
            "faults/s",
        ],
    );
    for figures in &group.ways {
        let (page, touch) = (&figures.page.summary, &figures.touch);
        table.row(vec![
            figures.page.name.clone(),
            time(page.p50_ns),
            time(page.min_ns),
            time(page.max_ns),
            ratio(figures.page.ratio.p50),
            time(touch.p50_ns),
            time(touch.p90_ns),
            time(touch.p99_ns),
            time(touch.max_ns),
            time(figures.processor_ns),
            rate(figures.pages_per_second),
            if figures.pager["faults"] == 0 {
                "-".to_owned()
            } else {
                rate(figures.faults_per_second)
            },
        ]);
    }
    table
}

/// A rate with its unit.
pub(crate) fn rate(per_second: f64) -> String {
    if per_second >= 1e6 {
        format!("{:.2} M", per_second / 1e6)
    } else {
        format!("{:.1} k", per_second / 1e3)
    }
}

fn bulk(faults: &Faults) -> TextTable {
    let heads = ["", "a page p50", "min", "max", "pages/s"];
    let mut table = TextTable::new("memory filled in bulk", &heads);
    for measured in &faults.bulk {
        let summary = &measured.summary;
        table.row(vec![
            measured.name.clone(),
            time(summary.p50_ns),
            time(summary.min_ns),
            time(summary.max_ns),
            rate(1e9 / summary.p50_ns.max(1) as f64),
        ]);
    }
    table
}

pub(super) fn targets(faults: &Faults) -> Vec<Target> {
    let mut targets = Vec::new();
    if let Some(zero) = find(faults, "zero pages, in sequence", SAME_CPU) {
        let us = zero.page.summary.p50_ns as f64 / 1e3;
        let what = "zero pages read in sequence, a page";
        targets.push(Target::at_most(what, us, 0.3, "µs"));
        let read = zero.pager["bytes_read"] as f64;
        let what = "zero pages read, bytes read for them";
        targets.push(Target::at_most(what, read, 0.0, "bytes"));
    }
    targets
}

fn find<'a>(faults: &'a Faults, title: &str, name: &str) -> Option<&'a Figures> {
    let group = faults.groups.iter().find(|group| group.title == title)?;
    group.ways.iter().find(|figures| figures.page.name == name)
}
