//! `pando-bench fault`: what a page that is touched takes, with the pager alone (no KVM), beside
//! the kernel's own mapping and the most that memory can be filled at, in the same run.

pub(crate) mod load;
pub(crate) mod report;
pub(crate) mod touch;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use pando_pager::{Counts, PAGE_BYTES};
use serde::Serialize;

use crate::cli::FaultArgs;
use crate::host::Host;
use crate::stats::{Measured, Runner, Summary, Variant};
use crate::sys::bulk;
use crate::targets::Target;
use load::{Content, Load, Order};
use touch::{Access, Engine, PagerSetup, Placement, Round, Subject};

/// Images are touched by halves, and bulk calls are whole.
const IMAGE_UNIT_BYTES: u64 = 2 * bulk::ZERO_BYTES as u64;
/// All figures of a run.
#[derive(Debug, Serialize)]
struct Faults {
    memory_bytes: u64,
    groups: Vec<Group>,
    /// Time of a page where memory is filled in bulk.
    bulk: Vec<Measured>,
    targets: Vec<Target>,
}

/// What is compared with one another: the first is the baseline.
#[derive(Debug, Serialize)]
pub(crate) struct Group {
    pub(crate) title: String,
    pub(crate) ways: Vec<Figures>,
}

/// Figures of one way to touch pages.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) load: Load,
    engine: Engine,
    access: Access,
    cold: bool,
    /// Time of a page: from the first touch to the last, by the pages; a sample a round.
    pub(crate) page: Measured,
    /// Each touch, from the toucher's side; where pages are installed ahead most do not fault.
    pub(crate) touch: Summary,
    /// Processor time of a page, of all threads together, in nanoseconds; the median of rounds.
    pub(crate) processor_ns: u64,
    /// Faults that the pager had, in a second of all rounds; 0 without a pager.
    pub(crate) faults_per_second: f64,
    pub(crate) pages_per_second: f64,
    /// What the pagers of all rounds did.
    pub(crate) pager: BTreeMap<&'static str, u64>,
}

/// One way to touch pages, before it was measured.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    pub(crate) name: String,
    pub(crate) load: Load,
    pub(crate) engine: Engine,
    pub(crate) access: Access,
    /// Whether the image is dropped from the page cache before each round.
    pub(crate) cold: bool,
}

/// Runs the benchmark and prints its report.
pub(crate) fn run(args: &FaultArgs) -> Result<()> {
    ensure!(
        args.memory > 0 && args.memory.is_multiple_of(IMAGE_UNIT_BYTES),
        "an image of {} bytes: give a multiple of {IMAGE_UNIT_BYTES}",
        args.memory
    );
    let host = Host::probe()?;
    let subject = Subject::make(args.memory, args.dir.as_deref())?;
    let runner = Runner {
        rounds: args.rounds.get(),
        warm_up_rounds: 1,
    };
    let groups = groups(args, subject.has_other_cpu())
        .into_iter()
        .map(|(title, ways)| compare(&subject, runner, title, &ways))
        .collect::<Result<_>>()?;
    let mut faults = Faults {
        memory_bytes: args.memory,
        groups,
        bulk: bulk_rates(args.memory / 2, runner)?,
        targets: Vec::new(),
    };
    faults.targets = report::targets(&faults);
    report::report(host, faults).print(args.json)
}

/// What is compared with what.
fn groups(args: &FaultArgs, other_cpu: bool) -> Vec<(String, Vec<Way>)> {
    let half = args.memory / PAGE_BYTES / 2;
    let pages = args.pages.get().min(half);
    let mut groups = Vec::new();
    for (content, order, title) in [
        (Content::Data, Order::Random, "pages with data, at random"),
        (
            Content::Data,
            Order::Sequential,
            "pages with data, in sequence",
        ),
        (Content::Zero, Order::Random, "zero pages, at random"),
        (Content::Zero, Order::Sequential, "zero pages, in sequence"),
    ] {
        let load = Load::one(content, order, pages);
        groups.push((title.to_owned(), ways_of(load, args.spin_us, other_cpu)));
    }
    let random = Load::one(Content::Data, Order::Random, pages);
    let free = |name: String, load| Way {
        name,
        load,
        engine: Engine::Copy(PagerSetup::on(Placement::Free)),
        access: Access::Read,
        cold: false,
    };
    let by_threads = args.threads.iter().map(|&threads| {
        let threads = threads.get();
        free(format!("{threads} threads"), Load { threads, ..random })
    });
    groups.push((
        "threads that touch one memory, at random".to_owned(),
        by_threads.collect(),
    ));
    groups
}

/// The ways for one thread, the kernel's first.
fn ways_of(load: Load, spin_us: u64, other_cpu: bool) -> Vec<Way> {
    let way = |name: &str, engine, access| Way {
        name: name.to_owned(),
        load,
        engine,
        access,
        cold: false,
    };
    let copy = |name: &str, setup| way(name, Engine::Copy(setup), Access::Read);
    let same = PagerSetup::on(Placement::Same);
    let mut ways = vec![
        way("kernel, read", Engine::Kernel, Access::Read),
        way("kernel, written", Engine::Kernel, Access::Write),
        copy(report::SAME_CPU, same),
        copy("copy, free", PagerSetup::on(Placement::Free)),
    ];
    if other_cpu {
        let other = PagerSetup::on(Placement::Other);
        let spinning = PagerSetup { spin_us, ..other };
        ways.push(copy("copy, other CPU", other));
        ways.push(copy("copy, other CPU, spinning", spinning));
    }
    if load.content == Content::Data {
        let unverified = PagerSetup {
            verify: false,
            ..same
        };
        let pread = PagerSetup {
            pread: true,
            ..same
        };
        ways.push(copy("copy, same CPU, not verified", unverified));
        ways.push(copy("copy, same CPU, pread", pread));
    }
    ways
}

/// Measures ways in turns.
pub(crate) fn compare(
    subject: &Subject,
    runner: Runner,
    title: String,
    ways: &[Way],
) -> Result<Group> {
    let kept: Vec<RefCell<Vec<Round>>> = ways.iter().map(|_| RefCell::default()).collect();
    let mut variants: Vec<Variant<'_>> = ways
        .iter()
        .zip(&kept)
        .map(|(way, kept)| {
            Variant::new(way.name.clone(), move || {
                let seed = kept.borrow().len() as u64;
                if way.cold {
                    subject.make_cold()?;
                }
                let round = subject.round(way.engine, way.access, &way.load, seed)?;
                let touched = u32::try_from(round.touches.len()).unwrap_or(u32::MAX);
                let page = round.wall / touched.max(1);
                kept.borrow_mut().push(round);
                Ok(vec![page])
            })
        })
        .collect();
    let measured = runner
        .run(&mut variants)
        .with_context(|| format!("group {title:?}"))?;
    drop(variants);
    let warm_up = runner.warm_up_rounds as usize;
    let ways = measured
        .into_iter()
        .zip(ways)
        .zip(kept)
        .map(|((page, way), kept)| {
            let rounds = kept.into_inner().split_off(warm_up);
            figures(page, way, &rounds)
        })
        .collect::<Result<_>>()?;
    Ok(Group { title, ways })
}

fn figures(page: Measured, way: &Way, rounds: &[Round]) -> Result<Figures> {
    let touches: Vec<Duration> = rounds
        .iter()
        .flat_map(|round| round.touches.iter().copied())
        .collect();
    let seconds: f64 = rounds.iter().map(|round| round.wall.as_secs_f64()).sum();
    let mut pager = BTreeMap::new();
    for round in rounds {
        for (name, count) in named(&round.counts) {
            *pager.entry(name).or_default() += count;
        }
    }
    let processor: Vec<Duration> = rounds
        .iter()
        .map(|round| {
            let touched = u32::try_from(round.touches.len()).unwrap_or(u32::MAX);
            round.processor / touched.max(1)
        })
        .collect();
    Ok(Figures {
        load: way.load,
        cold: way.cold,
        processor_ns: Summary::of(&processor)?.p50_ns,
        engine: way.engine,
        access: way.access,
        page,
        faults_per_second: pager["faults"] as f64 / seconds,
        pages_per_second: touches.len() as f64 / seconds,
        touch: Summary::of(&touches)?,
        pager,
    })
}

fn named(counts: &Counts) -> [(&'static str, u64); 8] {
    [
        ("faults", counts.faults),
        ("faults_joined", counts.faults_joined),
        ("faults_stale", counts.faults_stale),
        ("pages_zero", counts.pages_zero),
        ("pages_cache", counts.pages_cache),
        ("pages_disk", counts.pages_disk),
        ("reads", counts.reads),
        ("bytes_read", counts.bytes_read),
    ]
}

/// The most that `bytes` can be filled at; a sample is the time of a page.
pub(crate) fn bulk_rates(bytes: u64, runner: Runner) -> Result<Vec<Measured>> {
    let pages = u32::try_from(bytes / PAGE_BYTES).context("too large an image")?;
    let length = usize::try_from(bytes)?;
    let source = bulk::source(length)?;
    let mut destination = MmapMut::map_anon(length)?;
    destination.fill(1);
    let mut variants = [
        Variant::new(report::MEMCPY, || {
            Ok(vec![bulk::memcpy(&source, &mut destination) / pages])
        }),
        Variant::new(report::COPY, || Ok(vec![bulk::copy(&source)? / pages])),
        Variant::new(report::ZEROPAGE, || Ok(vec![bulk::zero(length)? / pages])),
    ];
    runner.run(&mut variants)
}
