#![forbid(unsafe_code)]
//! `pando template create|inspect|verify`.

use std::fs;
use std::time::Duration;

use super::args::{CreateArgs, InspectArgs, ReadyArg, TemplateArgs, TemplateCommand, VerifyArgs};
use super::fail::Failure;
use super::out::say;
use super::size::human_bytes;
use super::table::table;
use super::{progress, run};
use crate::config;
use crate::report::{chain, exit};
use crate::template::build::{Ready, TemplateVm};
use crate::template::load::reseal;
use crate::template::map::svg;
use crate::template::summary::{BackendSummary, Summary, maps};
use crate::template::{Template, TemplateError};

/// Columns of the map on a terminal.
const MAP_COLUMNS: usize = 64;
/// Most rows of the map on a terminal.
const MAP_ROWS: usize = 24;
/// Columns of the map in a picture.
const SVG_COLUMNS: usize = 64;
/// Most rows of the map in a picture.
const SVG_ROWS: usize = 64;

/// Runs a subcommand.
pub fn run(args: TemplateArgs) -> Result<u8, Failure> {
    match args.command {
        TemplateCommand::Create(args) => create(&args),
        TemplateCommand::Inspect(args) => inspect(&args),
        TemplateCommand::Verify(args) => verify(&args),
    }
}

fn create(args: &CreateArgs) -> Result<u8, Failure> {
    let timeout = Duration::try_from_secs_f64(args.timeout)
        .map_err(|_| Failure::usage(format!("--timeout {} is no time", args.timeout)))?;
    let (spec, boot) = config::resolve(&run::request(&args.boot))
        .map_err(|error| Failure::usage(chain(&error)))?;
    let ready = match &args.ready {
        ReadyArg::Serial(text) => Ready::Serial(text.clone()),
        ReadyArg::After(delay) => Ready::After(*delay),
    };
    let spinner = progress::spinner("boot");
    let mut vm = TemplateVm::boot(&args.out, &spec, &boot, !args.no_reserve)?;
    vm.wait_ready(&ready, timeout, &mut |line| {
        spinner.set_message(line.to_owned())
    })?;
    spinner.finish_and_clear();
    let total = spec.layout().total_bytes();
    let bar = progress::byte_bar(total).with_prefix("seal");
    let template = vm.freeze(&mut |_, offset| bar.set_position(offset))?;
    bar.finish_and_clear();
    let facts = Summary::of(&template);
    if args.json {
        return print_json(&facts);
    }
    print_summary(&facts);
    say!("\ntry: pando clone {} --count 3", args.out.display());
    Ok(exit::OK)
}

fn inspect(args: &InspectArgs) -> Result<u8, Failure> {
    let template = Template::open(&args.dir)?;
    let facts = Summary::of(&template);
    if let Some(path) = &args.svg {
        let title = |backend: &BackendSummary| {
            format!(
                "{}: {}, {}",
                template.name(),
                backend.id,
                human_bytes(backend.bytes)
            )
        };
        let maps = maps(&template, SVG_COLUMNS, SVG_ROWS);
        let panels: Vec<_> = facts.backends.iter().map(title).zip(&maps).collect();
        fs::write(path, svg(&panels)).map_err(TemplateError::io("write", path))?;
    }
    if args.json {
        return print_json(&facts);
    }
    print_summary(&facts);
    for (backend, map) in facts
        .backends
        .iter()
        .zip(maps(&template, MAP_COLUMNS, MAP_ROWS))
    {
        say!(
            "\n{}, each cell {}:",
            backend.id,
            human_bytes(map.cell_bytes())
        );
        say!("{}", map.text().trim_end());
    }
    say!("\n█▓▒░ data, the darker the more   0 zero   · hole");
    Ok(exit::OK)
}

fn verify(args: &VerifyArgs) -> Result<u8, Failure> {
    let bar = progress::byte_bar(0).with_prefix("verify");
    let progress = &mut |_, offset| bar.set_position(offset);
    if args.reseal {
        reseal(&args.dir, progress)?;
    } else {
        let template = Template::open(&args.dir)?;
        bar.set_length(template.spec().layout().total_bytes());
        template.verify(progress)?;
    }
    bar.finish_and_clear();
    let seal = if args.reseal { ", sealed again" } else { "" };
    say!("{}: every checksum is right{seal}", args.dir.display());
    Ok(exit::OK)
}

fn print_json(facts: &Summary) -> Result<u8, Failure> {
    let text = serde_json::to_string_pretty(facts).map_err(|error| Failure::of(&error))?;
    say!("{text}");
    Ok(exit::OK)
}

fn print_summary(facts: &Summary) {
    say!(
        "template {}: {} vCPU{}, {} of RAM, made by {}",
        facts.template,
        facts.cpus,
        if facts.cpus == 1 { "" } else { "s" },
        human_bytes(facts.memory_bytes),
        facts.tool
    );
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
}
