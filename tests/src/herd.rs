#![forbid(unsafe_code)]
//! Clones of a template of the built-in guest, each with a model of what its pages must hold.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pando_vmm::clone::supervise::CloneOptions;
use pando_vmm::demo::plan::Step;
use pando_vmm::payload::model::DataPages;
use pando_vmm::payload::protocol::Command;

use crate::grove::{Grove, MEMORY_BYTES, template_in, usual_options};

/// One more than the last page of the template's machine.
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
        let mut frozen = DataPages::new(END_PAGE);
        let path = template_in(dir.path(), &steps(&mut frozen, commands))?;
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
    /// Where they stand.
    pub grove: Grove,
    models: HashMap<usize, DataPages>,
    frozen: DataPages,
}

impl Herd {
    /// None yet; `change` makes their options of the usual ones.
    pub fn new(pasture: &Pasture, change: impl FnOnce(&mut CloneOptions)) -> Result<Self> {
        let mut options = usual_options(pasture.path.clone())?;
        change(&mut options);
        Ok(Self {
            grove: Grove::of(options)?,
            models: HashMap::new(),
            frozen: pasture.frozen.clone(),
        })
    }

    /// Starts a clone that obeys `commands`.
    pub fn start(&mut self, commands: &[Command]) -> usize {
        let mut model = self.frozen.clone();
        let number = self.grove.start_with(steps(&mut model, commands));
        self.models.insert(number, model);
        number
    }

    /// Has a clone obey `commands`.
    pub fn ask(&mut self, number: usize, commands: &[Command]) -> Result<()> {
        let model = self.models.get_mut(&number).context("no such clone")?;
        self.grove.ask(number, &steps(model, commands))
    }
}
