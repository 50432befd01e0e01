#![forbid(unsafe_code)]
//! Runs the demonstration.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::plan::{self, Plan, Step};
use super::result::{CloneFailure, DemoResult, MemoryFacts, PagerFacts, TemplateFacts};
use crate::arch::x86_64::boot::BootSource;
use crate::clone::control::Ending;
use crate::clone::process::SerialPlan;
use crate::clone::supervise::{CloneOptions, Event, STOP_GRACE, Supervisor};
use crate::config;
use crate::observe::memory::{ProcessMemory, available_bytes};
use crate::observe::stats::Durations;
use crate::payload::protocol::{READY_LINE, Reply};
use crate::report::exit;
use crate::spec::MachineSpec;
use crate::template::Template;
use crate::template::build::{Ready, TemplateVm};

/// How long the built-in guest may take for an answer before it counts as hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// What to demonstrate.
#[derive(Debug)]
pub struct Demo {
    /// What all clones have in common; its template is made by [`Demo::make_template`].
    pub options: CloneOptions,
    /// How many clones.
    pub clones: usize,
    /// How many may be starting at once.
    pub parallel: usize,
    /// Where metrics are served.
    pub metrics: SocketAddr,
    /// Set when a signal came.
    pub cancel: Arc<AtomicBool>,
}

/// A demonstration whose clones were all asked.
#[derive(Debug)]
pub struct Finished {
    /// The clones, which still run.
    pub supervisor: Supervisor,
    /// What was found so far.
    pub result: DemoResult,
    /// Whether a signal ended it early.
    pub interrupted: bool,
    template: Template,
}

impl Demo {
    /// Makes the template in `dir`, unless `cancel` is set by a signal meanwhile.
    pub fn make_template(
        dir: &Path,
        spec: &MachineSpec,
        cancel: Arc<AtomicBool>,
    ) -> anyhow::Result<Template> {
        let plan = Plan::new(spec.layout().total_bytes());
        Self::make_template_of(dir, spec, cancel, &plan.template)
    }

    /// The same, of a VM that has done `steps` before it was frozen.
    pub fn make_template_of(
        dir: &Path,
        spec: &MachineSpec,
        cancel: Arc<AtomicBool>,
        steps: &[Step],
    ) -> anyhow::Result<Template> {
        let boot = BootSource {
            kernel: config::embedded_kernel(),
            initrd: None,
            append: String::new(),
        };
        let mut vm = TemplateVm::boot(dir, spec, &boot, true)?;
        vm.console.cancel_on(cancel);
        vm.wait_ready(
            &Ready::Serial(READY_LINE.trim_end().into()),
            ANSWER_TIMEOUT,
            &mut |_| (),
        )?;
        // What is left of the ready line.
        vm.console.line(ANSWER_TIMEOUT)?;
        for step in steps {
            vm.console.send(&step.0.encode())?;
            let line = vm.console.line(ANSWER_TIMEOUT)?;
            check(step, &line).context("the template VM answered wrongly")?;
        }
        Ok(vm.freeze(&mut |_, _| ())?)
    }

    /// Starts the clones, asks each everything and waits for all answers. `progress` gets how many
    /// were verified so far. They run on until the result is finished.
    pub fn run(
        self,
        template: Template,
        create: Duration,
        progress: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Finished> {
        // First, so that from here on a signal wakes whoever waits; one that came before is in
        // `cancel`.
        let supervisor = Supervisor::new(self.options.clone())?;
        let digest_before = template.ram_digests()?;
        let available_before = available_bytes().unwrap_or(0);
        let plan = Plan::new(template.spec().layout().total_bytes());
        let start = Instant::now();
        let mut run = Run::new(supervisor, plan, self.clones);
        let interrupted = run.all(self.parallel, &self.cancel, progress)?;
        let took = start.elapsed();
        let memory = measure_memory(&run.supervisor, available_before);
        let data_pages = template
            .index()
            .backends()
            .iter()
            .map(|(_, index)| index.count(pando_pager::image::PageKind::Data).get())
            .sum();
        let result = DemoResult {
            clones: self.clones,
            verified: run.verified(),
            failures: Vec::new(),
            engine: self.options.engine,
            io: run
                .supervisor
                .clones()
                .first()
                .map_or_else(String::new, |c| c.io.clone()),
            parallel: self.parallel,
            template: TemplateFacts {
                dir: template.dir().display().to_string(),
                memory_bytes: template.spec().layout().total_bytes(),
                data_pages,
                create_ms: create.as_secs_f64() * 1e3,
                digest_before,
                digest_after: Vec::new(),
                unchanged: false,
            },
            start: start_percentiles(&run.supervisor),
            all_verified_ms: took.as_secs_f64() * 1e3,
            pager: PagerFacts::default(),
            memory,
            metrics: self.metrics,
        };
        Ok(Finished {
            result: run.failures(result),
            supervisor: run.supervisor,
            interrupted,
            template,
        })
    }
}

impl Finished {
    /// Ends the clones and compares the template with what it was.
    pub fn finish(mut self) -> anyhow::Result<DemoResult> {
        self.supervisor.stop_all(STOP_GRACE)?;
        for (number, clone) in self.supervisor.clones().iter().enumerate() {
            let Some(Ending::Failed { code, message }) = &clone.ending else {
                continue;
            };
            let mut failures = self.result.failures.iter_mut();
            match failures.find(|failure| failure.clone == number) {
                Some(known) => known.code = known.code.max(*code),
                None => self.result.failures.push(CloneFailure {
                    clone: number,
                    code: *code,
                    message: message.clone(),
                }),
            }
        }
        self.result.pager = PagerFacts::from(&self.supervisor.pager_stats);
        self.result.template.digest_after = self.template.ram_digests()?;
        self.result.template.unchanged =
            self.result.template.digest_after == self.result.template.digest_before;
        Ok(self.result)
    }
}

/// A clone's way through its steps.
#[derive(Debug)]
struct Progress {
    steps: Vec<Step>,
    answered: usize,
    /// Exit code and message.
    failure: Option<(u8, String)>,
}

impl Progress {
    fn is_done(&self) -> bool {
        self.failure.is_some() || self.answered == self.steps.len()
    }
}

struct Run {
    supervisor: Supervisor,
    plan: Plan,
    wanted: usize,
    progress: Vec<Progress>,
}

impl Run {
    fn new(supervisor: Supervisor, plan: Plan, wanted: usize) -> Self {
        Self {
            supervisor,
            plan,
            wanted,
            progress: Vec::new(),
        }
    }

    /// Whether a signal came before all were done.
    fn all(
        &mut self,
        parallel: usize,
        cancel: &AtomicBool,
        progress: &mut dyn FnMut(usize),
    ) -> anyhow::Result<bool> {
        let mut last_news = Instant::now();
        loop {
            if cancel.load(Ordering::Relaxed) {
                return Ok(true);
            }
            let busy = self
                .progress
                .iter()
                .filter(|clone| !clone.is_done())
                .count();
            for _ in busy..parallel.min(self.wanted - self.progress.len() + busy) {
                self.start_one();
            }
            if self.progress.len() == self.wanted && self.progress.iter().all(Progress::is_done) {
                return Ok(false);
            }
            for event in self.supervisor.wait(Duration::from_secs(1))? {
                last_news = Instant::now();
                match event {
                    Event::Output(clone) => self.read(clone),
                    Event::Ended(clone) => {
                        self.read(clone);
                        self.fail(clone, "it ended before it had answered everything");
                    }
                    Event::Signal => return Ok(true),
                    Event::Started(_) => (),
                }
            }
            progress(self.verified());
            if last_news.elapsed() > ANSWER_TIMEOUT {
                bail!("no clone has answered for {} s", ANSWER_TIMEOUT.as_secs());
            }
        }
    }

    fn start_one(&mut self) {
        let number = self.progress.len();
        let steps = self.plan.clone(number as u64);
        self.supervisor
            .start(&SerialPlan::Supervisor, &plan::lines(&steps));
        self.progress.push(Progress {
            steps,
            answered: 0,
            failure: None,
        });
    }

    fn read(&mut self, number: usize) {
        let Some(clone) = self.supervisor.clone_mut(number) else {
            return;
        };
        let Some(console) = clone.console.as_mut() else {
            return;
        };
        let open = console.poll().unwrap_or(false);
        while let Some(line) = console.take_line() {
            let state = &mut self.progress[number];
            let Some(step) = state.steps.get(state.answered) else {
                continue;
            };
            match check(step, &line) {
                Ok(()) => state.answered += 1,
                Err(error) => {
                    state
                        .failure
                        .get_or_insert_with(|| (exit::FAILED, format!("{error:#}")));
                }
            }
        }
        if !open {
            self.supervisor.forget_console(number);
        }
    }

    fn fail(&mut self, number: usize, message: &str) {
        let state = &mut self.progress[number];
        if !state.is_done() {
            let ending = self.supervisor.clones()[number].ending.as_ref();
            state.failure = Some(match ending {
                Some(Ending::Failed { code, message }) => (*code, message.clone()),
                _ => (exit::FAILED, message.to_owned()),
            });
        }
    }

    fn verified(&self) -> usize {
        self.progress
            .iter()
            .filter(|clone| clone.is_done() && clone.failure.is_none())
            .count()
    }

    fn failures(&self, mut result: DemoResult) -> DemoResult {
        for (clone, progress) in self.progress.iter().enumerate() {
            if let Some((code, message)) = &progress.failure {
                result.failures.push(CloneFailure {
                    clone,
                    code: *code,
                    message: message.clone(),
                });
            }
        }
        result
    }
}

fn check((command, expected): &Step, line: &str) -> anyhow::Result<()> {
    let reply = Reply::parse(line)?;
    match expected {
        Some(expected) if *expected != reply.outcome => {
            bail!(
                "{command:?} must give {expected:?}, the guest answered {:?}",
                reply.outcome
            )
        }
        _ => Ok(()),
    }
}

fn start_percentiles(supervisor: &Supervisor) -> Vec<(String, crate::observe::stats::Percentiles)> {
    let mut stages: Vec<(String, Durations)> = Vec::new();
    let mut record = |name: &str, took: Duration| {
        let place = stages
            .iter()
            .position(|(known, _)| known == name)
            .unwrap_or_else(|| {
                stages.push((name.to_owned(), Durations::default()));
                stages.len() - 1
            });
        stages[place].1.record(took);
    };
    for clone in supervisor.clones() {
        clone
            .stages
            .iter()
            .for_each(|(name, took)| record(name, *took));
    }
    for clone in supervisor.clones() {
        if let Some(took) = clone.first_output {
            record("total", took);
        }
    }
    stages
        .into_iter()
        .map(|(name, durations)| (name, durations.percentiles()))
        .collect()
}

fn measure_memory(supervisor: &Supervisor, available_before: u64) -> MemoryFacts {
    let clones: Vec<ProcessMemory> = supervisor
        .clones()
        .iter()
        .filter_map(|clone| ProcessMemory::of(clone.pid))
        .collect();
    let median = |of: fn(&ProcessMemory) -> u64| {
        let mut values: Vec<u64> = clones.iter().map(of).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    let fell = available_before.saturating_sub(available_bytes().unwrap_or(available_before));
    MemoryFacts {
        private_bytes_p50: median(|m| m.private_dirty_bytes + m.private_clean_bytes),
        resident_bytes_p50: median(|m| m.resident_bytes),
        proportional_bytes_p50: median(|m| m.proportional_bytes),
        available_fell_bytes: fell / (clones.len().max(1) as u64),
    }
}
