//! `pando-bench clone`: what a clone takes, engine by engine, beside the floor in the same run.

mod fleet;
mod report;
pub(crate) mod subject;
pub(crate) mod workload;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pando_vmm::clone::control::{Io, PagerPlace};
use pando_vmm::demo::result::PagerFacts;
use serde::Serialize;

use crate::cli::{CloneArgs, PagerPlaceArg};
use crate::floor::{Root, Wave as FloorWave};
use crate::host::Host;
use crate::program::program;
use crate::stats::{Measured, Ratio, Runner, Summary, Variant};
use crate::targets::Target;
use fleet::{Fleet, Sample, Setup, Wave};
use subject::Subject;
use workload::Workload;

/// What the floor is called among the variants.
const FLOOR: &str = "floor";

/// All figures of a run.
#[derive(Debug, Serialize)]
struct Clones {
    memory_bytes: u64,
    data_pages: u64,
    /// Whether the template's RAM was dropped from the page cache before each start.
    cold: bool,
    workloads: Vec<Compared>,
    /// The pages written in sequence once more, with a working set that has them.
    recorded: Compared,
    floor_waves: Vec<FloorWave>,
    waves: Vec<Waves>,
    targets: Vec<Target>,
}

/// Variants that did the same.
#[derive(Debug, Serialize)]
struct Compared {
    workload: Workload,
    variants: Vec<Figures>,
    /// The floor, for the first output alone.
    floor: Option<Measured>,
}

/// What one variant took for one workload.
#[derive(Debug, Serialize)]
struct Figures {
    setup: Setup,
    #[serde(flatten)]
    measured: Measured,
    /// How it stands to the floor, where that was measured.
    over_floor: Option<Ratio>,
    /// Stages of the start, in order.
    stages: Vec<(String, Summary)>,
    /// What the guest's work took by the guest's clock.
    guest: Option<Summary>,
    /// What the pagers of all its clones did.
    pager: PagerFacts,
}

/// Clones of one variant that were alive at once.
#[derive(Debug, Serialize)]
struct Waves {
    setup: Setup,
    parallel: u32,
    waves: Vec<Wave>,
}

/// Runs the benchmark and prints its report.
pub(crate) fn run(args: &CloneArgs) -> Result<()> {
    let host = Host::probe()?;
    let program = program(args.pando.as_deref())?;
    let io: Vec<Io> = args.io.iter().map(|&io| io.into()).collect();
    let places: Vec<PagerPlace> = args
        .pager
        .iter()
        .map(|&place| PagerPlaceArg::place(Some(place), 2))
        .collect();
    let setups = Setup::all(&args.engines, &io, &places, args.no_verify);
    ensure!(!setups.is_empty(), "no engine to measure: give --engines");
    let subject = Subject::make(args.memory, args.dir.as_deref())?;
    let floor = Root::new(args.memory, true)?;
    let bench = Bench {
        args,
        program,
        setups,
        subject,
        floor,
    };
    let workloads = Workload::ALL
        .into_iter()
        .map(|workload| bench.compare(workload))
        .collect::<Result<Vec<_>>>()?;
    let (floor_waves, waves) = bench.waves()?;
    // Last: from now on the template has a working set, and its clones get it ahead.
    bench.subject.record(&bench.program, Workload::Sequential)?;
    let recorded = bench.compare(Workload::Sequential)?;
    let mut clones = Clones {
        memory_bytes: args.memory,
        data_pages: bench.subject.data_pages,
        cold: args.cold,
        workloads,
        recorded,
        floor_waves,
        waves,
        targets: Vec::new(),
    };
    clones.targets = report::targets(&clones);
    report::report(host, clones).print(args.json)
}

/// A run.
#[derive(Debug)]
struct Bench<'a> {
    args: &'a CloneArgs,
    program: PathBuf,
    setups: Vec<Setup>,
    subject: Subject,
    floor: Root,
}

impl Bench<'_> {
    fn fleet(&self, setup: Setup) -> Result<Fleet> {
        Fleet::new(self.program.clone(), &self.subject.dir, setup)
    }

    /// All variants do `workload` in turns.
    fn compare(&self, workload: Workload) -> Result<Compared> {
        let starts = self.args.starts.get();
        let states = self
            .setups
            .iter()
            .map(|&setup| Ok(RefCell::new((self.fleet(setup)?, Vec::new()))))
            .collect::<Result<Vec<RefCell<(Fleet, Vec<Sample>)>>>>()?;
        let mut variants: Vec<Variant<'_>> = self
            .setups
            .iter()
            .zip(&states)
            .map(|(setup, state)| {
                Variant::new(setup.name(), move || {
                    let (fleet, samples) = &mut *state.borrow_mut();
                    let before = samples.len();
                    for _ in 0..starts {
                        self.subject.warm_or_cold(self.args.cold)?;
                        // All variants see the same seeds.
                        let seed = samples.len() as u64;
                        samples.push(fleet.run_one(workload, seed)?);
                    }
                    let took = samples[before..].iter().map(|sample| sample.first_output);
                    Ok(took.collect())
                })
            })
            .collect();
        if workload == Workload::FirstOutput {
            variants.push(Variant::new(FLOOR, || {
                let started = (0..starts).map(|_| self.floor.start_one());
                started.map(|clone| Ok(clone?.total())).collect()
            }));
        }
        let runner = Runner {
            rounds: self.args.rounds.get(),
            warm_up_rounds: 0,
        };
        let mut measured = runner.run(&mut variants)?;
        drop(variants);
        let floor = (workload == Workload::FirstOutput)
            .then(|| measured.pop())
            .flatten();
        let variants = measured
            .into_iter()
            .zip(&self.setups)
            .zip(states)
            .map(|((measured, &setup), state)| {
                let (fleet, samples) = state.into_inner();
                Ok(Figures {
                    setup,
                    over_floor: floor.as_ref().map(|floor| measured.over(floor)),
                    measured,
                    stages: stages(&samples)?,
                    guest: self.subject.guest_times(&samples)?,
                    pager: PagerFacts::from(fleet.pager_stats()),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Compared {
            workload,
            variants,
            floor,
        })
    }

    /// All variants and the floor have many clones alive at once, in turns.
    fn waves(&self) -> Result<(Vec<FloorWave>, Vec<Waves>)> {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        let parallel = self.args.parallel.map_or(cpus, std::num::NonZeroU32::get);
        let mut floor = Vec::new();
        let mut all: Vec<Waves> = self
            .setups
            .iter()
            .map(|&setup| Waves {
                setup,
                parallel,
                waves: Vec::new(),
            })
            .collect();
        if self.args.count == 0 {
            return Ok((floor, Vec::new()));
        }
        for _ in 0..self.args.waves {
            floor.push(self.floor.start_wave(self.args.count)?);
            for one in &mut all {
                self.subject.warm_or_cold(self.args.cold)?;
                let fleet = self.fleet(one.setup)?;
                let wave = fleet
                    .run_wave(self.args.count, parallel)
                    .with_context(|| format!("variant {}", one.setup.name()))?;
                one.waves.push(wave);
            }
        }
        Ok((floor, all))
    }
}

/// Each stage over all samples, in the order of the first sample; what lies between the stages
/// (above all the guest's way to its first output) is the last.
fn stages(samples: &[Sample]) -> Result<Vec<(String, Summary)>> {
    let mut order: Vec<&str> = Vec::new();
    let mut by_name: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut rest = Vec::new();
    for sample in samples {
        let mut sum = Duration::ZERO;
        for (name, took) in &sample.stages {
            if !by_name.contains_key(name.as_str()) {
                order.push(name);
            }
            by_name.entry(name).or_default().push(*took);
            sum += *took;
        }
        rest.push(sample.first_output.saturating_sub(sum));
    }
    order
        .into_iter()
        .map(|name| Ok((name.to_owned(), Summary::of(&by_name[name])?)))
        .chain([Ok((
            "first output, and rest".to_owned(),
            Summary::of(&rest)?,
        ))])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_keep_their_order_and_the_rest_is_told() {
        let sample = |spawn, vm, total| Sample {
            first_output: Duration::from_micros(total),
            stages: vec![
                ("spawn".to_owned(), Duration::from_micros(spawn)),
                ("vm".to_owned(), Duration::from_micros(vm)),
            ],
            ticks: None,
        };
        let stages = stages(&[sample(1, 10, 15), sample(3, 10, 19)]).unwrap();
        let found: Vec<(&str, u64)> = stages
            .iter()
            .map(|(name, summary)| (name.as_str(), summary.p50_ns))
            .collect();
        assert_eq!(
            found,
            [
                ("spawn", 2_000),
                ("vm", 10_000),
                ("first output, and rest", 5_000)
            ]
        );
    }
}
