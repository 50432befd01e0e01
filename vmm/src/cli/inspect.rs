#![forbid(unsafe_code)]
//! `pando template inspect`: what a template holds, and what clones touch of it.

use std::fs;

use serde::Serialize;

use super::args::InspectArgs;
use super::fail::Failure;
use super::out::say;
use super::size::human_bytes;
use super::table::table;
use crate::report::exit;
use crate::template::picture::svg;
use crate::template::summary::{Summary, maps, panels, touch_maps};
use crate::template::touched::{Facts, WorkingSetSummary};
use crate::template::working_set::WorkingSetFile;
use crate::template::{Template, TemplateError};

/// Columns of a map on a terminal.
const MAP_COLUMNS: usize = 64;
/// Most rows of a map on a terminal.
const MAP_ROWS: usize = 24;
/// Columns of a map in a picture.
const SVG_COLUMNS: usize = 64;
/// Most rows of a map in a picture.
const SVG_ROWS: usize = 64;

/// Shows a template.
pub fn run(args: &InspectArgs) -> Result<u8, Failure> {
    let template = Template::open(&args.dir)?;
    let found = WorkingSetFile::of(&template).read();
    let facts = Summary::of(&template, &found);
    if let Some(path) = &args.svg {
        let title = |backend: usize| {
            let backend = &facts.backends[backend];
            let size = human_bytes(backend.bytes);
            format!("{}: {}, {size}", template.name(), backend.id)
        };
        let panels = panels(&template, &found, SVG_COLUMNS, SVG_ROWS, title);
        fs::write(path, svg(&panels)).map_err(TemplateError::io("write", path))?;
    }
    if args.json {
        return print_json(&facts);
    }
    print_summary(&facts);
    let images = maps(&template, MAP_COLUMNS, MAP_ROWS);
    for (backend, map) in facts.backends.iter().zip(&images) {
        let cell = human_bytes(map.cell_bytes());
        say!("\n{}, each cell {cell}:", backend.id);
        say!("{}", map.text().trim_end());
    }
    say!("\n█▓▒░ data, the darker the more   0 zero   · hole");
    let touched = touch_maps(&template, &found, MAP_COLUMNS, MAP_ROWS);
    for (backend, map) in facts.backends.iter().zip(&touched) {
        say!("\n{}, what clones touch:", backend.id);
        say!("{}", map.where_text().trim_end());
        say!("\n{}, when they come to it:", backend.id);
        say!("{}", map.when_text().trim_end());
    }
    if !touched.is_empty() {
        say!(
            "\n█▓▒░ touched, the darker the more   Ww mostly written   \
             0 to 9 first to last   · not touched"
        );
    }
    Ok(exit::OK)
}

/// Prints a document.
pub fn print_json(document: &impl Serialize) -> Result<u8, Failure> {
    let text = serde_json::to_string_pretty(document).map_err(|error| Failure::of(&error))?;
    say!("{text}");
    Ok(exit::OK)
}

/// Prints a template's facts but for its maps.
pub fn print_summary(facts: &Summary) {
    say!(
        "template {}: {} vCPU{}, {} of RAM, made by {}",
        facts.template,
        facts.cpus,
        if facts.cpus == 1 { "" } else { "s" },
        human_bytes(facts.memory_bytes),
        facts.tool
    );
    if let Some(identity) = &facts.identity {
        let words = [("name", &identity.name), ("UUID", &identity.uuid)];
        for (what, text) in words {
            if let Some(text) = text {
                say!("{what} {text}, of its clones too");
            }
        }
    }
    let mut rows = table(&["backend", "size", "data", "zero", "hole", "at"]);
    for backend in &facts.backends {
        rows.add_row([
            backend.id.clone(),
            human_bytes(backend.bytes),
            human_bytes(backend.data_bytes),
            human_bytes(backend.zero_bytes),
            human_bytes(backend.hole_bytes),
            format!("{:#x}", backend.guest_address),
        ]);
    }
    say!("\n{rows}");
    print_devices(facts);
    match &facts.working_set {
        WorkingSetSummary::Absent => {
            say!(
                "\nworking set: none; `pando template warm {}` records one",
                facts.template
            );
        }
        WorkingSetSummary::Ignored { reason } => say!(
            "\nworking set: ignored, because {reason}; `pando template warm {}` records another",
            facts.template
        ),
        WorkingSetSummary::Known(facts) => print_working_set(facts),
    }
}

/// Prints the devices on the PCI bus, if there are any.
fn print_devices(facts: &Summary) {
    if facts.devices.is_empty() {
        return;
    }
    let mut rows = table(&["device", "kind", "slot", "size", "clones"]);
    for device in &facts.devices {
        let (size, clones) = match &device.disk {
            Some(disk) if disk.readonly => (human_bytes(disk.bytes), "read it"),
            Some(disk) => (human_bytes(disk.bytes), "write a layer of their own"),
            None => (String::new(), ""),
        };
        rows.add_row([
            device.id.clone(),
            device.kind.clone(),
            device.slot.to_string(),
            size,
            clones.to_owned(),
        ]);
    }
    say!("\n{rows}");
}

/// Prints what clones touch.
pub fn print_working_set(facts: &Facts) {
    let runs = if facts.runs == 1 { "run" } else { "runs" };
    let cut = match facts.cut_runs {
        0 => String::new(),
        cut => format!(", {cut} of them cut off"),
    };
    say!("\nworking set: learned from {} {runs}{cut}", facts.runs);
    let pages = |pages: u64| {
        [
            pages.to_string(),
            human_bytes(pages * facts.bytes_per_page()),
        ]
    };
    let mut rows = table(&["pages that clones touch", "pages", "bytes"]);
    let plan = facts.plan;
    for (what, count) in [
        ("all", facts.pages),
        ("touched in every run", facts.steady_pages),
        ("mostly written", facts.written_pages),
        ("without data, written", facts.zero_pages),
        ("for a root, single", plan.shared_pages),
        ("for each clone", plan.private_pages),
    ] {
        rows.add_row([vec![what.to_owned()], pages(count).into()].concat());
    }
    say!("{rows}");
    if plan.whole_ranges > 0 {
        say!("and {} ranges of 2 MiB for a root", plan.whole_ranges);
    }
}
