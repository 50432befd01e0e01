#![forbid(unsafe_code)]
//! `pando-bench density`: how many clones of one template are alive at once, each with pages of its
//! own that it has written and verified; what one more takes; and that all of it is given back.

mod report;
mod slope;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::host::raise_descriptor_limit;
use pando_vmm::observe::memory::clone::{CloneMemory, MemoryTotal};
use pando_vmm::observe::memory::marginal::MarginalCost;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Pattern, Visit};
use serde::Serialize;

use crate::cli::{DensityArgs, PagerPlaceArg};
use crate::clone::subject::Subject;
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::floor::{Grown, Root};
use crate::footprint::{Footprint, Left, adopt_orphans};
use crate::grove::{Grove, GroveOptions, echo, verify, write_and_verify};
use crate::host::{Host, settled_memory_bytes};
use crate::program::program;
use crate::targets::Target;
use slope::Slope;

/// What a clone writes its pages with is this plus its number.
const OWN_SALT: u64 = 0xd0_0000;
/// Pages of the template that each clone verifies.
const TEMPLATE_PAGES: u64 = 16;

/// All figures of a run.
#[derive(Debug, Serialize)]
struct Density {
    memory_bytes: u64,
    own_pages: u64,
    parallel: u32,
    floor: Vec<Floor>,
    engines: Vec<Forest>,
    targets: Vec<Target>,
}

/// The floor, once.
#[derive(Debug, Serialize)]
struct Floor {
    grown: Grown,
    /// See [`Slope`]; bytes of one more clone.
    slope: Option<Slope>,
}

/// Clones of one engine, grown to the highest number and felled.
#[derive(Debug, Serialize)]
struct Forest {
    engine: Engine,
    steps: Vec<Step>,
    /// From all steps together.
    slope: Option<Slope>,
    /// What the supervisor found while they started.
    live: Option<MarginalCost>,
    /// The sum of what each clone takes, by class, with all alive.
    memory: MemoryTotal,
    /// Answers that were compared and right.
    right_answers: u64,
    wrong: u64,
    complaints: Vec<String>,
    /// Memory that all took, the root included.
    taken_bytes: f64,
    left: Left,
    stop_ns: u64,
}

/// One number of clones alive at once.
#[derive(Debug, Clone, Copy, Serialize)]
struct Step {
    alive: u32,
    started: u32,
    /// From the request of the first of these to the last one's last answer.
    wall_ns: u64,
    available_bytes: u64,
}

/// Runs the benchmark and prints its report. An error if a clone was wrong or something is left.
pub(crate) fn run(args: &DensityArgs) -> Result<()> {
    let mut counts: Vec<u32> = args.counts.iter().map(|count| count.get()).collect();
    counts.sort_unstable();
    counts.dedup();
    ensure!(
        args.pages.get() <= DATA_PAGES,
        "--pages {}: clones write among {DATA_PAGES} pages",
        args.pages
    );
    raise_descriptor_limit();
    adopt_orphans()?;
    let host = Host::probe()?;
    let cpus = u32::try_from(host.cpus).unwrap_or(u32::MAX);
    let subject = Subject::make(args.memory, args.dir.as_deref())?;
    let bench = Bench {
        args,
        program: program(args.pando.as_deref())?,
        subject,
        counts,
        parallel: args.parallel.map_or(2 * cpus, std::num::NonZeroU32::get),
    };
    let (mut floors, mut engines) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds.get() {
        floors.push(bench.floor()?);
        for &engine in &args.engines {
            engines.push(
                bench
                    .forest(engine)
                    .with_context(|| format!("engine {engine}"))?,
            );
        }
    }
    let mut density = Density {
        memory_bytes: args.memory,
        own_pages: args.pages.get(),
        parallel: bench.parallel,
        floor: floors,
        engines,
        targets: Vec::new(),
    };
    density.targets = report::targets(&density);
    let wrong: Vec<String> = density.engines.iter().flat_map(Forest::faults).collect();
    report::report(host, density).print(args.json)?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

impl Forest {
    /// What makes the run fail.
    fn faults(&self) -> Vec<String> {
        let named = |text: String| format!("engine {}: {text}", self.engine);
        let complaints = self.complaints.iter().cloned();
        complaints
            .chain(self.left.complaints())
            .map(named)
            .collect()
    }
}

/// A run.
#[derive(Debug)]
struct Bench<'a> {
    args: &'a DensityArgs,
    program: PathBuf,
    subject: Subject,
    counts: Vec<u32>,
    parallel: u32,
}

impl Bench<'_> {
    fn floor(&self) -> Result<Floor> {
        // Made for each round, so that its memory is not held while engines are measured.
        let grown = Root::new(self.args.memory, true)?.grow(&self.counts)?;
        let levels = grown
            .steps
            .iter()
            .map(|step| (step.alive, step.available_bytes));
        Ok(Floor {
            slope: Slope::through(grown.before_bytes, levels),
            grown,
        })
    }

    fn forest(&self, engine: Engine) -> Result<Forest> {
        let mut options = GroveOptions::new(self.program.clone(), self.subject.dir.clone(), engine);
        options.cgroups = self.args.cgroups;
        options.pager.place = PagerPlaceArg::place(Some(self.args.pager), 2);
        let mut grove = Grove::new(options)?;
        let before = Footprint::take()?;
        grove.prepare()?;
        // Without the root: it is there once, however many clones there are.
        let prepared_bytes = settled_memory_bytes()?;
        let mut steps = Vec::new();
        for &count in &self.counts {
            steps.push(self.step(&mut grove, count)?);
        }
        // Once more, when all the others have written.
        for number in grove.live() {
            let again = verify(self.own(number), OWN_SALT + number as u64);
            grove.ask(number, vec![again]);
        }
        grove.all_answer()?;
        let live = grove.supervisor.usage().marginal();
        let memory = measure(&mut grove);
        let alive_bytes = settled_memory_bytes()?;
        let right_answers = grove.right_answers();
        let begun = Instant::now();
        grove.stop_all()?;
        let stop_ns = nanoseconds(begun);
        let (wrong, complaints) = grove.take_wrong();
        // With the supervisor ends what serves its clones.
        drop(grove);
        let left = before.left()?;
        let levels = steps.iter().map(|step| (step.alive, step.available_bytes));
        Ok(Forest {
            engine,
            slope: Slope::through(prepared_bytes, levels),
            steps,
            live,
            memory,
            right_answers,
            wrong,
            complaints,
            taken_bytes: before.available_bytes() as f64 - alive_bytes as f64,
            left,
            stop_ns,
        })
    }

    /// Starts clones until `count` are alive and have answered everything.
    fn step(&self, grove: &mut Grove, count: u32) -> Result<Step> {
        let (wanted, parallel) = (count as usize, self.parallel as usize);
        let before = grove.supervisor.clones().len();
        let begun = Instant::now();
        grove.until("clones are started", |grove| {
            let mut number = grove.supervisor.clones().len();
            while grove.owing() < parallel && number < wanted {
                grove.start(self.work(number));
                number += 1;
            }
            number == wanted && grove.owing() == 0
        })?;
        Ok(Step {
            alive: u32::try_from(grove.live().len())?,
            started: u32::try_from(wanted - before)?,
            wall_ns: nanoseconds(begun),
            available_bytes: settled_memory_bytes()?,
        })
    }

    /// Says a word, reads pages of the template, writes its own and verifies them.
    fn work(&self, number: usize) -> Vec<pando_vmm::demo::plan::Step> {
        let template = Visit {
            first_page: LAYOUT.first_data_page + DATA_PAGES / 2,
            range_pages: DATA_PAGES / 2,
            count: TEMPLATE_PAGES,
            // The same for all: a clone that reads other pages than the one before it is another test.
            pattern: Pattern::Sequential,
        };
        let mut steps = vec![echo(number as u64), verify(template, TEMPLATE_SALT)];
        steps.extend(write_and_verify(self.own(number), OWN_SALT + number as u64));
        steps
    }

    /// The pages of a clone: one after the other, as the floor's; each clone at another place.
    fn own(&self, number: usize) -> Visit {
        let pages = self.args.pages.get();
        let places = (DATA_PAGES / 2).saturating_sub(pages).max(1);
        Visit::all(LAYOUT.first_data_page + (number as u64 * 7) % places, pages)
    }
}

/// The memory of every clone, by class.
fn measure(grove: &mut Grove) -> MemoryTotal {
    let live = grove.live();
    let measured: Vec<CloneMemory> = live
        .into_iter()
        .filter_map(|number| grove.supervisor.measure_clone(number))
        .collect();
    MemoryTotal::of(measured.iter())
}

fn nanoseconds(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
