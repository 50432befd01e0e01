#![forbid(unsafe_code)]
//! `pando-bench pager`: one pager under many clones that fault at once; where its thread is best
//! placed; what installing ahead, zero pages and metrics take. Without KVM, beside the most that
//! memory can be filled at in the same run.

mod ahead;
mod report;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pando_pager::PAGE_BYTES;
use serde::Serialize;

use crate::cli::PagerArgs;
use crate::fault::load::{Content, Load, Order};
use crate::fault::touch::{Access, Engine, PagerSetup, Placement, Subject};
use crate::fault::{Group, Way, bulk_rates, compare};
use crate::host::Host;
use crate::stats::{Measured, Paired, Runner, Variant, paired};
use crate::sys::bulk;
use crate::targets::Target;

/// Images are touched by halves, and bulk calls are whole.
const IMAGE_UNIT_BYTES: u64 = 2 * bulk::ZERO_BYTES as u64;
/// Pages that one clone touches where hand-overs are compared.
const PAGES_OF_ONE: u64 = 2048;
/// Pages touched in a short round with or without metrics.
const PAGES_OF_A_PAIR: u64 = 1024;

/// All figures of a run.
#[derive(Debug, Serialize)]
struct Pagers {
    memory_bytes: u64,
    /// Ways to hand a fault over, with one clone.
    hand_over: Group,
    /// Many clones of one pager, by placement; the first way of each is the fewest clones.
    many: Vec<Many>,
    /// Metrics off, and on over off.
    metrics: Paired,
    /// Memory installed ahead, and filled in bulk; a sample is the time of a page.
    ahead: Vec<Measured>,
    /// Zero pages read one after the other.
    zero: Group,
    targets: Vec<Target>,
}

/// Many clones of one pager.
#[derive(Debug, Serialize)]
struct Many {
    placement: Placement,
    spin_us: u64,
    cold: bool,
    group: Group,
}

/// Runs the benchmark and prints its report.
pub(crate) fn run(args: &PagerArgs) -> Result<()> {
    ensure!(
        args.memory > 0 && args.memory.is_multiple_of(IMAGE_UNIT_BYTES),
        "an image of {} bytes: give a multiple of {IMAGE_UNIT_BYTES}",
        args.memory
    );
    let host = Host::probe()?;
    let subject = Subject::make(args.memory, args.dir.as_deref())?;
    let bench = Bench {
        args,
        subject,
        runner: Runner {
            rounds: args.rounds.get(),
            warm_up_rounds: 1,
        },
        half: args.memory / PAGE_BYTES / 2,
    };
    let mut pagers = Pagers {
        memory_bytes: args.memory,
        hand_over: bench.hand_over()?,
        many: bench.many()?,
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
    runner: Runner,
    /// Pages of data, and of hole.
    half: u64,
}

impl Bench<'_> {
    /// Placements of the pager's thread, and how long it looks before it sleeps.
    fn placements(&self) -> Vec<(Placement, u64)> {
        let mut all = vec![(Placement::Free, 0), (Placement::Same, 0)];
        all.extend(
            self.args
                .spin_us
                .iter()
                .map(|&spin| (Placement::Free, spin)),
        );
        if self.subject.has_other_cpu() {
            all.push((Placement::Other, 0));
            all.extend(
                self.args
                    .spin_us
                    .iter()
                    .map(|&spin| (Placement::Other, spin)),
            );
        }
        all
    }

    fn hand_over(&self) -> Result<Group> {
        let load = Load::one(Content::Data, Order::Random, PAGES_OF_ONE.min(self.half));
        let mut ways = Vec::new();
        for (placement, spin_us) in self.placements() {
            ways.push(way(
                name(placement, spin_us),
                load,
                placement,
                spin_us,
                false,
            ));
        }
        let title = "hand-over of a fault, one clone, at random".to_owned();
        compare(&self.subject, self.runner, title, &ways)
    }

    fn many(&self) -> Result<Vec<Many>> {
        let mut all = Vec::new();
        for cold in [false, true] {
            if cold && self.args.no_cold {
                continue;
            }
            for (placement, spin_us) in self.placements() {
                let ways: Vec<Way> = self
                    .args
                    .clones
                    .iter()
                    .map(|clones| {
                        let load = Load {
                            clones: clones.get(),
                            ..Load::one(
                                Content::Data,
                                Order::Random,
                                self.args.pages.get().min(self.half),
                            )
                        };
                        let name = format!("{clones} clones");
                        way(name, load, placement, spin_us, cold)
                    })
                    .collect();
                let cache = if cold {
                    "not in the page cache"
                } else {
                    "in the page cache"
                };
                let title = format!(
                    "clones of one pager at once, at random, {cache}, {}",
                    name(placement, spin_us)
                );
                let group = compare(&self.subject, self.runner, title, &ways)?;
                all.push(Many {
                    placement,
                    spin_us,
                    cold,
                    group,
                });
            }
        }
        Ok(all)
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
            let subject = &self.subject;
            let half = self.half;
            Variant::new(name, move || {
                ahead::install(subject, half, run_pages, verify).map(|page| vec![page])
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
        let load = Load::one(Content::Zero, Order::Sequential, self.half);
        let one = way(
            "zero pages, same CPU".to_owned(),
            load,
            Placement::Same,
            0,
            false,
        );
        let title = "zero pages read in sequence".to_owned();
        compare(&self.subject, self.runner, title, &[one])
    }
}

fn way(name: String, load: Load, placement: Placement, spin_us: u64, cold: bool) -> Way {
    let setup = PagerSetup {
        spin_us,
        ..PagerSetup::on(placement)
    };
    Way {
        name,
        load,
        engine: Engine::Copy(setup),
        access: Access::Read,
        cold,
    }
}

fn name(placement: Placement, spin_us: u64) -> String {
    let place = match placement {
        Placement::Same => "same CPU",
        Placement::Other => "other CPU",
        Placement::Free => "scheduler's choice",
    };
    match spin_us {
        0 => format!("{place}, sleeps at once"),
        us => format!("{place}, looks for {us} us"),
    }
}
