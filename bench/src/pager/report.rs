#![forbid(unsafe_code)]
//! The figures of a run as tables, and how they stand to the targets.

use super::shared::Place;
use super::{Figures, Pagers, Served};
use crate::fault::report::{group, rate};
use crate::host::Host;
use crate::report::{Report, TextTable, ratio, size, time};
use crate::stats::Measured;
use crate::targets::Target;

pub(super) const COPY: &str = "UFFDIO_COPY, 64 KiB a call, beside it";
pub(super) const AHEAD: &str = "installed ahead, one run, verified";
/// Clients that the promise of one pager under many is made for.
const MANY: u32 = 100;
/// What a pager for many clients is: the promise is judged by it.
const CHOSEN: (Place, u64) = (Place::EachTogether, 0);

pub(super) fn report(host: Host, pagers: Pagers) -> Report<Pagers> {
    let mut tables: Vec<TextTable> = [false, true]
        .into_iter()
        .filter_map(|cold| served(&pagers, cold))
        .collect();
    tables.push(group(&pagers.zero));
    tables.push(ahead(&pagers.ahead));
    tables.push(metrics(&pagers));
    tables.push(Target::table(&pagers.targets));
    let mut report = Report::new("pager", host, pagers);
    report.marks = vec![
        format!(
            "image: {}, data in its lower half, a hole in the upper; a clone is a process with memory of \
             that size, without KVM; all are served by one pager in this process",
            size(report.results.memory_bytes as f64)
        ),
        "a touch: one byte of a page read, in random order, each clone in its own; the clock is read once \
         between two touches"
            .to_owned(),
        "faults/s: of all clones, first touch to last touch; over the fewest: by the time of a page, \
         median of rounds"
            .to_owned(),
        "CPU a page: processor time of pager and clones, by the pages".to_owned(),
        "metrics: pairs of short rounds, on and off, in alternating order; the ratio is the median of the \
         pairs'"
            .to_owned(),
        "installed ahead: from the call to its return, reading and comparing checksums included".to_owned(),
    ];
    report.tables = tables;
    report
}

/// The ways side by side; `None` where nothing of it was measured.
fn served(pagers: &Pagers, cold: bool) -> Option<TextTable> {
    let heads = [
        "",
        "looks for",
        "clones",
        "faults/s",
        "over the fewest",
        "touch p50",
        "p99",
        "max",
        "p99 / p50",
        "CPU a page",
    ];
    let cache = if cold {
        "not in the page cache"
    } else {
        "in the page cache"
    };
    let mut table = TextTable::new(
        format!("clones of one pager, all at once, image {cache}"),
        &heads,
    );
    let mut setups = pagers
        .setups
        .iter()
        .filter(|served| served.cold == cold)
        .peekable();
    setups.peek()?;
    for served in setups {
        for figures in &served.loads {
            table.row(vec![
                served.setup.place.name().to_owned(),
                time(served.setup.spin_us * 1000),
                figures.load.clones.to_string(),
                rate(figures.faults_per_second),
                ratio(over_the_fewest(served, figures)),
                time(figures.touch.p50_ns),
                time(figures.touch.p99_ns),
                time(figures.touch.max_ns),
                ratio(spread(figures)),
                time(figures.processor_ns),
            ]);
        }
    }
    Some(table)
}

/// Pages a second over those with the fewest clones, round by round; each page is one fault.
fn over_the_fewest(served: &Served, figures: &Figures) -> f64 {
    let first = served.loads.first();
    first.map_or(0.0, |first| 1.0 / figures.page.over(&first.page).p50)
}

fn spread(figures: &Figures) -> f64 {
    figures.touch.p99_ns as f64 / figures.touch.p50_ns.max(1) as f64
}

fn ahead(all: &[Measured]) -> TextTable {
    let heads = [
        "",
        "a page p50",
        "min",
        "max",
        "pages/s",
        "rate over COPY's",
    ];
    let mut table = TextTable::new("memory installed ahead, and filled in bulk", &heads);
    for measured in all {
        let summary = &measured.summary;
        let over = all
            .first()
            .map_or(0.0, |copy| 1.0 / measured.over(copy).p50);
        table.row(vec![
            measured.name.clone(),
            time(summary.p50_ns),
            time(summary.min_ns),
            time(summary.max_ns),
            rate(1e9 / summary.p50_ns.max(1) as f64),
            ratio(over),
        ]);
    }
    table
}

fn metrics(pagers: &Pagers) -> TextTable {
    let heads = [
        "",
        "pairs",
        "a fault p50",
        "min",
        "on over off",
        "interval (95 %)",
    ];
    let mut table = TextTable::new("recording of metrics, at random, same CPU", &heads);
    let paired = &pagers.metrics;
    for (name, summary, over) in [
        ("off", &paired.first, None),
        ("on", &paired.second, Some(paired)),
    ] {
        table.row(vec![
            name.to_owned(),
            summary.samples.to_string(),
            time(summary.p50_ns),
            time(summary.min_ns),
            over.map_or_else(
                || "-".to_owned(),
                |paired| format!("{:.3} x", paired.ratio.p50),
            ),
            over.map_or_else(
                || "-".to_owned(),
                |paired| {
                    let (low, high) = paired.ratio_interval;
                    format!("{low:.3} .. {high:.3}")
                },
            ),
        ]);
    }
    table
}

pub(super) fn targets(pagers: &Pagers) -> Vec<Target> {
    let mut targets = Vec::new();
    if let Some(zero) = pagers.zero.ways.first() {
        let us = zero.page.summary.p50_ns as f64 / 1e3;
        targets.push(Target::at_most(
            "zero pages read in sequence, a page",
            us,
            0.3,
            "us",
        ));
        let read = zero.pager["bytes_read"] as f64;
        targets.push(Target::at_most(
            "zero pages read, bytes read for them",
            read,
            0.0,
            "bytes",
        ));
    }
    let find = |name: &str| pagers.ahead.iter().find(|measured| measured.name == name);
    let what = "installing a working set, of the bulk COPY rate";
    targets.push(match find(AHEAD).zip(find(COPY)) {
        Some((ours, copy)) => Target::at_least(what, 1.0 / ours.over(copy).p50, 0.8, "x"),
        None => Target::untold(what, ">= 0.8 x", "another run"),
    });
    let is_chosen =
        |served: &&Served| (served.setup.place, served.setup.spin_us) == CHOSEN && !served.cold;
    let chosen = pagers
        .setups
        .iter()
        .find(is_chosen)
        .or(pagers.setups.first());
    let most = chosen.and_then(|served| Some((served, served.loads.last()?)));
    match most.filter(|(_, figures)| figures.load.clones >= MANY) {
        Some((served, figures)) => {
            let clones = figures.load.clones;
            let what = format!("{clones} clones of one pager, faults/s over one's");
            let over = over_the_fewest(served, figures);
            targets.push(Target::at_least(what, over, 1.0, "x"));
            let what = format!("{clones} clones of one pager, p99 over p50");
            targets.push(Target::at_most(what, spread(figures), 10.0, "x"));
        }
        None => targets.push(Target::untold(
            "one pager under many clones, faults/s over one's",
            ">= 1 x",
            format!("--clones 1,{MANY}"),
        )),
    }
    let what = "metrics on over off, a random fault";
    targets.push(Target::at_most(what, pagers.metrics.ratio.p50, 1.03, "x"));
    targets
}
