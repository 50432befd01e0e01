#![forbid(unsafe_code)]
//! `pando-bench pager`: one pager under many clients that fault at once, each a process of its own;
//! where its threads are best placed; what installing ahead, zero pages and metrics take. Without KVM,
//! beside the most that memory can be filled at in the same run.

mod ahead;
pub(crate) mod client;
mod report;
mod shared;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pando_pager::PAGE_BYTES;
use serde::Serialize;

use crate::cli::PagerArgs;
use crate::fault::load::{Content, Load, Order};
use crate::fault::touch::{Access, Engine, PagerSetup, Placement, Subject};
use crate::fault::{Group, Way, bulk_rates, compare};
use crate::host::Host;
use crate::stats::{Measured, Paired, Runner, Summary, Variant, paired};
use crate::sys::bulk;
use crate::targets::Target;
use shared::{Clients, Place, Round, Setup};

/// Images are touched by halves, and bulk calls are whole.
const IMAGE_UNIT_BYTES: u64 = 2 * bulk::ZERO_BYTES as u64;
/// Pages that a client touches alone where hand-overs are compared.
const PAGES_OF_ONE: u64 = 1024;
/// Pages touched in a short round with or without metrics.
const PAGES_OF_A_PAIR: u64 = 1024;

/// All figures of a run.
#[derive(Debug, Serialize)]
struct Pagers {
    memory_bytes: u64,
    /// Ways to hand a fault over.
    setups: Vec<Served>,
    /// Metrics off, and on over off.
    metrics: Paired,
    /// Memory installed ahead, and filled in bulk; a sample is the time of a page.
    ahead: Vec<Measured>,
    /// Zero pages read one after the other.
    zero: Group,
    targets: Vec<Target>,
}

/// Clients of one pager, set up in one way.
#[derive(Debug, Serialize)]
struct Served {
    setup: Setup,
    cold: bool,
    /// One for each number of clients, in rising order.
    loads: Vec<Figures>,
}

/// So many clients at once.
#[derive(Debug, Serialize)]
struct Figures {
    load: Load,
    /// Time of a page: first touch to last touch of all, by the pages; a sample a round.
    page: Measured,
    /// Each touch, from the client's side.
    touch: Summary,
    /// Processor time of a page, of pager and clients together, in nanoseconds; median of rounds.
    processor_ns: u64,
    faults_per_second: f64,
    faults: u64,
}

/// Runs the benchmark and prints its report.
pub(crate) fn run(args: &PagerArgs) -> Result<()> {
    ensure!(
        args.memory > 0 && args.memory.is_multiple_of(IMAGE_UNIT_BYTES),
        "an image of {} bytes: give a multiple of {IMAGE_UNIT_BYTES}",
        args.memory
    );
    ensure!(
        args.pages.get() <= client::MAX_PAGES,
        "--pages {}: {} are the most",
        args.pages,
        client::MAX_PAGES
    );
    let host = Host::probe()?;
    let subject = Subject::make(args.memory, args.dir.as_deref())?;
    let mut counts: Vec<u32> = args.clones.iter().map(|count| count.get()).collect();
    counts.sort_unstable();
    counts.dedup();
    let most = counts.last().copied().unwrap_or(1);
    let bench = Bench {
        args,
        clients: Clients::start(most, subject.cpus().to_vec())?,
        subject,
        counts,
        runner: Runner {
            rounds: args.rounds.get(),
            warm_up_rounds: 1,
        },
        half: args.memory / PAGE_BYTES / 2,
    };
    let mut pagers = Pagers {
        memory_bytes: args.memory,
        setups: bench.all_setups()?,
        metrics: bench.metrics()?,
        ahead: bench.ahead()?,
        zero: bench.zero()?,
        targets: Vec::new(),
    };
    pagers.targets = report::targets(&pagers);
    report::report(host, pagers).print(args.json)
}

/// A run.
#[derive(Debug)]
struct Bench<'a> {
    args: &'a PagerArgs,
    subject: Subject,
    clients: Clients,
    counts: Vec<u32>,
    runner: Runner,
    /// Pages of data, and of hole.
    half: u64,
}

impl Bench<'_> {
    /// Placements of the pager's threads, and how long each looks before it sleeps.
    fn setups(&self) -> Vec<Setup> {
        let places = match self.clients.cpus() {
            0 | 1 => vec![Place::OneFree],
            _ => vec![
                Place::OneFree,
                Place::OneSame,
                Place::OneOther,
                Place::EachFree,
                Place::EachTogether,
            ],
        };
        let looks = std::iter::once(0).chain(self.args.spin_us.iter().copied());
        let mut all = Vec::new();
        for spin_us in looks {
            all.extend(places.iter().map(|&place| Setup {
                place,
                spin_us,
                metrics: false,
            }));
        }
        all
    }

    fn all_setups(&self) -> Result<Vec<Served>> {
        let mut all = Vec::new();
        for cold in [false, true] {
            if cold && self.args.no_cold {
                continue;
            }
            for setup in self.setups() {
                let named = || format!("{}, looking for {} us", setup.place.name(), setup.spin_us);
                all.push(self.served(setup, cold).with_context(named)?);
            }
        }
        Ok(all)
    }

    /// All numbers of clients, in turns.
    fn served(&self, setup: Setup, cold: bool) -> Result<Served> {
        let load = |&clones: &u32| {
            let pages = if clones == 1 {
                PAGES_OF_ONE
            } else {
                self.args.pages.get()
            };
            Load {
                clones,
                ..Load::one(Content::Data, Order::Random, pages.min(self.half))
            }
        };
        let loads: Vec<Load> = self.counts.iter().map(load).collect();
        let kept: Vec<_> = loads
            .iter()
            .map(|_| std::cell::RefCell::new(Vec::<Round>::new()))
            .collect();
        let mut variants: Vec<Variant<'_>> = loads
            .iter()
            .zip(&kept)
            .map(|(load, kept)| {
                Variant::new(format!("{} clones", load.clones), move || {
                    if cold {
                        self.subject.make_cold()?;
                    }
                    let seed = kept.borrow().len() as u64;
                    let round = self.clients.round(&self.subject, setup, load, seed)?;
                    let page = by_page(round.wall, &round);
                    kept.borrow_mut().push(round);
                    Ok(vec![page])
                })
            })
            .collect();
        let measured = self.runner.run(&mut variants)?;
        drop(variants);
        let warm_up = self.runner.warm_up_rounds as usize;
        let loads = measured
            .into_iter()
            .zip(loads)
            .zip(kept)
            .map(|((page, load), kept)| figures(page, load, &kept.into_inner()[warm_up..]))
            .collect::<Result<_>>()?;
        Ok(Served { setup, cold, loads })
    }

    fn metrics(&self) -> Result<Paired> {
        let pages = PAGES_OF_A_PAIR.min(self.half);
        let load = Load::one(Content::Data, Order::Random, pages);
        let round = |metrics| -> Result<Duration> {
            let setup = PagerSetup {
                metrics,
                ..PagerSetup::on(Placement::Same)
            };
            let round = self
                .subject
                .round(Engine::Copy(setup), Access::Read, &load, 1)?;
            Ok(round.wall / u32::try_from(pages).unwrap_or(u32::MAX))
        };
        // The first of all pays for what is made once.
        round(true)?;
        paired(self.args.pairs.get(), || round(false), || round(true)).context("metrics")
    }

    /// In turns: what is installed ahead, and what can be filled at most.
    fn ahead(&self) -> Result<Vec<Measured>> {
        let bytes = self.half * PAGE_BYTES;
        let pages = u32::try_from(self.half)?;
        let source = bulk::source(usize::try_from(bytes)?)?;
        let ahead = |name: &str, verify, run_pages| {
            let (subject, half) = (&self.subject, self.half);
            Variant::new(name, move || {
                Ok(vec![ahead::install(subject, half, run_pages, verify)?])
            })
        };
        let mut variants = [
            Variant::new(report::COPY, || Ok(vec![bulk::copy(&source)? / pages])),
            ahead(report::AHEAD, true, u64::MAX),
            ahead("installed ahead, runs of 16 pages", true, 16),
            ahead("installed ahead, not verified", false, u64::MAX),
        ];
        let mut measured = self.runner.run(&mut variants)?;
        drop(variants);
        measured.extend(bulk_rates(bytes, self.runner)?);
        Ok(measured)
    }

    fn zero(&self) -> Result<Group> {
        let way = Way {
            name: "zero pages, pager on the same CPU".to_owned(),
            load: Load::one(Content::Zero, Order::Sequential, self.half),
            engine: Engine::Copy(PagerSetup::on(Placement::Same)),
            access: Access::Read,
            cold: false,
        };
        let title = "zero pages read in sequence".to_owned();
        compare(&self.subject, self.runner, title, &[way])
    }
}

fn by_page(time: Duration, round: &Round) -> Duration {
    time / u32::try_from(round.touches.len().max(1)).unwrap_or(u32::MAX)
}

fn figures(page: Measured, load: Load, rounds: &[Round]) -> Result<Figures> {
    let touches: Vec<Duration> = rounds
        .iter()
        .flat_map(|round| round.touches.iter().copied())
        .collect();
    let processor: Vec<Duration> = rounds
        .iter()
        .map(|round| by_page(round.processor, round))
        .collect();
    let seconds: f64 = rounds.iter().map(|round| round.wall.as_secs_f64()).sum();
    let faults = rounds.iter().map(|round| round.faults).sum();
    Ok(Figures {
        load,
        page,
        touch: Summary::of(&touches)?,
        processor_ns: Summary::of(&processor)?.p50_ns,
        faults_per_second: faults as f64 / seconds,
        faults,
    })
}
