#![forbid(unsafe_code)]
//! The figures of a run as tables, and how they stand to the targets.

use super::{Many, Pagers};
use crate::fault::report::{group, rate};
use crate::fault::touch::Placement;
use crate::host::Host;
use crate::report::{Report, TextTable, ratio, size, time};
use crate::stats::Measured;
use crate::targets::Target;

pub(super) const COPY: &str = "UFFDIO_COPY, 64 KiB a call, beside it";
pub(super) const AHEAD: &str = "installed ahead, one run, verified";
/// Clones that the promise of one pager under many is made for.
const MANY: u32 = 100;

pub(super) fn report(host: Host, pagers: Pagers) -> Report<Pagers> {
    let mut tables = vec![group(&pagers.hand_over)];
    tables.extend(pagers.many.iter().map(|many| group(&many.group)));
    tables.push(many(&pagers.many));
    tables.push(group(&pagers.zero));
    tables.push(ahead(&pagers.ahead));
    tables.push(metrics(&pagers));
    tables.push(Target::table(&pagers.targets));
    let mut report = Report::new("pager", host, pagers);
    report.marks = vec![
        format!(
            "image: {}, data in its lower half, a hole in the upper; clones are memories of this process, \
             each touched by a thread of its own, all served by one pager",
            size(report.results.memory_bytes as f64)
        ),
        "a touch: one byte of a page read; the clock is read once between two touches".to_owned(),
        "a page: first touch to last touch of all threads, by the pages touched; the p50 is of rounds"
            .to_owned(),
        "CPU a page: processor time of this process in a round, toucher and pager, by the pages".to_owned(),
        "metrics: pairs of short rounds, on and off, in alternating order; the ratio is the median of the \
         pairs'"
            .to_owned(),
        "installed ahead: from the call to its return, reading and comparing checksums included".to_owned(),
    ];
    report.tables = tables;
    report
}

/// The placements side by side, with the most clones over the fewest.
fn many(all: &[Many]) -> TextTable {
    let heads = [
        "",
        "clones",
        "faults/s",
        "over the fewest",
        "p50",
        "p99",
        "p99 / p50",
        "CPU a page",
    ];
    let mut table = TextTable::new("one pager under many clones", &heads);
    for many in all {
        let Some(most) = many.group.ways.last() else {
            continue;
        };
        let title = many
            .group
            .title
            .trim_start_matches("clones of one pager at once, at random, ");
        table.row(vec![
            title.to_owned(),
            most.load.clones.to_string(),
            rate(most.faults_per_second),
            ratio(faults_over_the_fewest(many)),
            time(most.touch.p50_ns),
            time(most.touch.p99_ns),
            ratio(spread(many)),
            time(most.processor_ns),
        ]);
    }
    table
}

/// Faults a second with the most clones over those with the fewest, round by round; each page is one
/// fault.
fn faults_over_the_fewest(many: &Many) -> f64 {
    let ways = &many.group.ways;
    match (ways.first(), ways.last()) {
        (Some(first), Some(last)) => 1.0 / last.page.over(&first.page).p50,
        _ => 0.0,
    }
}

fn spread(many: &Many) -> f64 {
    let most = many.group.ways.last();
    most.map_or(0.0, |most| {
        most.touch.p99_ns as f64 / most.touch.p50_ns.max(1) as f64
    })
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
    // As the scheduler places them: that is what a pager for many clones gets.
    let chosen = pagers
        .many
        .iter()
        .find(|many| many.placement == Placement::Free && many.spin_us == 0 && !many.cold);
    let clones = chosen
        .and_then(|many| many.group.ways.last())
        .map_or(0, |way| way.load.clones);
    match chosen.filter(|_| clones >= MANY) {
        Some(many) => {
            let what = format!("{clones} clones of one pager, faults/s over one's");
            targets.push(Target::at_least(
                what,
                faults_over_the_fewest(many),
                1.0,
                "x",
            ));
            let what = format!("{clones} clones of one pager, p99 over p50");
            targets.push(Target::at_most(what, spread(many), 10.0, "x"));
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
