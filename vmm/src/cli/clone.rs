#![forbid(unsafe_code)]
//! `pando clone`: starts clones, passes their consoles on, watches over them until they end.

use std::fs;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::json;

use super::args::{CloneArgs, DiscardArg, PagerArgs, PagerPlaceArg};
use super::fail::Failure;
use super::lines::{LineWriter, Printed};
use super::memory::{memory_document, print_memory};
use super::out::{note, say};
use super::size::{human_bytes, human_us};
use super::table::table;
use super::unique;
use crate::clone::Engine;
use crate::clone::admit::limits::HostLimits;
use crate::clone::admit::{Request, admit};
use crate::clone::cgroup::CloneGroups;
use crate::clone::consoles::{self, ConsolePlan};
use crate::clone::control::{Ending, PagerConfig};
use crate::clone::give_back::policy::Policy;
use crate::clone::learn::{Learn, Lessons};
use crate::clone::marks::{self, DocumentPattern};
use crate::clone::nets::{self, NetPattern};
use crate::clone::pool::PoolLimits;
use crate::clone::process::SerialPlan;
use crate::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use crate::clone::vsock::{self, VsockPlan};
use crate::host::{self, raise_descriptor_limit};
use crate::observe::metrics;
use crate::observe::stats::Durations;
use crate::report::{chain, exit};
use crate::size::Size;
use crate::template::working_set::WorkingSetFile;
use crate::template::{Template, TemplateError, compat};

/// Runs the clones.
pub fn run(args: &CloneArgs, verbosity: u8) -> Result<u8, Failure> {
    let mut pager = PagerConfig {
        place: PagerPlaceArg::place(args.pager_place, args.count),
        discard_to_zero: args.devices.balloon.discard == DiscardArg::Zero,
        inflate_bytes: args.devices.balloon.inflate.map(|size| size.0),
        ..pager_config(&args.pager)?
    };
    if args.warm.is_some() && args.engine != Engine::Root {
        return Err(Failure::usage(format!(
            "--warm is for clones that are forks: give --engine root instead of {}",
            args.engine
        )));
    }
    // Opened here once, so that what is wrong with it is said once and before anything starts.
    let template = Template::open(&args.dir)?;
    require_balloon(args, &template)?;
    let offer = host::offer().map_err(|error| Failure::new(exit::HOST, chain(&error)))?;
    compat::check(&args.dir, template.manifest(), &offer)?;
    if let Some(address) = args.metrics {
        let address = metrics::serve(address)?;
        note!("metrics: http://{address}/metrics");
    }
    let clones = args.count.max(if args.unique.check_unique { 2 } else { 1 });
    let vsock = VsockPlan {
        first_cid: args.sockets.vsock_cid,
        dir: args.sockets.vsock_dir.clone(),
    };
    vsock::check(&vsock, clones, template.spec()).map_err(|error| Failure::usage(chain(&error)))?;
    let consoles = ConsolePlan {
        dir: args.sockets.console_dir.clone(),
    };
    consoles::check(&consoles, template.spec()).map_err(|error| Failure::usage(chain(&error)))?;
    raise_descriptor_limit();
    let limits = HostLimits::probe();
    let nets = nets(args, &template, clones)?;
    let documents = documents(args, &template)?;
    let request = Request {
        clones: u64::from(clones) + args.warm.map_or(0, |warm| warm.ceiling as u64),
        engine: args.engine,
        cpus: template.spec().cpus().get().into(),
        once_bytes: root_bytes(args, &limits, template.spec().layout().total_bytes()),
    };
    admit(&request, &limits, args.overcommit).map_err(|error| Failure::of(&error))?;
    require_engine(args.engine, &pager)?;
    pager.learn = learn(args, &template);
    pager.give_back = give_back(args);
    let sockets = [
        &args.serial,
        &args.sockets.vsock_dir,
        &args.sockets.console_dir,
    ];
    for dir in sockets.into_iter().flatten() {
        fs::create_dir_all(dir).map_err(TemplateError::io("make directory", dir))?;
    }
    let program = std::env::current_exe().map_err(|error| Failure::of(&error))?;
    let mut supervisor = Supervisor::new(CloneOptions {
        host_check: crate::machine::HostCheck::Done,
        root: RootOptions {
            budget_bytes: args.root_memory.map(|size| size.0),
            shells: args
                .warm
                .map_or_else(PoolLimits::default, |warm| PoolLimits {
                    floor: warm.floor,
                    ceiling: warm.ceiling,
                }),
            ..RootOptions::default()
        },
        program,
        template: args.dir.clone(),
        name: template.name(),
        engine: args.engine,
        pager,
        verbosity,
        overcommit: args.overcommit,
        measure_memory: args.metrics.is_some() || args.json || args.count > 1,
    })
    .map_err(|error| Failure::of(&error))?;
    supervisor.use_vsock(vsock);
    supervisor.use_consoles(consoles);
    supervisor.nets = nets;
    supervisor.documents = documents;
    if args.cgroups {
        match CloneGroups::new() {
            Ok(groups) => supervisor.use_cgroups(groups),
            Err(error) => note!("pando: {}", chain(&error)),
        }
    }
    let spec = template.spec().clone();
    drop(template);
    if args.warm.is_some() {
        supervisor.warm_up().map_err(|error| Failure::of(&error))?;
    }
    if args.unique.check_unique {
        return unique::run(args, &spec, &mut supervisor);
    }
    let readable = supervise(args, &mut supervisor)?;
    let lessons = supervisor.finish_lessons();
    report(args, &supervisor, &lessons, readable)
}

/// Where cables end, proven.
fn nets(args: &CloneArgs, template: &Template, clones: u32) -> Result<Vec<NetPattern>, Failure> {
    let patterns: Vec<_> = args.devices.nets.iter().map(|net| net.0.clone()).collect();
    nets::check(&patterns, template.spec(), clones)
        .map_err(|why| Failure::usage(format!("--net: {why}")))
}

/// What documents have, proven.
fn documents(args: &CloneArgs, template: &Template) -> Result<Vec<DocumentPattern>, Failure> {
    let patterns: Vec<_> = args
        .devices
        .documents
        .iter()
        .map(|file| file.0.clone())
        .collect();
    marks::check(&patterns, template.spec())
        .map_err(|why| Failure::usage(format!("--document: {why}")))?;
    Ok(patterns)
}

/// Which clones teach; none where what they teach could not be kept.
fn learn(args: &CloneArgs, template: &Template) -> Learn {
    if args.learn == Learn::Off || args.engine == Engine::Kernel {
        return Learn::Off;
    }
    match WorkingSetFile::of(template).check_writable() {
        Ok(()) => args.learn,
        Err(error) => {
            note!("pando: note: clones teach nothing: {}", chain(&error));
            Learn::Off
        }
    }
}

/// When clones give memory back; never where this kernel cannot tell what was written.
fn give_back(args: &CloneArgs) -> Option<Policy> {
    let policy = args.give_back?;
    let able = match args.engine {
        Engine::Kernel => Err("engine kernel has no pager that could bring memory back".to_owned()),
        Engine::Copy | Engine::Root => host::require_write_tracking(),
    };
    match able {
        Ok(()) => Some(policy),
        Err(why) => {
            note!("pando: note: give-back is off: {why}");
            None
        }
    }
}

/// The most that a root takes for itself, which is needed once.
fn root_bytes(args: &CloneArgs, limits: &HostLimits, ram_bytes: u64) -> u64 {
    let free = limits.memory.as_ref().map(|memory| memory.available_bytes);
    match args.engine {
        Engine::Copy | Engine::Kernel => 0,
        Engine::Root => {
            let asked = args.root_memory.map(|size| size.0);
            let budget = asked.or_else(|| free.map(|free| free / 2));
            ram_bytes.min(budget.unwrap_or(u64::MAX))
        }
    }
}

/// Whether there is what `--inflate` inflates, and memory for it; and whether memory can be discarded at all.
fn require_balloon(args: &CloneArgs, template: &Template) -> Result<(), Failure> {
    let wanted = &args.devices.balloon;
    if wanted.discard == DiscardArg::Zero && args.engine == Engine::Kernel {
        return Err(Failure::usage(
            "--discard zero: the kernel would bring the template's bytes again: give --engine copy or root",
        ));
    }
    let Some(Size(bytes)) = wanted.inflate else {
        return Ok(());
    };
    let spec = template.spec();
    if spec
        .devices()
        .iter()
        .all(|device| device.balloon().is_none())
    {
        return Err(Failure::usage(format!(
            "--inflate: template {} has no balloon: create it with --balloon",
            args.dir.display()
        )));
    }
    if bytes >= spec.ram_bytes() {
        return Err(Failure::usage(format!(
            "--inflate {bytes}: the guest has {} bytes and cannot give all of them away",
            spec.ram_bytes()
        )));
    }
    Ok(())
}

/// How pagers work, as the flags say.
pub fn pager_config(args: &PagerArgs) -> Result<PagerConfig, Failure> {
    Ok(PagerConfig {
        io: args.io.into(),
        verify: !args.no_verify,
        keep_together: !args.no_pin,
        working_set: !args.no_working_set,
        fault_deadline: fault_deadline(args.fault_deadline)?,
        ..PagerConfig::default()
    })
}

/// How long a fault may take, as the flag says.
pub fn fault_deadline(seconds: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|deadline| !deadline.is_zero())
        .ok_or_else(|| Failure::usage(format!("--fault-deadline {seconds} is no time above zero")))
}

/// Fails when this host refuses what an engine needs: said once, and not by each clone.
pub fn require_engine(engine: Engine, pager: &PagerConfig) -> Result<(), Failure> {
    match engine {
        Engine::Copy | Engine::Root => {
            host::require_paging(pager.io).map_err(|error| Failure::of(&error))
        }
        Engine::Kernel => Ok(()),
    }
}

/// Runs the clones to their end; whether standard output can still be written to.
fn supervise(args: &CloneArgs, supervisor: &mut Supervisor) -> Result<bool, Failure> {
    let failed = |error: crate::clone::supervise::SuperviseError| Failure::of(&error);
    if args.count == 1 && args.serial.is_none() && !args.json && std::io::stdin().is_terminal() {
        note!("this terminal is the clone's COM1; Ctrl-A x ends it");
    }
    // Not through `std::io::stdout`: its lock would be held while a reader stalls. A document must
    // have standard output to itself.
    let out = if args.json {
        std::io::stderr().as_fd().try_clone_to_owned()
    } else {
        std::io::stdout().as_fd().try_clone_to_owned()
    };
    let mut lines = out
        .and_then(|out| LineWriter::new(fs::File::from(out)))
        .map_err(|error| Failure::of(&error))?;
    for number in 0..args.count {
        let plan = match &args.serial {
            Some(dir) => SerialPlan::Unix(dir.join(format!("clone-{number}.sock"))),
            None if args.count == 1 && !args.json => SerialPlan::Terminal,
            None => SerialPlan::Supervisor,
        };
        supervisor.start(&plan, &[]);
    }
    while supervisor.live() > 0 {
        for event in supervisor.wait(Duration::from_secs(1)).map_err(failed)? {
            match event {
                Event::Started(clone) if args.count > 1 || args.serial.is_some() => {
                    tracing::info!(clone, pid = supervisor.clones()[clone].pid, "runs");
                }
                Event::Started(_) => (),
                Event::Output(clone) | Event::Ended(clone) => {
                    pass_on(supervisor, clone, &mut lines);
                }
                Event::Signal => supervisor.stop_all(STOP_GRACE).map_err(failed)?,
            }
        }
    }
    for clone in 0..supervisor.clones().len() {
        pass_on(supervisor, clone, &mut lines);
    }
    // What clones had in common: its last figures belong to the report.
    supervisor.stop_all(STOP_GRACE).map_err(failed)?;
    let Printed { dropped, stalled } = lines.finish();
    if dropped > 0 {
        note!("pando: {dropped} lines of clones were dropped: standard output was not read");
    }
    Ok(!stalled)
}

/// Prints whole lines of a clone's console, marked with its number.
fn pass_on(supervisor: &mut Supervisor, number: usize, lines: &mut LineWriter) {
    let Some(clone) = supervisor.clone_mut(number) else {
        return;
    };
    let ended = clone.process.is_none();
    let Some(console) = clone.console.as_mut() else {
        return;
    };
    let mut open = console.poll().unwrap_or(false);
    while ended && open {
        open = console.poll().unwrap_or(false);
    }
    while let Some(line) = console.take_line() {
        lines.print(format!("[{number}] {line}"));
    }
    if !open {
        supervisor.forget_console(number);
    }
}

/// Says how the clones ended, on standard output only if it `is_read`.
fn report(
    args: &CloneArgs,
    supervisor: &Supervisor,
    lessons: &Lessons,
    is_read: bool,
) -> Result<u8, Failure> {
    let failed: Vec<(usize, &str)> = supervisor
        .clones()
        .iter()
        .enumerate()
        .filter_map(|(number, clone)| match &clone.ending {
            Some(Ending::Failed { message, .. }) => Some((number, message.as_str())),
            _ => None,
        })
        .collect();
    if !is_read {
        note!("pando: the report is left out for the same reason");
    } else if args.json {
        say!("{:#}", document(args, supervisor, lessons));
    } else if args.count > 1 {
        print_table(supervisor, lessons);
    }
    for (number, message) in &failed {
        note!("pando: clone {number}: {message}");
    }
    let worst = supervisor
        .clones()
        .iter()
        .filter_map(|clone| clone.ending.as_ref());
    match worst.map(Ending::exit_code).max() {
        Some(code) if code != exit::OK => {
            let (all, bad) = (supervisor.clones().len(), failed.len());
            Err(Failure::new(code, format!("{bad} of {all} clones failed")))
        }
        _ => Ok(exit::OK),
    }
}

fn print_table(supervisor: &Supervisor, lessons: &Lessons) {
    let mut durations = Durations::default();
    supervisor
        .clones()
        .iter()
        .filter_map(|c| c.running)
        .for_each(|took| durations.record(took));
    let p = durations.percentiles();
    let mut rows = table(&["clones", "running p50", "p90", "p99", "max"]);
    rows.add_row([
        p.count.to_string(),
        human_us(p.p50_us),
        human_us(p.p90_us),
        human_us(p.p99_us),
        human_us(p.max_us),
    ]);
    say!("\n{rows}");
    let mut faults = table(&["faults from", "count", "p50", "p99", "max"]);
    for (source, durations) in &supervisor.pager_stats.fault_total {
        let p = durations.percentiles();
        faults.add_row([
            source.clone(),
            p.count.to_string(),
            human_us(p.p50_us),
            human_us(p.p99_us),
            human_us(p.max_us),
        ]);
    }
    if !supervisor.pager_stats.fault_total.is_empty() {
        say!("\n{faults}");
    }
    print_memory(supervisor.usage(), supervisor.kernel_accounting());
    let given_back = supervisor.given_back();
    if given_back.pauses > 0 {
        say!(
            "gave back {} while idle, in {} pauses",
            human_bytes(given_back.bytes),
            given_back.pauses
        );
    }
    if lessons.learned > 0 {
        say!("{} clones taught the working set", lessons.learned);
    }
}

fn document(args: &CloneArgs, supervisor: &Supervisor, lessons: &Lessons) -> serde_json::Value {
    let clones: Vec<_> = supervisor
        .clones()
        .iter()
        .enumerate()
        .map(|(number, clone)| {
            let us = |took: std::time::Duration| took.as_secs_f64() * 1e6;
            let stages: serde_json::Map<_, _> = clone
                .stages
                .iter()
                .map(|(name, took)| (name.clone(), json!(us(*took))))
                .collect();
            json!({
                "clone": number,
                "pid": clone.pid,
                "io": clone.io,
                "running_us": clone.running.map(us),
                "stages_us": stages,
                "ending": clone.ending,
                "memory": supervisor.usage().of(number),
                "given_back": clone.given_back,
            })
        })
        .collect();
    json!({
        "template": args.dir.display().to_string(),
        "engine": args.engine,
        "clones": clones,
        "memory": memory_document(supervisor.usage(), supervisor.kernel_accounting()),
        "given_back": supervisor.given_back(),
        "lessons": lessons,
        "pager": super::demo::pager_document(&supervisor.pager_stats),
    })
}
