#![forbid(unsafe_code)]
//! Clones of one template that are asked things: each answer is compared with what the guest must
//! say, and a clone that ends without being expected to is wrong.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::clone::cgroup::CloneGroups;
use pando_vmm::clone::control::{Ending, PagerConfig, PagerPlace};
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use pando_vmm::demo::plan::{Step, lines};
use pando_vmm::payload::protocol::{Command, Outcome, Reply, Visit};
use pando_vmm::report::chain;

/// Clones that say nothing for this long are given up.
const SILENCE: Duration = Duration::from_secs(120);
/// Complaints that are kept word for word; of the others only their number is.
const COMPLAINTS: usize = 40;
/// How long one look at the clones waits for something to happen.
const LOOK: Duration = Duration::from_millis(20);

/// What clones have in common.
#[derive(Debug, Clone)]
pub(crate) struct GroveOptions {
    /// The `pando` program.
    pub(crate) program: PathBuf,
    /// The template's directory.
    pub(crate) template: PathBuf,
    /// Where memory comes from.
    pub(crate) engine: Engine,
    /// How pagers work.
    pub(crate) pager: PagerConfig,
    /// How engine `root` works.
    pub(crate) root: RootOptions,
    /// Whether each clone gets a cgroup of its own.
    pub(crate) cgroups: bool,
    /// Whether the memory of each clone is measured, page by page.
    pub(crate) measure_memory: bool,
}

impl GroveOptions {
    /// What users get for several clones.
    pub(crate) fn new(program: PathBuf, template: PathBuf, engine: Engine) -> Self {
        Self {
            program,
            template,
            engine,
            pager: PagerConfig {
                place: PagerPlace::Shared,
                ..PagerConfig::default()
            },
            root: RootOptions::default(),
            cgroups: false,
            measure_memory: false,
        }
    }
}

/// One clone, as the one who asks sees it.
#[derive(Debug, Default)]
struct Trunk {
    /// What it has not answered yet.
    open: VecDeque<Step>,
    may_end: bool,
    has_ended: bool,
}

/// Clones that are asked things.
#[derive(Debug)]
pub(crate) struct Grove {
    pub(crate) supervisor: Supervisor,
    engine: Engine,
    trunks: Vec<Trunk>,
    /// Clones that owe an answer.
    owing: usize,
    complaints: Vec<String>,
    wrong: u64,
    answers: u64,
    last_news: Instant,
}

impl Grove {
    /// Nothing runs yet.
    pub(crate) fn new(options: GroveOptions) -> Result<Self> {
        let mut supervisor = Supervisor::new(CloneOptions {
            program: options.program,
            template: options.template,
            name: "bench".to_owned(),
            engine: options.engine,
            pager: options.pager,
            verbosity: 0,
            measure_memory: options.measure_memory,
            overcommit: true,
            host_check: pando_vmm::machine::HostCheck::Done,
            root: options.root,
        })?;
        if options.cgroups {
            supervisor.use_cgroups(CloneGroups::new()?);
        }
        Ok(Self {
            supervisor,
            engine: options.engine,
            trunks: Vec::new(),
            owing: 0,
            complaints: Vec::new(),
            wrong: 0,
            answers: 0,
            last_news: Instant::now(),
        })
    }

    /// Engine `root`: has the root made and waits until it can be forked.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        if self.engine != Engine::Root {
            return Ok(());
        }
        self.supervisor.prepare();
        self.until("the root is ready", |grove| {
            grove.supervisor.forks().filled.is_some()
        })
    }

    /// Starts a clone that does `steps`, and returns its number.
    pub(crate) fn start(&mut self, steps: Vec<Step>) -> usize {
        let number = self
            .supervisor
            .start(&SerialPlan::Supervisor, &lines(&steps));
        self.plant(number, steps)
    }

    /// Starts a clone whose console is a socket at `path`: nothing can be asked of it here.
    pub(crate) fn start_on_socket(&mut self, path: PathBuf) -> usize {
        let number = self.supervisor.start(&SerialPlan::Unix(path), &[]);
        self.plant(number, Vec::new())
    }

    fn plant(&mut self, number: usize, steps: Vec<Step>) -> usize {
        self.trunks.resize_with(number + 1, Trunk::default);
        self.owing += usize::from(!steps.is_empty());
        self.trunks[number].open = steps.into();
        self.last_news = Instant::now();
        number
    }

    /// Asks more of a clone. One that has ended is not asked.
    pub(crate) fn ask(&mut self, number: usize, steps: Vec<Step>) {
        let Some(trunk) = self.trunks.get_mut(number).filter(|trunk| !trunk.has_ended) else {
            return;
        };
        let clone = self.supervisor.clone_mut(number);
        let console = clone.and_then(|clone| clone.console.as_mut());
        let sent = console.map(|console| console.send(&lines(&steps)));
        match sent {
            Some(Ok(())) => {
                self.owing += usize::from(trunk.open.is_empty() && !steps.is_empty());
                trunk.open.extend(steps);
            }
            Some(Err(_)) if trunk.may_end => (),
            Some(Err(error)) => {
                let text = chain(&error);
                self.complain(format!("clone {number} cannot be asked: {text}"));
            }
            None => self.complain(format!("clone {number} has no console to be asked on")),
        }
    }

    /// From now on it is no fault of this clone to end, nor to owe answers then.
    pub(crate) fn may_end(&mut self, number: usize) {
        if let Some(trunk) = self.trunks.get_mut(number) {
            trunk.may_end = true;
        }
    }

    /// Whether a clone has ended.
    pub(crate) fn has_ended(&self, number: usize) -> bool {
        self.trunks.get(number).is_none_or(|trunk| trunk.has_ended)
    }

    /// Whether a clone owes an answer.
    pub(crate) fn owes(&self, number: usize) -> bool {
        self.trunks
            .get(number)
            .is_some_and(|trunk| !trunk.open.is_empty())
    }

    /// Clones that owe an answer.
    pub(crate) fn owing(&self) -> usize {
        self.owing
    }

    /// Clones that run or come to run.
    pub(crate) fn live(&self) -> Vec<usize> {
        let is_live = |(number, trunk): (usize, &Trunk)| (!trunk.has_ended).then_some(number);
        self.trunks.iter().enumerate().filter_map(is_live).collect()
    }

    /// How a clone ended; `None` while it has not.
    pub(crate) fn ending(&self, number: usize) -> Option<&Ending> {
        self.supervisor.clones().get(number)?.ending.as_ref()
    }

    /// Answers that were as they must be.
    pub(crate) fn right_answers(&self) -> u64 {
        self.answers
    }

    /// Whether anything was wrong so far.
    pub(crate) fn is_wrong(&self) -> bool {
        self.wrong > 0
    }

    /// What was wrong, and how often; taken out of here.
    pub(crate) fn take_wrong(&mut self) -> (u64, Vec<String>) {
        (
            std::mem::take(&mut self.wrong),
            std::mem::take(&mut self.complaints),
        )
    }

    /// Something is wrong.
    pub(crate) fn complain(&mut self, text: String) {
        self.wrong += 1;
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(text);
        }
    }

    /// Takes what has happened, waiting for it at most `timeout`.
    pub(crate) fn look(&mut self, timeout: Duration) -> Result<()> {
        for event in self.supervisor.wait(timeout)? {
            self.last_news = Instant::now();
            match event {
                Event::Output(number) => self.hear(number),
                Event::Ended(number) => self.bury(number),
                Event::Started(_) => (),
                Event::Signal => bail!("interrupted"),
            }
        }
        Ok(())
    }

    /// Looks until `done`; clones that are silent for too long are an error.
    pub(crate) fn until(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self) -> bool,
    ) -> Result<()> {
        self.last_news = Instant::now();
        while !done(self) {
            self.look(LOOK)?;
            ensure!(
                self.last_news.elapsed() < SILENCE,
                "{what}: not so after {} s of silence; {} clones owe answers, first complaints: {:?}",
                SILENCE.as_secs(),
                self.owing,
                self.complaints.first()
            );
        }
        Ok(())
    }

    /// Looks until no clone owes an answer.
    pub(crate) fn all_answer(&mut self) -> Result<()> {
        self.until("all clones have answered", |grove| grove.owing == 0)
    }

    /// Looks for this long.
    pub(crate) fn pass(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            self.look(left.min(LOOK))?;
            if left.is_zero() {
                return Ok(());
            }
        }
    }

    /// Ends a clone at once, when it has a process, and waits until it is buried.
    pub(crate) fn kill(&mut self, number: usize) -> Result<()> {
        self.may_end(number);
        self.until("the clone to be killed is there", |grove| {
            grove.has_ended(number) || grove.process(number).is_some()
        })?;
        if let Some(process) = &self.supervisor.clones()[number].process {
            process.kill();
        }
        self.until("the killed clone is buried", |grove| {
            grove.has_ended(number)
        })
    }

    /// Asks a clone to stop and waits until it is buried.
    pub(crate) fn stop(&mut self, number: usize) -> Result<()> {
        self.may_end(number);
        self.until("the clone to be stopped is there", |grove| {
            grove.has_ended(number) || grove.process(number).is_some()
        })?;
        if let Some(process) = &self.supervisor.clones()[number].process {
            process.ask_to_stop();
        }
        self.until("the stopped clone is buried", |grove| {
            grove.has_ended(number)
        })
    }

    /// The number of a clone's process.
    pub(crate) fn process(&self, number: usize) -> Option<u32> {
        let clone = self.supervisor.clones().get(number)?;
        clone.process.as_ref().map(|process| process.pid())
    }

    /// Stops every clone. One that does not end as it should is wrong.
    pub(crate) fn stop_all(&mut self) -> Result<()> {
        let live = self.live();
        self.supervisor.stop_all(STOP_GRACE)?;
        for number in live {
            if let Some(trunk) = self.trunks.get_mut(number) {
                trunk.has_ended = true;
            }
            self.supervisor.forget_console(number);
            let may_end = self.trunks[number].may_end;
            match self.ending(number) {
                Some(Ending::Stopped) => (),
                _ if may_end => (),
                other => {
                    let other = format!("{other:?}");
                    self.complain(format!(
                        "clone {number} was asked to stop and ended: {other}"
                    ));
                }
            }
        }
        self.owing = 0;
        Ok(())
    }

    fn hear(&mut self, number: usize) {
        let Some(clone) = self.supervisor.clone_mut(number) else {
            return;
        };
        let Some(console) = clone.console.as_mut() else {
            return;
        };
        let is_open = console.poll().unwrap_or(false);
        let mut heard = Vec::new();
        while let Some(line) = console.take_line() {
            heard.push(line);
        }
        for line in heard {
            self.compare(number, &line);
        }
        if !is_open {
            self.supervisor.forget_console(number);
        }
    }

    fn compare(&mut self, number: usize, line: &str) {
        let trunk = &mut self.trunks[number];
        let Some((command, expected)) = trunk.open.pop_front() else {
            return self.complain(format!("clone {number} says {line:?} unasked"));
        };
        self.owing -= usize::from(trunk.open.is_empty());
        match Reply::parse(line) {
            Ok(reply)
                if expected
                    .as_ref()
                    .is_none_or(|expected| *expected == reply.outcome) =>
            {
                self.answers += 1;
            }
            Ok(reply) => self.complain(format!(
                "clone {number}: {command:?} gave {:?} instead of {expected:?}",
                reply.outcome
            )),
            Err(error) => self.complain(format!("clone {number}: {}", chain(&error))),
        }
    }

    fn bury(&mut self, number: usize) {
        self.hear(number);
        self.supervisor.forget_console(number);
        let trunk = &mut self.trunks[number];
        if trunk.has_ended {
            return;
        }
        trunk.has_ended = true;
        self.owing -= usize::from(!trunk.open.is_empty());
        trunk.open.clear();
        if !trunk.may_end {
            let ending = format!("{:?}", self.ending(number));
            self.complain(format!("clone {number} ended: {ending}"));
        }
    }
}

/// Write these pages, and verify them in the same order.
pub(crate) fn write_and_verify(visit: Visit, salt: u64) -> Vec<Step> {
    let count = visit.count;
    let written = Outcome::Written { count };
    let write = (Command::Write { visit, salt }, Some(written));
    vec![write, verify(visit, salt)]
}

/// Verify that these pages were written with `salt`.
pub(crate) fn verify(visit: Visit, salt: u64) -> Step {
    let verified = Outcome::Verified {
        count: visit.count,
        mismatches: 0,
        first_mismatch: None,
    };
    (Command::Verify { visit, salt }, Some(verified))
}

/// Find nothing but zeros in these pages.
pub(crate) fn only_zeros(first_page: u64, pages: u64) -> Step {
    let none = Outcome::Scanned {
        nonzero: 0,
        first_nonzero: None,
    };
    (Command::Scan { first_page, pages }, Some(none))
}

/// Say this number: the answer marks the start.
pub(crate) fn echo(number: u64) -> Step {
    let words = vec![number];
    (Command::Echo(words.clone()), Some(Outcome::Echo(words)))
}
