#![forbid(unsafe_code)]
//! Clones of the built-in guest under a supervisor of this process, asked questions whose answers
//! are known.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::{Ending, PagerConfig};
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, RootOptions, STOP_GRACE, Supervisor};
use pando_vmm::config::{self, MachineRequest};
use pando_vmm::demo::drive::Demo;
use pando_vmm::demo::plan::{self, Plan, Step};
use pando_vmm::machine::HostCheck;
use pando_vmm::payload::protocol::Reply;

use crate::command::{HANG, is_alive};
use crate::rig::built_program;

/// RAM of the guest.
pub const MEMORY_BYTES: u64 = 64 << 20;

/// A template whose guest wrote 4096 pages, and clones of it that answer for what they do.
#[derive(Debug)]
pub struct Grove {
    /// Their supervisor.
    pub supervisor: Supervisor,
    /// What they are asked.
    pub plan: Plan,
    /// What each clone has not answered yet.
    pub open: HashMap<usize, VecDeque<Step>>,
    /// Where the template is, if it is this grove's own.
    dir: Option<tempfile::TempDir>,
}

/// A template in `dir`, of a guest that has done `steps`.
pub(crate) fn template_in(dir: &Path, steps: &[Step]) -> Result<PathBuf> {
    let (spec, _) = config::resolve(&MachineRequest {
        kernel: config::EMBEDDED_KERNEL.into(),
        initrd: None,
        append: String::new(),
        memory_bytes: MEMORY_BYTES,
        cpus: 1,
    })?;
    let path = dir.join("template");
    Demo::make_template_of(&path, &spec, Arc::new(AtomicBool::new(false)), steps)?;
    Ok(path)
}

/// What most clones of `template` are started with.
pub fn usual_options(template: PathBuf) -> Result<CloneOptions> {
    Ok(CloneOptions {
        program: built_program("pando")?,
        template,
        name: "grove".into(),
        engine: Engine::Copy,
        pager: PagerConfig::default(),
        verbosity: 0,
        overcommit: true,
        measure_memory: false,
        host_check: HostCheck::Due,
        root: RootOptions::default(),
    })
}

impl Grove {
    /// A supervisor with a template and no clone.
    pub fn new(engine: Engine, pager: PagerConfig, root: RootOptions) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let template = template_in(dir.path(), &Plan::new(MEMORY_BYTES).template)?;
        let mut grove = Self::of(CloneOptions {
            engine,
            pager,
            root,
            ..usual_options(template)?
        })?;
        grove.dir = Some(dir);
        Ok(grove)
    }

    /// No clone yet, of a template that somebody else keeps.
    pub(crate) fn of(options: CloneOptions) -> Result<Self> {
        Ok(Self {
            supervisor: Supervisor::new(options)?,
            plan: Plan::new(MEMORY_BYTES),
            open: HashMap::new(),
            dir: None,
        })
    }

    /// Starts a clone that verifies what the template holds and what it writes itself.
    pub fn start(&mut self) -> usize {
        let number = self.supervisor.clones().len();
        self.start_with(self.plan.clone(number as u64))
    }

    /// Starts a clone that does `steps`.
    pub fn start_with(&mut self, steps: Vec<Step>) -> usize {
        let number = self.supervisor.clones().len();
        self.supervisor
            .start(&SerialPlan::Supervisor, &plan::lines(&steps));
        self.open.insert(number, steps.into());
        number
    }

    /// Asks a clone for more.
    pub fn ask(&mut self, number: usize, steps: &[Step]) -> Result<()> {
        let console = self.supervisor.clone_mut(number);
        let console = console.and_then(|clone| clone.console.as_mut());
        console.context("no console")?.send(&plan::lines(steps))?;
        self.open.entry(number).or_default().extend(steps.to_vec());
        Ok(())
    }

    /// Where its template is, if that is its own.
    pub fn template(&self) -> Option<PathBuf> {
        Some(self.dir.as_ref()?.path().join("template"))
    }

    /// Waits for `until`; every answer is checked, and a clone that ends is an error unless it is
    /// in `may_end`.
    pub fn run(&mut self, may_end: &[usize], mut until: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + HANG;
        while !until(self) {
            ensure!(Instant::now() < deadline, "open: {:?}", self.open.keys());
            for event in self.supervisor.wait(Duration::from_millis(20))? {
                match event {
                    Event::Output(number) => self.hear(number)?,
                    Event::Ended(number) if !may_end.contains(&number) => bail!(
                        "clone {number} ended: {:?}",
                        self.supervisor.clones()[number].ending
                    ),
                    _ => (),
                }
            }
        }
        Ok(())
    }

    fn hear(&mut self, number: usize) -> Result<()> {
        let clone = self.supervisor.clone_mut(number).context("no clone")?;
        let console = clone.console.as_mut().context("no console")?;
        let is_open = console.poll()?;
        while let Some(line) = console.take_line() {
            let open = self.open.get_mut(&number).context("nothing was asked")?;
            let (command, expected) = open.pop_front().context("more answers than questions")?;
            let outcome = Reply::parse(&line)?.outcome;
            ensure!(
                expected
                    .as_ref()
                    .is_none_or(|expected| *expected == outcome),
                "clone {number}: {command:?} gave {outcome:?} and not {expected:?}"
            );
        }
        if !is_open {
            self.supervisor.forget_console(number);
        }
        Ok(())
    }

    /// Waits until every clone has answered everything.
    pub fn all_answer(&mut self) -> Result<()> {
        self.run(&[], |grove| grove.open.values().all(VecDeque::is_empty))
    }

    /// Ends all clones; each must have lived until now.
    pub fn stop(&mut self) -> Result<()> {
        self.supervisor.stop_all(STOP_GRACE)?;
        for (number, clone) in self.supervisor.clones().iter().enumerate() {
            ensure!(
                clone.ending == Some(Ending::Stopped),
                "clone {number}: {:?}",
                clone.ending
            );
            ensure!(!is_alive(clone.pid), "clone {number} is left");
        }
        Ok(())
    }
}
