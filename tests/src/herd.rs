#![forbid(unsafe_code)]
//! Clones of a template of the built-in guest, each with a model of what its pages must hold.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pando_vmm::clone::control::Ending;
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, Event, STOP_GRACE, Supervisor};
use pando_vmm::config::{self, MachineRequest};
use pando_vmm::demo::drive::Demo;
use pando_vmm::demo::plan::{Step, lines};
use pando_vmm::machine::HostCheck;
use pando_vmm::payload::model::DataPages;
use pando_vmm::payload::protocol::{Command, Reply};

use crate::command::HANG;
use crate::rig::built_program;

/// RAM of the template's machine.
const MEMORY_BYTES: u64 = 64 << 20;
/// One more than its last page.
const END_PAGE: u64 = MEMORY_BYTES / 4096;

/// A template whose guest has obeyed some commands.
#[derive(Debug)]
pub struct Pasture {
    path: PathBuf,
    /// What its pages hold.
    frozen: DataPages,
    _dir: tempfile::TempDir,
}

impl Pasture {
    /// Makes it, with a guest that obeyed `commands`.
    pub fn new(commands: &[Command]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (spec, _) = config::resolve(&MachineRequest {
            kernel: config::EMBEDDED_KERNEL.into(),
            initrd: None,
            append: String::new(),
            memory_bytes: MEMORY_BYTES,
            cpus: 1,
        })?;
        let path = dir.path().join("template");
        let mut frozen = DataPages::new(END_PAGE);
        let steps = steps(&mut frozen, commands);
        Demo::make_template_of(&path, &spec, Arc::new(AtomicBool::new(false)), &steps)?;
        Ok(Self {
            path,
            frozen,
            _dir: dir,
        })
    }

    /// The template's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn steps(pages: &mut DataPages, commands: &[Command]) -> Vec<Step> {
    let step = |command: &Command| (command.clone(), pages.obey(command));
    commands.iter().map(step).collect()
}

/// Clones that answer for what they do.
#[derive(Debug)]
pub struct Herd {
    /// Who watches over them.
    pub supervisor: Supervisor,
    models: HashMap<usize, DataPages>,
    /// What each clone has not answered yet.
    open: HashMap<usize, VecDeque<Step>>,
    frozen: DataPages,
}

impl Herd {
    /// None yet; `options` are made from the usual ones.
    pub fn new(pasture: &Pasture, options: impl FnOnce(&mut CloneOptions)) -> Result<Self> {
        let mut all = CloneOptions {
            program: built_program("pando")?,
            template: pasture.path.clone(),
            name: "herd".into(),
            engine: pando_vmm::clone::Engine::Copy,
            pager: pando_vmm::clone::control::PagerConfig::default(),
            verbosity: 0,
            overcommit: true,
            measure_memory: false,
            host_check: HostCheck::Due,
            root: pando_vmm::clone::member::RootOptions::default(),
        };
        options(&mut all);
        Ok(Self {
            supervisor: Supervisor::new(all)?,
            models: HashMap::new(),
            open: HashMap::new(),
            frozen: pasture.frozen.clone(),
        })
    }

    /// Starts a clone that obeys `commands`.
    pub fn start(&mut self, commands: &[Command]) -> usize {
        let number = self.supervisor.clones().len();
        let mut model = self.frozen.clone();
        let steps = steps(&mut model, commands);
        self.supervisor
            .start(&SerialPlan::Supervisor, &lines(&steps));
        self.models.insert(number, model);
        self.open.insert(number, steps.into());
        number
    }

    /// Has a clone obey `commands`.
    pub fn ask(&mut self, number: usize, commands: &[Command]) -> Result<()> {
        let model = self.models.get_mut(&number).context("no such clone")?;
        let steps = steps(model, commands);
        let clone = self.supervisor.clone_mut(number);
        let console = clone.and_then(|clone| clone.console.as_mut());
        console.context("no console")?.send(&lines(&steps))?;
        self.open.entry(number).or_default().extend(steps);
        Ok(())
    }

    /// Waits for `until`; every answer is compared with the model, and no clone may end.
    pub fn run(&mut self, mut until: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + HANG;
        while !until(self) {
            ensure!(Instant::now() < deadline, "open: {:?}", self.open.keys());
            for event in self.supervisor.wait(Duration::from_millis(20))? {
                match event {
                    Event::Output(number) => self.hear(number)?,
                    Event::Ended(number) => {
                        let ending = &self.supervisor.clones()[number].ending;
                        bail!("clone {number} ended: {ending:?}")
                    }
                    _ => (),
                }
            }
        }
        Ok(())
    }

    /// Waits until everything was answered.
    pub fn all_answer(&mut self) -> Result<()> {
        self.run(|herd| herd.open.values().all(VecDeque::is_empty))
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

    /// Ends all clones, which must end well.
    pub fn stop(&mut self) -> Result<()> {
        self.supervisor.stop_all(STOP_GRACE)?;
        for (number, clone) in self.supervisor.clones().iter().enumerate() {
            let ending = &clone.ending;
            ensure!(
                *ending == Some(Ending::Stopped),
                "clone {number}: {ending:?}"
            );
        }
        Ok(())
    }
}
