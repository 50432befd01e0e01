#![forbid(unsafe_code)]
//! `pando-bench soak`: clones under stress. All that they answer is compared, all that they hold must be
//! given back, and a run in which anything was wrong ends with an error.

mod generation;
mod giving;
mod isolation;
mod kills;
mod limits;
mod template;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::host::raise_descriptor_limit;
use serde::Serialize;

use crate::cli::{PagerPlaceArg, Scenario, SoakArgs};
use crate::clone::subject::Subject;
use crate::footprint::{Footprint, Left, adopt_orphans};
use crate::grove::{Grove, GroveOptions};
use crate::host::Host;
use crate::program::program;
use crate::report::{Report, TextTable, time};
use crate::seed::{Random, from_clock};

/// Memory that may be missing in the end, beside a share of what was taken: the kernel keeps some.
const MISSING_BYTES: f64 = 128e6;

/// All that was done.
#[derive(Debug, Serialize)]
struct Soak {
    seed: u64,
    memory_bytes: u64,
    trials: Vec<Trial>,
}

/// One scenario with one engine.
#[derive(Debug, Serialize)]
struct Trial {
    scenario: Scenario,
    engine: Engine,
    took_ns: u64,
    #[serde(flatten)]
    found: Found,
}

/// What a scenario came to.
#[derive(Debug, Default, Serialize)]
pub(super) struct Found {
    /// What was done, by name.
    pub(super) done: BTreeMap<&'static str, u64>,
    /// How often something was wrong.
    pub(super) wrong: u64,
    /// The first of it, in words.
    pub(super) complaints: Vec<String>,
    /// What was not given back.
    pub(super) left: Left,
}

/// What scenarios have in common.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    args: &'a SoakArgs,
    program: PathBuf,
    seed: u64,
    /// How many CPUs there are.
    cpus: usize,
}

impl Stage<'_> {
    /// A template of its own for one trial.
    pub(super) fn template(&self) -> Result<Subject> {
        Subject::make(self.args.memory, self.args.dir.as_deref())
    }

    /// How clones of `subject` are made.
    pub(super) fn options(&self, subject: &Subject, engine: Engine) -> GroveOptions {
        let mut options = GroveOptions::new(self.program.clone(), subject.dir.clone(), engine);
        options.cgroups = self.args.cgroups;
        options.pager.place = PagerPlaceArg::place(Some(self.args.pager), 2);
        options
    }

    /// Clones alive at once, and rounds: as asked for, else by size.
    pub(super) fn sizes(&self, full: (u32, u32), small: (u32, u32)) -> (u32, u32) {
        let (clones, rounds) = if self.args.small { small } else { full };
        let given = |asked: Option<std::num::NonZeroU32>, else_: u32| {
            asked.map_or(else_, std::num::NonZeroU32::get)
        };
        (
            given(self.args.clones, clones),
            given(self.args.rounds, rounds),
        )
    }

    /// Pages of the guest's RAM.
    pub(super) fn pages(&self) -> u64 {
        self.args.memory / 4096
    }

    /// Numbers for one trial.
    pub(super) fn random(&self) -> Random {
        Random::new(self.seed)
    }

    /// Ends a trial: stops every clone and looks what is left.
    pub(super) fn finish(
        &self,
        mut grove: Grove,
        before: &Footprint,
        mut done: BTreeMap<&'static str, u64>,
    ) -> Result<Found> {
        grove.stop_all()?;
        done.insert("right answers", grove.right_answers());
        let (mut wrong, mut complaints) = grove.take_wrong();
        // With the supervisor ends what serves its clones.
        drop(grove);
        let left = before.left()?;
        let mut missed = left.complaints();
        if self.args.judge_memory && left.memory_bytes as f64 > MISSING_BYTES {
            missed.push(left.summary());
        }
        wrong += missed.len() as u64;
        complaints.extend(missed);
        Ok(Found {
            done,
            wrong,
            complaints,
            left,
        })
    }

    fn run(&self, scenario: Scenario, engine: Engine) -> Result<Found> {
        match scenario {
            Scenario::All => Ok(Found::default()),
            Scenario::Isolation => isolation::run(self, engine),
            Scenario::KillClones => kills::clones(self, engine),
            Scenario::KillRoot => kills::root(self, engine),
            Scenario::KillPager => kills::pager(self, engine),
            Scenario::Template => template::run(self, engine),
            Scenario::Memory => limits::memory(self, engine),
            Scenario::Limits => limits::batches(self, engine),
            Scenario::SecondGeneration => generation::run(self, engine),
            Scenario::GiveBack => giving::run(self, engine),
        }
    }
}

impl Scenario {
    /// What `all` stands for.
    const EACH: [Self; 9] = [
        Self::Isolation,
        Self::KillClones,
        Self::KillRoot,
        Self::KillPager,
        Self::Template,
        Self::Memory,
        Self::Limits,
        Self::SecondGeneration,
        Self::GiveBack,
    ];

    /// Engines that it can be done to, the farm's first.
    fn engines(self) -> &'static [Engine] {
        match self {
            Self::All => &[],
            Self::KillRoot => &[Engine::Root],
            Self::Template | Self::SecondGeneration => &[Engine::Copy],
            Self::Isolation
            | Self::KillClones
            | Self::KillPager
            | Self::Memory
            | Self::Limits
            | Self::GiveBack => &[Engine::Root, Engine::Copy],
        }
    }

    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Runs the scenarios and prints what they came to. An error if anything was wrong.
pub(crate) fn run(args: &SoakArgs) -> Result<()> {
    ensure!(
        args.memory >= 64 << 20,
        "--memory {}: the template's guest writes 32 MiB, give at least 64M",
        args.memory
    );
    raise_descriptor_limit();
    adopt_orphans()?;
    let host = Host::probe()?;
    let stage = Stage {
        args,
        program: program(args.pando.as_deref())?,
        seed: args.seed.unwrap_or_else(from_clock),
        cpus: host.cpus,
    };
    let mut scenarios = args.scenarios.clone();
    if scenarios.contains(&Scenario::All) {
        scenarios = Scenario::EACH.to_vec();
    }
    let mut trials = Vec::new();
    for scenario in scenarios {
        let engines = if args.engines.is_empty() {
            scenario.engines()
        } else {
            &args.engines
        };
        for &engine in engines {
            eprintln!(
                "{} with engine {engine}, seed {}",
                scenario.name(),
                stage.seed
            );
            let begun = Instant::now();
            let found = stage.run(scenario, engine).with_context(|| {
                format!(
                    "{} with engine {engine}, --seed {}",
                    scenario.name(),
                    stage.seed
                )
            })?;
            trials.push(Trial {
                scenario,
                engine,
                took_ns: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
                found,
            });
        }
    }
    let soak = Soak {
        seed: stage.seed,
        memory_bytes: args.memory,
        trials,
    };
    let wrong = wrong(&soak);
    report(host, soak).print(args.json)?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What was wrong, in words; the seed with it.
fn wrong(soak: &Soak) -> Vec<String> {
    let mut all = Vec::new();
    for trial in soak.trials.iter().filter(|trial| trial.found.wrong > 0) {
        all.push(format!(
            "{} with engine {}: wrong {} times, --seed {}",
            trial.scenario.name(),
            trial.engine,
            trial.found.wrong,
            soak.seed
        ));
        all.extend(
            trial
                .found
                .complaints
                .iter()
                .map(|text| format!("  {text}")),
        );
    }
    all
}

fn report(host: Host, soak: Soak) -> Report<Soak> {
    let heads = ["", "engine", "took", "done", "wrong", "left"];
    let mut table = TextTable::new(format!("under stress, seed {}", soak.seed), &heads);
    for trial in &soak.trials {
        let done = trial.found.done.iter();
        let done: Vec<String> = done
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        table.row(vec![
            trial.scenario.name(),
            trial.engine.to_string(),
            time(trial.took_ns),
            done.join(", "),
            trial.found.wrong.to_string(),
            trial.found.left.summary(),
        ]);
    }
    let mut report = Report::new("soak", host, soak);
    report.marks = vec![
        "each answer of each clone is compared with what the guest must say; a clone that ends unasked \
         is wrong, and so is a process, a descriptor or a cgroup that is left"
            .to_owned(),
    ];
    report.tables = vec![table];
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_the_seed() {
        let trial = |wrong| Trial {
            scenario: Scenario::KillClones,
            engine: Engine::Root,
            took_ns: 1,
            found: Found {
                wrong,
                complaints: vec!["clone 3 ended".to_owned()],
                ..Found::default()
            },
        };
        let soak = |wrong| Soak {
            seed: 77,
            memory_bytes: 0,
            trials: vec![trial(0), trial(wrong)],
        };
        assert!(super::wrong(&soak(0)).is_empty());
        let text = super::wrong(&soak(2)).join("\n");
        assert!(
            text.contains("kill-clones with engine root: wrong 2 times, --seed 77"),
            "{text}"
        );
        assert!(text.contains("clone 3 ended"), "{text}");
    }
}
