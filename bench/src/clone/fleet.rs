#![forbid(unsafe_code)]
//! Clones of one variant: started, asked, ended.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::{Ending, Io, PagerConfig, PagerPlace};
use pando_vmm::clone::pool::PoolLimits;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use pando_vmm::observe::memory::ProcessMemory;
use pando_vmm::observe::stats::PagerStats;
use pando_vmm::payload::protocol::{Outcome, Reply};
use serde::Serialize;

use super::workload::Workload;
use crate::host::{memory_bytes, memory_each_bytes, settled_memory_bytes};

/// A clone that says nothing for this long is given up.
const SILENCE: Duration = Duration::from_secs(60);

/// A way to make clones, to be compared with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Setup {
    /// Where memory comes from.
    pub(crate) engine: Engine,
    /// How template pages are read.
    pub(crate) io: Io,
    /// Where the pager runs.
    pub(crate) place: PagerPlace,
    /// Whether checksums are compared.
    pub(crate) verify: bool,
    /// Whether a shell waits for the request: process, memory and machine made ahead.
    pub(crate) warm: bool,
}

impl Setup {
    /// All combinations that differ, engine `kernel` first: it is the baseline.
    pub(crate) fn all(
        engines: &[Engine],
        io: &[Io],
        places: &[PagerPlace],
        also_unverified: bool,
    ) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        let kernel_first = engines.iter().filter(|&&engine| engine == Engine::Kernel);
        let others = engines.iter().filter(|&&engine| engine != Engine::Kernel);
        for &engine in kernel_first.chain(others) {
            let mut add = |setup: Self| {
                if !all.contains(&setup) {
                    all.push(setup);
                }
            };
            let plain = Self {
                engine,
                io: Io::Auto,
                place: PagerPlace::default(),
                verify: true,
                warm: false,
            };
            if engine != Engine::Copy {
                // Clones of a root that holds all data have no pager of their own.
                add(plain);
                if engine == Engine::Root {
                    add(Self {
                        warm: true,
                        ..plain
                    });
                }
                continue;
            }
            for &io in io {
                let own = Self { io, ..plain };
                if places.contains(&PagerPlace::Own) {
                    add(own);
                    if also_unverified {
                        add(Self {
                            verify: false,
                            ..own
                        });
                    }
                }
            }
            // Once: how it reads and whether it verifies is a question to any pager.
            if places.contains(&PagerPlace::Shared) {
                let place = PagerPlace::Shared;
                add(Self { place, ..plain });
            }
        }
        all
    }

    /// What a table calls it.
    pub(crate) fn name(&self) -> String {
        let io = match self.io {
            Io::Auto => "",
            Io::Uring => ", uring",
            Io::Pread => ", pread",
        };
        let verify = if self.verify { "" } else { ", not verified" };
        let warm = if self.warm { ", warm shell" } else { "" };
        let place = match self.place {
            PagerPlace::Own => "",
            PagerPlace::Shared => ", shared pager",
        };
        format!("{}{io}{place}{verify}{warm}", self.engine)
    }
}

/// What one clone took.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    /// From the request to the first byte of the answer.
    pub(crate) first_output: Duration,
    /// The stages of the start.
    pub(crate) stages: Vec<(String, Duration)>,
    /// What the guest says its work took, in ticks of its time stamp counter.
    pub(crate) ticks: Option<u64>,
}

/// What clones took that were alive at once.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Wave {
    /// How many.
    pub(crate) clones: u32,
    /// From the first request to the last first output.
    pub(crate) wall_ns: u64,
    /// See [`memory_each_bytes`].
    pub(crate) memory_per_clone_bytes: f64,
    /// Median memory that only one clone has.
    pub(crate) private_bytes_p50: u64,
}

/// Makes clones of one template in one way.
#[derive(Debug)]
pub(crate) struct Fleet {
    supervisor: Supervisor,
    setup: Setup,
}

impl Fleet {
    /// Nothing runs yet.
    pub(crate) fn new(program: PathBuf, template: &Path, setup: Setup) -> Result<Self> {
        let supervisor = Supervisor::new(CloneOptions {
            host_check: pando_vmm::machine::HostCheck::Done,
            root: RootOptions {
                shells: PoolLimits {
                    floor: usize::from(setup.warm),
                    ceiling: usize::from(setup.warm),
                },
                ..RootOptions::default()
            },
            program,
            template: template.to_owned(),
            name: "bench".to_owned(),
            engine: setup.engine,
            pager: PagerConfig {
                io: setup.io,
                verify: setup.verify,
                place: setup.place,
                ..PagerConfig::default()
            },
            verbosity: 0,
            overcommit: true,
            measure_memory: false,
        })?;
        Ok(Self { supervisor, setup })
    }

    /// Waits until what is made ahead of requests is there.
    fn settle(&mut self) -> Result<()> {
        if self.setup.engine != Engine::Root {
            return Ok(());
        }
        self.supervisor.prepare();
        let begun = Instant::now();
        let wanted = usize::from(self.setup.warm);
        while self.supervisor.forks().filled.is_none() || self.supervisor.forks().warm() < wanted {
            ensure!(begun.elapsed() < SILENCE, "the root is not ready");
            self.supervisor.wait(Duration::from_millis(1))?;
        }
        Ok(())
    }

    /// What all pagers did.
    pub(crate) fn pager_stats(&self) -> &PagerStats {
        &self.supervisor.pager_stats
    }

    /// Starts a clone, has it do `workload` and ends it.
    pub(crate) fn run_one(&mut self, workload: Workload, seed: u64) -> Result<Sample> {
        self.settle()?;
        let (command, expected) = workload.command(seed);
        let number = self
            .supervisor
            .start(&SerialPlan::Supervisor, &command.encode());
        let mut answers = Answers::new(expected);
        self.until(|fleet, event| {
            answers.hear(&mut fleet.supervisor, event)?;
            Ok(!answers.ticks.is_empty())
        })?;
        self.supervisor.clones()[number]
            .process
            .iter()
            .for_each(|process| process.ask_to_stop());
        // A console that is closed would be ready for ever.
        self.supervisor.forget_console(number);
        while self.supervisor.live() > 0 {
            self.supervisor.wait(Duration::from_secs(1))?;
        }
        let clone = &self.supervisor.clones()[number];
        ensure!(
            clone.ending == Some(Ending::Stopped),
            "clone {number} ended with {:?}",
            clone.ending
        );
        Ok(Sample {
            first_output: clone.first_output.context("no output was seen")?,
            stages: clone.stages.clone(),
            ticks: answers.ticks.pop().flatten(),
        })
    }

    /// Starts `clones` clones, at most `parallel` of them at a time, measures when all are alive
    /// and have answered, and ends them.
    pub(crate) fn run_wave(mut self, clones: u32, parallel: u32) -> Result<Wave> {
        let (command, expected) = Workload::FirstOutput.command(0);
        let (input, count) = (command.encode(), clones as usize);
        let mut answers = Answers::new(expected);
        self.settle()?;
        let before = settled_memory_bytes()?;
        let begun = Instant::now();
        let parallel = (parallel as usize).min(count);
        for _ in 0..parallel {
            self.supervisor.start(&SerialPlan::Supervisor, &input);
        }
        let mut wall = Duration::ZERO;
        self.until(|fleet, event| {
            answers.hear(&mut fleet.supervisor, event)?;
            wall = begun.elapsed();
            let started = fleet.supervisor.clones().len();
            let wanted = count.min(answers.ticks.len() + parallel);
            for _ in started..wanted {
                fleet.supervisor.start(&SerialPlan::Supervisor, &input);
            }
            Ok(answers.ticks.len() == count)
        })?;
        let alive = memory_bytes("MemAvailable")?;
        let mut private: Vec<u64> = self
            .supervisor
            .clones()
            .iter()
            .filter_map(|clone| ProcessMemory::of(clone.pid))
            .map(|memory| memory.private_dirty_bytes + memory.private_clean_bytes)
            .collect();
        private.sort_unstable();
        ensure!(
            private.len() == count,
            "{} of {count} clones were alive at the end",
            private.len()
        );
        self.supervisor.stop_all(STOP_GRACE)?;
        let after = settled_memory_bytes()?;
        Ok(Wave {
            clones,
            wall_ns: u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX),
            memory_per_clone_bytes: memory_each_bytes(before, alive, after, clones),
            private_bytes_p50: private[count / 2],
        })
    }

    /// Has `done` look at each event until it says that it is done.
    fn until(&mut self, mut done: impl FnMut(&mut Self, Event) -> Result<bool>) -> Result<()> {
        let mut last_news = Instant::now();
        loop {
            for event in self.supervisor.wait(Duration::from_secs(1))? {
                last_news = Instant::now();
                if event == Event::Signal {
                    bail!("interrupted");
                }
                if done(self, event)? {
                    return Ok(());
                }
            }
            ensure!(
                last_news.elapsed() < SILENCE,
                "no clone has said anything for {} s",
                SILENCE.as_secs()
            );
        }
    }
}

/// Reads the answers of clones that were all asked the same.
struct Answers {
    expected: Outcome,
    /// Of each answer, the ticks that it names.
    ticks: Vec<Option<u64>>,
}

impl Answers {
    fn new(expected: Outcome) -> Self {
        Self {
            expected,
            ticks: Vec::new(),
        }
    }

    fn hear(&mut self, supervisor: &mut Supervisor, event: Event) -> Result<()> {
        match event {
            Event::Output(number) => {
                let clone = supervisor.clone_mut(number).context("an unknown clone")?;
                let Some(console) = clone.console.as_mut() else {
                    return Ok(());
                };
                let open = console.poll()?;
                while let Some(line) = console.take_line() {
                    let reply = Reply::parse(&line)?;
                    ensure!(
                        reply.outcome == self.expected,
                        "clone {number} answered {line:?} instead of {:?}",
                        self.expected
                    );
                    self.ticks.push(reply.ticks);
                }
                if !open {
                    supervisor.forget_console(number);
                }
                Ok(())
            }
            Event::Ended(number) => bail!(
                "clone {number} ended before it had answered: {:?}",
                supervisor.clones()[number].ending
            ),
            Event::Started(_) | Event::Signal => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_differ_and_the_kernel_comes_first() {
        let engines = [Engine::Copy, Engine::Kernel];
        let names = |io: &[Io], unverified| -> Vec<String> {
            let all = Setup::all(&engines, io, &[PagerPlace::Own], unverified);
            all.iter().map(Setup::name).collect()
        };
        assert_eq!(names(&[Io::Auto], false), ["kernel", "copy"]);
        let places = [PagerPlace::Own, PagerPlace::Shared];
        let both = Setup::all(&[Engine::Copy, Engine::Root], &[Io::Auto], &places, false);
        let both: Vec<String> = both.iter().map(Setup::name).collect();
        assert_eq!(
            both,
            ["copy", "copy, shared pager", "root", "root, warm shell"]
        );
        assert_eq!(
            names(&[Io::Uring, Io::Pread, Io::Uring], true),
            [
                "kernel",
                "copy, uring",
                "copy, uring, not verified",
                "copy, pread",
                "copy, pread, not verified"
            ]
        );
    }
}
