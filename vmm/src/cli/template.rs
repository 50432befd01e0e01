#![forbid(unsafe_code)]
//! `pando template create|inspect|verify`.

use std::fs;
use std::io::IsTerminal;
use std::time::Duration;

use serde_json::json;

use super::args::{CreateArgs, InspectArgs, ReadyArg, TemplateArgs, TemplateCommand, VerifyArgs};
use super::fail::Failure;
use super::size::human_bytes;
use super::table::table;
use super::{progress, run};
use crate::config;
use crate::report::{chain, exit};
use crate::template::build::{Ready, TemplateVm};
use crate::template::load::reseal;
use crate::template::map::ImageMap;
use crate::template::{Template, TemplateError};

/// Columns of the map on a terminal.
const MAP_COLUMNS: usize = 64;
/// Most rows of the map on a terminal.
const MAP_ROWS: usize = 24;

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
    if args.json {
        println!("{:#}", describe(&template));
    } else {
        summary(&template);
    }
    Ok(exit::OK)
}

fn inspect(args: &InspectArgs) -> Result<u8, Failure> {
    let template = Template::open(&args.dir)?;
    if let Some(path) = &args.svg {
        let pictures: Vec<String> = template
            .index()
            .backends()
            .iter()
            .map(|(id, index)| {
                let title = format!(
                    "{}: {id}, {}",
                    template.name(),
                    human_bytes(index.pages().get() * 4096)
                );
                ImageMap::new(index, 64, 128).svg(&title)
            })
            .collect();
        // One backend, one picture; a machine of several has its backends one below the other.
        fs::write(path, pictures.concat()).map_err(TemplateError::io("write", path))?;
    }
    if args.json {
        println!("{:#}", describe(&template));
        return Ok(exit::OK);
    }
    summary(&template);
    for (id, index) in template.index().backends() {
        let map = ImageMap::new(index, MAP_COLUMNS, MAP_ROWS);
        println!("\n{id}: each cell {}", human_bytes(map.cell_pages * 4096));
        print!("{}", map.text());
    }
    println!("\n█▓▒░ data, the darker the more   0 zero   · hole");
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
    println!("{}: every checksum is right{seal}", args.dir.display());
    Ok(exit::OK)
}

fn summary(template: &Template) {
    let file = template.manifest().file();
    println!(
        "template {}: {} vCPUs, {} of RAM, made by {}",
        template.dir().display(),
        file.cpus,
        human_bytes(template.spec().layout().total_bytes()),
        file.tool
    );
    let mut rows = table(&["backend", "size", "data", "zero", "hole", "at"]);
    for (entry, (_, index)) in file.backends.iter().zip(template.index().backends()) {
        let [data, zero, hole] = kinds(index);
        rows.add_row([
            entry.id.clone(),
            human_bytes(entry.bytes),
            human_bytes(data * 4096),
            human_bytes(zero * 4096),
            human_bytes(hole * 4096),
            format!("{:#x}", entry.guest_address),
        ]);
    }
    println!("\n{rows}");
    if std::io::stdout().is_terminal() {
        println!("try: pando clone {} --count 3", template.dir().display());
    }
}

fn kinds(index: &pando_pager::image::BackendIndex) -> [u64; 3] {
    use pando_pager::image::PageKind;
    [PageKind::Data, PageKind::Zero, PageKind::Hole].map(|kind| index.count(kind).get())
}

fn describe(template: &Template) -> serde_json::Value {
    let file = template.manifest().file();
    let backends: Vec<_> = file
        .backends
        .iter()
        .zip(template.index().backends())
        .map(|(entry, (_, index))| {
            let [data, zero, hole] = kinds(index);
            json!({
                "id": entry.id,
                "file": template.dir().join(&entry.file),
                "bytes": entry.bytes,
                "guest_address": entry.guest_address,
                "data_pages": data,
                "zero_pages": zero,
                "hole_pages": hole,
                "digest": entry.digest,
            })
        })
        .collect();
    json!({
        "template": template.dir(),
        "format": file.format,
        "tool": file.tool,
        "created_unix_s": file.created_unix_s,
        "cpus": file.cpus,
        "memory_bytes": template.spec().layout().total_bytes(),
        "state_bytes": file.state.seal.bytes,
        "index_bytes": file.index.seal.bytes,
        "backends": backends,
    })
}
