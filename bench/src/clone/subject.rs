#![forbid(unsafe_code)]
//! The template that clones are made of.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pando_pager::image::PageKind;
use pando_vmm::arch::x86_64::boot::BootSource;
use pando_vmm::clone::control::PagerConfig;
use pando_vmm::clone::record::Recording;
use pando_vmm::clone::warm::{WarmOptions, Warmer};
use pando_vmm::config::{self, MachineRequest};
use pando_vmm::payload::protocol::{READY_LINE, Reply};
use pando_vmm::template::Template;
use pando_vmm::template::build::{Ready, TemplateVm};
use pando_vmm::template::working_set::WorkingSetFile;
use tempfile::TempDir;

use super::fleet::Sample;
use super::workload::{self, Workload};
use crate::page_cache;
use crate::stats::Summary;

/// Runs that a working set is learned from.
const RECORDED_RUNS: u64 = 2;
/// A guest that says nothing for this long is given up.
const SILENCE: Duration = Duration::from_secs(120);

/// A template of the built-in guest in a folder of its own, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Subject {
    /// The template.
    pub(crate) dir: PathBuf,
    /// Its pages with data.
    pub(crate) data_pages: u64,
    /// Rate of the guest's time stamp counter, where KVM tells.
    tsc_khz: Option<u32>,
    ram: Vec<PathBuf>,
    _parent: TempDir,
}

impl Subject {
    /// Boots the built-in guest with `memory_bytes` of RAM, fills pages, and freezes it.
    pub(crate) fn make(memory_bytes: u64, folder: Option<&Path>) -> Result<Self> {
        let parent = match folder {
            Some(folder) => TempDir::with_prefix_in("pando-bench-", folder),
            None => TempDir::with_prefix("pando-bench-"),
        }
        .context("cannot make a folder for the template")?;
        let (spec, boot): (_, BootSource) = config::resolve(&MachineRequest {
            kernel: config::EMBEDDED_KERNEL.into(),
            initrd: None,
            append: String::new(),
            memory_bytes,
            cpus: 1,
        })?;
        let dir = parent.path().join("template");
        let mut vm = TemplateVm::boot(&dir, &spec, &boot, true)?;
        let ready = Ready::Serial(READY_LINE.trim_end().into());
        vm.wait_ready(&ready, SILENCE, &mut |_| ())?;
        // What is left of the ready line.
        vm.console.line(SILENCE)?;
        vm.console.send(&workload::fill().encode())?;
        let line = vm.console.line(SILENCE)?;
        let reply = Reply::parse(&line)?;
        ensure!(
            reply.ticks.is_some(),
            "the template's guest answered {line:?}"
        );
        let template = vm.freeze(&mut |_, _| ())?;
        let backends = template.index().backends();
        let data_pages = backends
            .iter()
            .map(|(_, index)| index.count(PageKind::Data).get())
            .sum();
        Ok(Self {
            data_pages,
            tsc_khz: template.state().tsc_khz,
            ram: (0..backends.len())
                .map(|backend| template.ram_path(backend))
                .collect(),
            dir,
            _parent: parent,
        })
    }

    /// Teaches the template which pages `workload` touches.
    pub(crate) fn record(&self, program: &Path, workload: Workload) -> Result<()> {
        let (command, _) = workload.command(0);
        (0..RECORDED_RUNS).try_for_each(|_| self.record_input(program, command.encode()))
    }

    /// Teaches the template which pages one clone touches that is sent `input`.
    pub(crate) fn record_input(&self, program: &Path, input: Vec<u8>) -> Result<()> {
        let warmer = Warmer::new(WarmOptions {
            program: program.to_owned(),
            template: self.dir.clone(),
            pager: PagerConfig::default(),
            verbosity: 0,
            input,
            recording: Recording {
                idle: Duration::from_millis(500),
                limit: Duration::from_secs(20),
            },
        })?;
        let trace = warmer.run(1)?.trace;
        let template = Template::open(&self.dir)?;
        WorkingSetFile::of(&template).learn_run(&trace)?;
        Ok(())
    }

    /// The files with its RAM.
    pub(crate) fn ram(&self) -> &[PathBuf] {
        &self.ram
    }

    /// Sees to it that the page cache has none of the template's RAM, if `cold`. Else all of it is
    /// there: it was written a moment ago.
    pub(crate) fn warm_or_cold(&self, cold: bool) -> Result<()> {
        if cold {
            self.ram
                .iter()
                .try_for_each(|path| page_cache::drop_file(path))?;
        }
        Ok(())
    }

    /// What the guest's work took by its own clock, where the answers told.
    pub(crate) fn guest_times(&self, samples: &[Sample]) -> Result<Option<Summary>> {
        let Some(khz) = self.tsc_khz.filter(|&khz| khz > 0) else {
            return Ok(None);
        };
        let times: Option<Vec<Duration>> = samples
            .iter()
            .map(|sample| {
                let ns = u128::from(sample.ticks?) * 1_000_000 / u128::from(khz);
                Some(Duration::from_nanos(u64::try_from(ns).ok()?))
            })
            .collect();
        times.as_deref().map(Summary::of).transpose()
    }
}
