#![forbid(unsafe_code)]
//! The figures of a run as tables, and how they stand to the targets.

use pando_vmm::clone::Engine;

use super::{Density, Forest};
use crate::floor::PAGES_WRITTEN;
use crate::host::Host;
use crate::report::{Report, TextTable, size, time};
use crate::targets::Target;

/// Clones that memory and time are promised for, and how many are.
const FOR_MEMORY: u32 = 500;
const FOR_TIME: u32 = 1000;
const FOR_NUMBER: u32 = 2000;
/// The share of what clones took that must be available again when they are gone.
const GIVEN_BACK: f64 = 0.95;

pub(super) fn report(host: Host, density: Density) -> Report<Density> {
    let tables = vec![
        growth(&density),
        memory(&density),
        endings(&density),
        Target::table(&density.targets),
    ];
    let mut report = Report::new("density", host, density);
    report.marks = marks(&report.results);
    report.tables = tables;
    report
}

fn marks(density: &Density) -> Vec<String> {
    vec![
        format!(
            "each clone: answers, verifies pages of the template, writes {} pages of its own and verifies \
             them, and once more when all have written; {} start at once",
            density.own_pages, density.parallel
        ),
        "clock: from the first request of a step to the last answer of its last clone; making the root \
         is not on it"
            .to_owned(),
        format!(
            "floor: fork of {} of filled memory, VM, slot, irqchip, vCPU, {PAGES_WRITTEN} page writes, a \
             port write; all of a step at once",
            size(density.memory_bytes as f64)
        ),
        "one more: least squares through MemAvailable at each number of clones, kernel included; the \
         root is not in it; farthest: the level that lies worst"
            .to_owned(),
        "classes: mean of all clones, page by page, all alive; tables: page tables of the process".to_owned(),
        "left: what was not there before the first clone, when all are stopped".to_owned(),
    ]
}

fn growth(density: &Density) -> TextTable {
    let heads = ["", "alive", "started", "wall", "each", "clones/s"];
    let mut table = TextTable::new("clones alive at once, on the way up", &heads);
    let mut row = |name: String, alive: u32, started: u32, wall_ns: u64| {
        let each = wall_ns / u64::from(started.max(1));
        table.row(vec![
            name,
            alive.to_string(),
            started.to_string(),
            time(wall_ns),
            time(each),
            format!("{:.0}", 1e9 / each.max(1) as f64),
        ]);
    };
    for floor in &density.floor {
        for step in &floor.grown.steps {
            row("floor".to_owned(), step.alive, step.started, step.wall_ns);
        }
    }
    for forest in &density.engines {
        for step in &forest.steps {
            row(
                forest.engine.to_string(),
                step.alive,
                step.started,
                step.wall_ns,
            );
        }
    }
    table
}

fn memory(density: &Density) -> TextTable {
    let heads = [
        "",
        "one more",
        "farthest",
        "live",
        "dirty",
        "clean",
        "shared",
        "zero",
        "absent",
        "rest of process",
        "tables",
        "kernel",
    ];
    let mut table = TextTable::new("memory of a clone", &heads);
    let dash = || "-".to_owned();
    for floor in &density.floor {
        let mut row = vec!["floor".to_owned()];
        row.push(floor.slope.map_or_else(dash, |slope| size(slope.bytes)));
        row.push(
            floor
                .slope
                .map_or_else(dash, |slope| size(slope.farthest_bytes)),
        );
        row.extend(std::iter::repeat_with(dash).take(heads.len() - 3));
        table.row(row);
    }
    for forest in &density.engines {
        let total = &forest.memory;
        let each = |bytes: u64| size(bytes as f64 / total.clones.max(1) as f64);
        table.row(vec![
            forest.engine.to_string(),
            forest.slope.map_or_else(dash, |slope| size(slope.bytes)),
            forest
                .slope
                .map_or_else(dash, |slope| size(slope.farthest_bytes)),
            forest.live.map_or_else(dash, |cost| size(cost.bytes)),
            each(total.ram.private_dirty_bytes),
            each(total.ram.private_clean_bytes),
            each(total.ram.shared_bytes),
            each(total.ram.zero_bytes),
            each(total.ram.absent_bytes),
            each(total.process_private_bytes),
            each(total.page_tables_bytes),
            total.kernel_bytes.map_or_else(dash, each),
        ]);
    }
    table
}

fn endings(density: &Density) -> TextTable {
    let heads = [
        "",
        "right answers",
        "wrong",
        "took",
        "stopped in",
        "processes left",
        "descriptors left",
        "cgroups left",
        "memory left",
    ];
    let mut table = TextTable::new("all stopped", &heads);
    for forest in &density.engines {
        table.row(vec![
            forest.engine.to_string(),
            forest.right_answers.to_string(),
            forest.wrong.to_string(),
            size(forest.taken_bytes),
            time(forest.stop_ns),
            forest.left.processes.len().to_string(),
            forest.left.descriptors.len().to_string(),
            forest.left.cgroups.len().to_string(),
            size(forest.left.memory_bytes as f64),
        ]);
    }
    table
}

/// Of the engine that farms use: `root` where it was measured.
pub(super) fn targets(density: &Density) -> Vec<Target> {
    let measured = |engine| density.engines.iter().any(|forest| forest.engine == engine);
    let engine = [Engine::Root, Engine::Copy, Engine::Kernel]
        .into_iter()
        .find(|&engine| measured(engine))
        .unwrap_or_default();
    let forests: Vec<&Forest> = density
        .engines
        .iter()
        .filter(|forest| forest.engine == engine)
        .collect();
    let count = forests
        .iter()
        .filter_map(|forest| forest.steps.last())
        .map(|step| step.alive)
        .max()
        .unwrap_or(0);
    let needs = |number: u32| format!("--counts up to {number}");
    let own = median(
        forests
            .iter()
            .filter_map(|forest| Some(forest.slope?.bytes)),
    );
    let floor = median(
        density
            .floor
            .iter()
            .filter_map(|floor| Some(floor.slope?.bytes)),
    );
    let what = format!("memory of one more idle clone, {engine} over the floor");
    let for_memory = match own.zip(floor) {
        Some((own, floor)) if count >= FOR_MEMORY && floor > 0.0 => {
            Target::at_most(what, own / floor, 1.3, "x")
        }
        _ => Target::untold(what, "<= 1.3 x", needs(FOR_MEMORY)),
    };
    let own = median(
        forests
            .iter()
            .filter_map(|forest| time_of(forest.walls(), FOR_TIME)),
    );
    let floor = median(density.floor.iter().filter_map(|floor| {
        let walls = floor.grown.steps.iter();
        time_of(walls.map(|step| (step.alive, step.wall_ns)), FOR_TIME)
    }));
    let what = format!("{FOR_TIME} clones started, {engine} over the floor");
    let for_time = match own.zip(floor) {
        Some((own, floor)) => Target::at_most(what, own / floor, 1.5, "x"),
        None => Target::untold(what, "<= 1.5 x", format!("{FOR_TIME} among --counts")),
    };
    let failed = forests.iter().map(|forest| forest.wrong).sum::<u64>();
    let what = format!("clones alive at once, {engine}, none wrong");
    let for_number = if count < FOR_NUMBER {
        Target::untold(what, format!(">= {FOR_NUMBER} clones"), needs(FOR_NUMBER))
    } else {
        let right = if failed == 0 { count } else { 0 };
        Target::at_least(what, f64::from(right), f64::from(FOR_NUMBER), "clones")
    };
    let things = |forest: &&Forest| {
        forest.left.processes.len() + forest.left.descriptors.len() + forest.left.cgroups.len()
    };
    let left = forests.iter().map(things).sum::<usize>();
    let back = median(
        forests
            .iter()
            .filter(|forest| forest.taken_bytes > 0.0)
            .map(|forest| 1.0 - forest.left.memory_bytes as f64 / forest.taken_bytes),
    );
    let what = "memory available again when all are stopped, of what was taken";
    vec![
        for_memory,
        for_time,
        for_number,
        Target::at_most(
            "processes, descriptors and cgroups left when all are stopped",
            left as f64,
            0.0,
            "left",
        ),
        match back {
            Some(share) => Target::at_least(what, share, GIVEN_BACK, "x"),
            None => Target::untold(what, format!(">= {GIVEN_BACK} x"), "a host that is quieter"),
        },
    ]
}

impl Forest {
    fn walls(&self) -> impl Iterator<Item = (u32, u64)> {
        self.steps.iter().map(|step| (step.alive, step.wall_ns))
    }
}

/// Time of all steps up to the one with `count` clones alive; `None` without such a step.
fn time_of(walls: impl Iterator<Item = (u32, u64)>, count: u32) -> Option<f64> {
    let mut sum = 0.0;
    for (alive, wall_ns) in walls {
        sum += wall_ns as f64;
        if alive == count {
            return Some(sum);
        }
    }
    None
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_number_is_that_of_all_steps_up_to_it() {
        let walls = [(100, 5), (1000, 20), (2000, 100)];
        assert_eq!(time_of(walls.into_iter(), 1000), Some(25.0));
        assert_eq!(time_of(walls.into_iter(), 500), None);
    }

    #[test]
    fn a_median_is_one_of_the_values() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median(std::iter::empty()), None);
    }
}
