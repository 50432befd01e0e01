#![forbid(unsafe_code)]
//! `pando template create|verify`; the other subcommands have files of their own.

use std::path::Path;
use std::time::Duration;

use super::args::{CreateArgs, ReadyArg, TemplateArgs, TemplateCommand, VerifyArgs};
use super::fail::Failure;
use super::out::{note, say};
use super::{inspect, progress, run, warm};
use crate::config;
use crate::config::file::{DeviceTable, UuidWord};
use crate::machine::GenerationId;
use crate::report::{chain, exit};
use crate::spec::{BackendSpec, MachineSpec, Uuid};
use crate::template::Template;
use crate::template::build::{Ready, TemplateVm};
use crate::template::device_entry::unshared;
use crate::template::load::reseal;
use crate::template::summary::Summary;
use crate::template::working_set::{Found, WorkingSetFile};

/// Runs a subcommand.
pub fn run(args: TemplateArgs, verbosity: u8) -> Result<u8, Failure> {
    match args.command {
        TemplateCommand::Create(args) => create(&args),
        TemplateCommand::Inspect(args) => inspect::run(&args),
        TemplateCommand::Verify(args) => verify(&args),
        TemplateCommand::Warm(args) => warm::run(&args, verbosity),
    }
}

fn create(args: &CreateArgs) -> Result<u8, Failure> {
    let timeout = Duration::try_from_secs_f64(args.timeout)
        .map_err(|_| Failure::usage(format!("--timeout {} is no time", args.timeout)))?;
    let mut file = run::machine_file(&args.boot)?;
    if file.serial.is_some() {
        return Err(Failure::usage(
            "a template's machine has no serial: its COM1 is what --ready watches; take it out of the \
             machine file",
        ));
    }
    if let Some((id, kind)) = file.device.iter().find_map(DeviceTable::in_other_process) {
        return Err(Failure::usage(unshared(id, kind)));
    }
    // The built-in guest does not look: its clones would pay for nothing.
    let is_embedded = file.kernel.as_deref() == Some(Path::new(config::EMBEDDED_KERNEL));
    file.vmgenid.get_or_insert(!is_embedded);
    if !is_embedded && file.uuid.is_none() {
        let random = GenerationId::random().map_err(|error| Failure::of(&error))?;
        file.uuid = Some(UuidWord(Uuid(random.0)));
    }
    let (spec, boot) =
        config::resolve_file(&file).map_err(|error| Failure::usage(chain(&error)))?;
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
    let before = starts(&spec);
    let template = vm.freeze(&mut |backend, offset| bar.set_position(before[backend] + offset))?;
    bar.finish_and_clear();
    let facts = Summary::of(&template, &WorkingSetFile::of(&template).read());
    if args.json {
        return inspect::print_json(&facts);
    }
    inspect::print_summary(&facts);
    say!("\ntry: pando clone {} --count 3", args.out.display());
    Ok(exit::OK)
}

/// For each backend, the bytes of all before it.
fn starts(spec: &MachineSpec) -> Vec<u64> {
    let sum = |before: &mut u64, backend: &BackendSpec| {
        let start = *before;
        *before += backend.bytes();
        Some(start)
    };
    spec.backends().iter().scan(0, sum).collect()
}

fn verify(args: &VerifyArgs) -> Result<u8, Failure> {
    let bar = progress::byte_bar(0).with_prefix("verify");
    if args.reseal {
        reseal(&args.dir, &mut |_, offset| bar.set_position(offset))?;
    } else {
        let template = Template::open(&args.dir)?;
        bar.set_length(template.spec().layout().total_bytes());
        let before = starts(template.spec());
        template.verify(&mut |backend, offset| bar.set_position(before[backend] + offset))?;
    }
    bar.finish_and_clear();
    let seal = if args.reseal { ", sealed again" } else { "" };
    say!("{}: every checksum is right{seal}", args.dir.display());
    // A hint, and no part of what was sealed: it cannot make a template wrong.
    let template = Template::open(&args.dir)?;
    if let Found::Ignored { reason } = WorkingSetFile::of(&template).read() {
        note!(
            "note: its working set is ignored: {reason}; \
             `pando template warm {}` records another",
            args.dir.display()
        );
    }
    Ok(exit::OK)
}
