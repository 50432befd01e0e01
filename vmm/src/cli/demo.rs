#![forbid(unsafe_code)]
//! `pando demo`: a template of the built-in guest, clones, a table of what they cost.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::args::{DemoArgs, PagerPlaceArg};
use super::clone::{pager_config, require_engine};
use super::fail::Failure;
use super::out::{note, say};
use super::progress;
use super::size::{human_bytes, human_us};
use super::table::table;
use crate::clone::END_SIGNALS;
use crate::clone::admit::limits::HostLimits;
use crate::clone::admit::{Request, admit};
use crate::clone::control::PagerConfig;
use crate::clone::supervise::{CloneOptions, Event};
use crate::config::{self, EMBEDDED_KERNEL, MachineRequest};
use crate::demo::drive::{Demo, Finished};
use crate::demo::result::{DemoResult, PagerFacts};
use crate::host::raise_descriptor_limit;
use crate::observe::metrics;
use crate::observe::stats::PagerStats;
use crate::report::{chain, exit};
use crate::template::scratch::LockedDir;

/// Runs the demonstration.
pub fn run(args: &DemoArgs, verbosity: u8) -> Result<u8, Failure> {
    let pager = PagerConfig {
        place: PagerPlaceArg::place(args.pager_place, args.clones),
        ..pager_config(&args.pager)?
    };
    let request = MachineRequest {
        kernel: EMBEDDED_KERNEL.into(),
        initrd: None,
        append: String::new(),
        memory_bytes: args.memory.0,
        cpus: 1,
    };
    let (spec, _) = config::resolve(&request).map_err(|error| Failure::usage(chain(&error)))?;
    raise_descriptor_limit();
    let admission = Request {
        clones: args.clones.into(),
        engine: args.engine,
        cpus: request.cpus.into(),
        once_bytes: args.memory.0,
    };
    admit(&admission, &HostLimits::probe(), false).map_err(|error| Failure::of(&error))?;
    require_engine(args.engine, &pager)?;
    let address = metrics::serve(args.metrics)?;
    note!("metrics: http://{address}/metrics");
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in END_SIGNALS {
        signal_hook::flag::register(signal, Arc::clone(&cancel))
            .map_err(|error| Failure::of(&error))?;
    }
    // Removed when it goes out of scope, template and all.
    let scratch = Scratch::new(args.template.clone())?;
    let spinner = progress::spinner("template");
    let start = Instant::now();
    let template = Demo::make_template(&scratch.dir, &spec, Arc::clone(&cancel))?;
    let create = start.elapsed();
    spinner.finish_and_clear();
    if cancel.load(Ordering::Relaxed) {
        return Err(Failure::new(
            exit::FAILED,
            "interrupted: no clone was started",
        ));
    }
    let demo = Demo {
        options: CloneOptions {
            overcommit: false,
            host_check: crate::machine::HostCheck::Done,
            root: crate::clone::member::RootOptions::default(),
            program: std::env::current_exe().map_err(|error| Failure::of(&error))?,
            template: scratch.dir.clone(),
            name: template.name(),
            engine: args.engine,
            pager,
            verbosity,
            measure_memory: true,
        },
        clones: usize::try_from(args.clones).unwrap_or(usize::MAX),
        parallel: args.parallel.map_or_else(default_parallel, |n| n as usize),
        metrics: address,
        cancel,
    };
    let bar = progress::bar(args.clones.into(), "clones verified").with_prefix("clones");
    let finished = demo.run(template, create, &mut |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    if finished.interrupted {
        finished.finish()?;
        return Err(Failure::new(
            exit::FAILED,
            "interrupted: all clones were ended",
        ));
    }
    let finished = if args.hold { hold(finished)? } else { finished };
    show(args, &finished.finish()?)
}

fn default_parallel() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Keeps everything up until a signal comes.
fn hold(mut finished: Finished) -> Result<Finished, Failure> {
    note!(
        "{} clones verified; holding them and the metrics until interrupted",
        finished.result.verified
    );
    loop {
        let events = finished
            .supervisor
            .wait(Duration::from_secs(1))
            .map_err(|error| Failure::of(&error))?;
        for event in events {
            match event {
                Event::Signal => return Ok(finished),
                Event::Output(clone) | Event::Ended(clone) => {
                    finished.supervisor.discard_console(clone);
                }
                Event::Started(_) => (),
            }
        }
    }
}

fn show(args: &DemoArgs, result: &DemoResult) -> Result<u8, Failure> {
    if args.json {
        let text = serde_json::to_string_pretty(result).map_err(|error| Failure::of(&error))?;
        say!("{text}");
    } else {
        print_tables(args, result);
    }
    for failure in &result.failures {
        note!("pando: clone {}: {}", failure.clone, failure.message);
    }
    if !result.template.unchanged {
        return Err(Failure::new(
            exit::FAILED,
            "the template's RAM changed while clones ran",
        ));
    }
    if result.verified < result.clones || !result.failures.is_empty() {
        let text = format!(
            "{} of {} clones were verified",
            result.verified, result.clones
        );
        let worst = result.failures.iter().map(|failure| failure.code).max();
        return Err(Failure::new(worst.unwrap_or(exit::FAILED), text));
    }
    Ok(exit::OK)
}

fn print_tables(args: &DemoArgs, result: &DemoResult) {
    let template = &result.template;
    say!(
        "template  {} of RAM, {} of data, made in {:.0} ms",
        human_bytes(template.memory_bytes),
        human_bytes(template.data_pages * 4096),
        template.create_ms
    );
    say!(
        "clones    {} of {} verified, engine {}, {} starting at once, pages read by {}, all in {:.0} ms",
        result.verified,
        result.clones,
        result.engine,
        result.parallel,
        result.io,
        result.all_verified_ms
    );
    let mut start = table(&["start, stage", "clones", "p50", "p90", "p99", "max"]);
    for (stage, p) in &result.start {
        let cells = [p.p50_us, p.p90_us, p.p99_us, p.max_us].map(human_us);
        start.add_row([vec![stage.clone(), p.count.to_string()], cells.into()].concat());
    }
    say!("\n{start}");
    if !result.pager.fault_us.is_empty() {
        let header = [
            "faults, served from",
            "faults",
            "p50",
            "p90",
            "p99",
            "max",
            "pages installed",
        ];
        let mut faults = table(&header);
        for (source, p) in &result.pager.fault_us {
            let pages = result
                .pager
                .installed_pages
                .get(source)
                .copied()
                .unwrap_or(0);
            let cells = [p.p50_us, p.p90_us, p.p99_us, p.max_us].map(human_us);
            let row = [
                vec![source.clone(), p.count.to_string()],
                cells.into(),
                vec![pages.to_string()],
            ];
            faults.add_row(row.concat());
        }
        say!("\n{faults}");
    }
    let memory = &result.memory;
    let mut rows = table(&["memory of a clone, all alive", "bytes"]);
    for (what, bytes) in [
        ("private (median)", memory.private_bytes_p50),
        ("proportional (median)", memory.proportional_bytes_p50),
        ("resident (median)", memory.resident_bytes_p50),
        (
            "fall of MemAvailable, kernel included",
            memory.available_fell_bytes,
        ),
    ] {
        rows.add_row([what.to_owned(), human_bytes(bytes)]);
    }
    say!("\n{rows}");
    let verdict = if template.unchanged {
        "unchanged"
    } else {
        "CHANGED"
    };
    say!("template {verdict}: {}", template.digest_after.join(", "));
    if args.template.is_some() {
        say!("kept in {}", template.dir);
    }
    say!("metrics were served at http://{}/metrics", result.metrics);
}

/// What pagers did, as JSON.
pub fn pager_document(stats: &PagerStats) -> serde_json::Value {
    serde_json::to_value(PagerFacts::from(stats)).unwrap_or_default()
}

/// Where the demonstration's template lives.
#[derive(Debug)]
struct Scratch {
    dir: PathBuf,
    /// Removed with what is in it when this is dropped; by a later run if this one is killed.
    _temporary: Option<LockedDir>,
}

impl Scratch {
    fn new(wanted: Option<PathBuf>) -> Result<Self, Failure> {
        if let Some(dir) = wanted {
            return Ok(Self {
                dir,
                _temporary: None,
            });
        }
        let base = std::env::temp_dir();
        let prefix = OsStr::new("pando-demo-");
        LockedDir::sweep(&base, prefix)?;
        let temporary = LockedDir::create(&base, prefix)?;
        Ok(Self {
            dir: temporary.path().join("demo"),
            _temporary: Some(temporary),
        })
    }
}
