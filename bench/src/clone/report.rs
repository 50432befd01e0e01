#![forbid(unsafe_code)]
//! The figures of a run as tables, and how they stand to the targets.

use pando_vmm::clone::Engine;

use super::workload::{PAGES, Workload};
use super::{Clones, Compared, FLOOR, Figures};
use crate::floor::{MEMORY_MARK, PAGES_WRITTEN};
use crate::host::Host;
use crate::report::{Report, TextTable, ratio, size, time};
use crate::stats::Summary;
use crate::targets::Target;

pub(super) fn report(host: Host, clones: Clones) -> Report<Clones> {
    let mut tables: Vec<TextTable> = clones
        .workloads
        .iter()
        .map(|compared| starts(compared.workload.title(), compared))
        .collect();
    let title = format!(
        "{}, all in the working set",
        clones.recorded.workload.title()
    );
    tables.push(starts(title, &clones.recorded));
    if let Some(first) = clones.workloads.first() {
        tables.push(stages(first));
    }
    tables.push(faults(&clones.workloads));
    if !clones.floor_waves.is_empty() {
        tables.push(waves(&clones));
    }
    tables.push(Target::table(&clones.targets));
    let mut report = Report::new("clone", host, clones);
    report.marks = marks(&report.results);
    report.tables = tables;
    report
}

fn marks(clones: &Clones) -> Vec<String> {
    vec![
        format!(
            "template: the built-in guest, {} of RAM, {} pages with data, {} in the page cache",
            size(clones.memory_bytes as f64),
            clones.data_pages,
            if clones.cold { "none" } else { "all" }
        ),
        "clock starts: in the supervisor, before the clone's process is made; the guest's command \
         waits on its console"
            .to_owned(),
        "clock stops: in the supervisor, when the first byte of the guest's answer can be read"
            .to_owned(),
        "not on the clock: ending the clone, reaping it; of a clone alone, all but one".to_owned(),
        format!(
            "floor: fork of {} of filled memory, VM, slot, irqchip, vCPU, {PAGES_WRITTEN} page \
             writes, a port write; nothing of Pando",
            size(clones.memory_bytes as f64)
        ),
        MEMORY_MARK.to_owned(),
        "the vs columns are medians of the rounds' ratios of medians".to_owned(),
    ]
}

fn starts(title: impl Into<String>, compared: &Compared) -> TextTable {
    let mut heads = vec!["", "clones", "min", "p50", "p90", "p99", "max"];
    let baseline = compared.variants.first();
    let vs = baseline.map_or_else(String::new, |first| format!("vs {}", first.measured.name));
    heads.push(&vs);
    if compared.floor.is_some() {
        heads.push("vs floor");
    } else {
        heads.push("guest's work p50");
    }
    let mut table = TextTable::new(title, &heads);
    let all = compared
        .variants
        .iter()
        .map(|figures| (&figures.measured, Some(figures)))
        .chain(compared.floor.iter().map(|floor| (floor, None)));
    for (measured, figures) in all {
        let summary = &measured.summary;
        let mut row = vec![measured.name.clone(), summary.samples.to_string()];
        row.extend(
            [
                summary.min_ns,
                summary.p50_ns,
                summary.p90_ns,
                summary.p99_ns,
                summary.max_ns,
            ]
            .map(time),
        );
        row.push(ratio(measured.ratio.p50));
        row.push(match figures {
            None => ratio(1.0),
            Some(Figures {
                over_floor: Some(over),
                ..
            }) => ratio(over.p50),
            Some(Figures { guest, .. }) => guest
                .as_ref()
                .map_or_else(|| "-".to_owned(), |guest| time(guest.p50_ns)),
        });
        table.row(row);
    }
    table
}

/// Where the time goes, variants side by side; of many the medians alone.
fn stages(compared: &Compared) -> TextTable {
    let few = compared.variants.len() <= 2;
    let names: Vec<String> = compared
        .variants
        .iter()
        .flat_map(|figures| {
            let name = &figures.measured.name;
            let p90 = few.then(|| format!("{name} p90"));
            std::iter::once(format!("{name} p50")).chain(p90)
        })
        .collect();
    let heads: Vec<&str> = std::iter::once("")
        .chain(names.iter().map(String::as_str))
        .collect();
    let title = format!("{}: where the time goes", compared.workload.title());
    let mut table = TextTable::new(title, &heads);
    let Some(first) = compared.variants.first() else {
        return table;
    };
    for (stage, _) in &first.stages {
        let mut row = vec![stage.clone()];
        for figures in &compared.variants {
            let found = figures.stages.iter().find(|(name, _)| name == stage);
            let cell = |of: fn(&Summary) -> u64| {
                found.map_or_else(|| "-".to_owned(), |(_, summary)| time(of(summary)))
            };
            row.push(cell(|summary| summary.p50_ns));
            row.extend(few.then(|| cell(|summary| summary.p90_ns)));
        }
        table.row(row);
    }
    table
}

/// What the pagers did, for each clone.
fn faults(workloads: &[Compared]) -> TextTable {
    let heads = [
        "a clone's pager",
        "faults",
        "pages",
        "zero pages",
        "read",
        "p50 of a fault",
        "p99",
    ];
    let mut table = TextTable::new("faults, from the pager's side", &heads);
    for compared in workloads {
        for figures in &compared.variants {
            let pager = &figures.pager;
            if pager.installed_pages.is_empty() {
                continue;
            }
            let clones = figures.measured.summary.samples as f64;
            let each = |count: u64| format!("{:.0}", count as f64 / clones);
            let pages = |zero: bool| -> u64 {
                let installed = pager.installed_pages.iter();
                let kind = installed.filter(|(source, _)| (source.as_str() == "zero") == zero);
                kind.map(|(_, count)| count).sum()
            };
            let counter = |name: &str| -> u64 {
                let counters = pager.counters.iter();
                let named = counters.filter(|(counter, _)| counter.starts_with(name));
                named.map(|(_, count)| count).sum()
            };
            let data = pager
                .fault_us
                .iter()
                .filter(|(source, _)| *source != "zero");
            let most = data.max_by_key(|(_, percentiles)| percentiles.count);
            let us = |of: fn(&pando_vmm::observe::stats::Percentiles) -> f64| {
                most.map_or_else(|| "-".to_owned(), |(_, p)| format!("{:.1} µs", of(p)))
            };
            table.row(vec![
                format!("{}, {:?}", figures.measured.name, compared.workload),
                each(counter("pando_pager_faults_total")),
                each(pages(false)),
                each(pages(true)),
                size(counter("pando_pager_bytes_read_total") as f64 / clones),
                us(|p| p.p50_us),
                us(|p| p.p99_us),
            ]);
        }
    }
    table
}

fn waves(clones: &Clones) -> TextTable {
    let title = "clones alive at once";
    let heads = [
        "",
        "clones",
        "wall",
        "each",
        "memory each",
        "private p50",
        "starting at once",
    ];
    let mut table = TextTable::new(title, &heads);
    let count = clones
        .waves
        .first()
        .and_then(|waves| waves.waves.first())
        .map_or(0, |wave| wave.clones);
    for wave in &clones.floor_waves {
        table.row(vec![
            FLOOR.to_owned(),
            count.to_string(),
            time(wave.wall_ns),
            time(wave.wall_ns / u64::from(count.max(1))),
            size(wave.memory_per_clone_bytes),
            "-".to_owned(),
            "all".to_owned(),
        ]);
    }
    for waves in &clones.waves {
        for wave in &waves.waves {
            table.row(vec![
                waves.setup.name(),
                wave.clones.to_string(),
                time(wave.wall_ns),
                time(wave.wall_ns / u64::from(wave.clones.max(1))),
                size(wave.memory_per_clone_bytes),
                size(wave.private_bytes_p50 as f64),
                waves.parallel.to_string(),
            ]);
        }
    }
    table
}

pub(super) fn targets(clones: &Clones) -> Vec<Target> {
    let over_firecracker = |engine: &str, wanted: &str| {
        let what = format!("start to first output, engine {engine}, over Firecracker File");
        Target::untold(what, wanted, "Firecracker beside it")
    };
    let mut targets = vec![
        over_firecracker("root, warm shell", "<= 0.1 x"),
        over_firecracker("copy", "<= 0.5 x"),
    ];
    targets.extend(targets_of_root(clones));
    let what = format!("start + {PAGES} unrecorded pages in random order, copy over kernel");
    targets.push(match over_kernel(clones, Workload::Random, Engine::Copy) {
        Some(ratio) => Target::at_most(what, ratio, 2.5, "x"),
        None => Target::untold(what, "<= 2.5 x", "engines copy and kernel"),
    });
    targets
}

fn targets_of_root(clones: &Clones) -> Vec<Target> {
    let find = |warm| find(clones, Workload::FirstOutput, Engine::Root, warm);
    let ms = |ns: u64| ns as f64 / 1e6;
    let warm = |what: &str, bound: f64, of: fn(&Figures) -> u64| {
        let what = format!("start to first output, engine root, warm shell, {what}");
        match find(true) {
            Some(figures) => Target::at_most(what, ms(of(figures)), bound, "ms"),
            None => Target::untold(what, format!("<= {bound} ms"), "engine root"),
        }
    };
    let request = "start to first output, engine root, on request, over the floor";
    vec![
        warm("p50", 1.0, |figures| figures.measured.summary.p50_ns),
        warm("p99", 4.0, |figures| figures.measured.summary.p99_ns),
        match find(false).and_then(|figures| figures.over_floor.as_ref()) {
            Some(ratio) => Target::at_most(request, ratio.p50, 1.5, "x"),
            None => Target::untold(request, "<= 1.5 x", "engine root"),
        },
        recorded(clones, "copy", Engine::Copy, false),
        recorded(clones, "root, on request", Engine::Root, false),
        recorded(clones, "root, warm shell", Engine::Root, true),
    ]
}

/// Pages that the working set knows, over engine kernel beside it.
fn recorded(clones: &Clones, name: &str, engine: Engine, warm: bool) -> Target {
    let what = format!("start + {PAGES} recorded pages, {name} over kernel");
    let of = |engine, warm| find_in(&clones.recorded, engine, warm);
    match of(engine, warm).zip(of(Engine::Kernel, false)) {
        Some((ours, kernel)) => {
            Target::at_most(what, ours.measured.over(&kernel.measured).p50, 1.0, "x")
        }
        None => Target::untold(what, "<= 1 x", "engines copy, root and kernel"),
    }
}

/// A variant as users have it.
fn find(clones: &Clones, workload: Workload, engine: Engine, warm: bool) -> Option<&Figures> {
    let compared = clones.workloads.iter().find(|c| c.workload == workload)?;
    find_in(compared, engine, warm)
}

fn find_in(compared: &Compared, engine: Engine, warm: bool) -> Option<&Figures> {
    let mut variants = compared.variants.iter();
    variants.find(|figures| {
        let setup = figures.setup;
        setup.engine == engine && setup.verify && setup.warm == warm
    })
}

/// An engine, its clones made on request, over engine kernel.
fn over_kernel(clones: &Clones, workload: Workload, engine: Engine) -> Option<f64> {
    let ours = find(clones, workload, engine, false)?;
    let kernel = find(clones, workload, Engine::Kernel, false)?;
    Some(ours.measured.over(&kernel.measured).p50)
}
