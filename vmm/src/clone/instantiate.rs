#![forbid(unsafe_code)]
//! A template and memory joined to a machine: the order of the steps is the order of the calls.

use std::time::{Duration, Instant};

use pando_pager::working_set::{Plan, PlanRules, ZeroReads};
use pando_pager::{
    Idle, IoMode, PageRange, Pager, PagerError, PagerOptions, RootMemory, Serving, Verify,
};
use thiserror::Error;

use super::Engine;
use super::brought::Brought;
use super::control::{Io, PagerConfig};
use super::record::Record;
use crate::device::legacy::console::SerialTarget;
use crate::machine::{HostCheck, Machine, MachineError, Paused};
use crate::memory::guest::{GuestMemoryError, GuestRam, RamBacking};
use crate::template::{Template, TemplateError, working_set};

/// Why a clone could not be made.
#[derive(Debug, Error)]
pub enum CloneError {
    /// The template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Engine `root` without a root.
    #[error("a clone of engine root can only be a fork of its root process")]
    NotForked,
    /// The pager.
    #[error("the clone's pager cannot start")]
    Pager(#[from] PagerError),
    /// The clone's memory.
    #[error("cannot give the clone its memory")]
    Memory(#[from] GuestMemoryError),
    /// The machine.
    #[error("the clone's machine cannot be restored")]
    Machine(#[from] MachineError),
}

/// A clone that is ready to run.
#[derive(Debug)]
pub struct Instance {
    /// Its machine, at the point of the freeze.
    pub machine: Machine<Paused>,
    /// Its pager; engine `kernel` has none. It is stopped after the machine.
    pub pager: Option<Pager<Serving>>,
    /// What was brought ahead of it.
    pub brought: Brought,
    /// How long each step took, in order.
    pub stages: Vec<(String, Duration)>,
}

/// Makes a clone of `template`. The pager serves before the machine is restored, because restoring
/// may touch the guest's memory. With `record` the pager keeps what is touched.
pub fn instantiate(
    template: &Template,
    engine: Engine,
    pager: &PagerConfig,
    record: Option<Record>,
    serial: SerialTarget,
    host_check: HostCheck,
) -> Result<Instance, CloneError> {
    let start = Instant::now();
    let (backings, pager, brought) = match engine {
        Engine::Copy => {
            let (backings, pager, brought) = paged(template, pager, record)?;
            (backings, Some(pager), brought)
        }
        Engine::Kernel => (mapped(template)?, None, Brought::default()),
        Engine::Root => return Err(CloneError::NotForked),
    };
    let ram = GuestRam::new(template.spec().layout(), backings)?;
    let memory = start.elapsed();
    let machine = Machine::restore(template.spec(), ram, template.state(), serial, host_check)?;
    let mut stages = vec![("memory".to_owned(), memory)];
    stages.extend(
        machine
            .stages()
            .iter()
            .map(|(name, took)| (name.to_owned(), took)),
    );
    Ok(Instance {
        machine,
        pager,
        brought,
        stages,
    })
}

/// The memory that a fork inherited: as it is where nothing is missing, else with a pager that
/// brings the rest. Must come before anything touches it. What `brought` plans is there then: in
/// holes it is installed, elsewhere the pages that the clone is known to write become its own.
pub(super) fn inherited(
    template: &Template,
    memories: Vec<RootMemory>,
    config: &PagerConfig,
    record: Option<Record>,
    brought: &Brought,
) -> Result<(Vec<RamBacking>, Option<Pager<Serving>>), CloneError> {
    let holes: Vec<Vec<PageRange>> = memories.iter().map(|m| m.holes().to_vec()).collect();
    let (in_holes, in_root) = brought.plan.split(&holes);
    let mut pager = None;
    let mut backings = Vec::new();
    // Images without a hole are attached too where one has some: they are counted as backends are.
    let is_complete = memories.iter().all(RootMemory::is_complete);
    for (image, memory) in template.images()?.into_iter().zip(memories) {
        let memory = if is_complete {
            memory.into_complete()
        } else {
            Err(memory)
        };
        let memory = match memory {
            Ok(memory) => memory,
            Err(memory) => {
                let pager = match &mut pager {
                    Some(pager) => pager,
                    None => pager.insert(Pager::new(options(template, config, record))?),
                };
                pager.attach_inherited(image, memory)?
            }
        };
        backings.push(RamBacking::Paged(memory));
    }
    if let Some(pager) = &mut pager {
        pager.install_ahead(&in_holes);
    }
    let pager = pager.map(Pager::<Idle>::serve).transpose()?;
    for run in &in_root.private {
        let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
        if let Some(RamBacking::Paged(memory)) = backings.get(backend)
            && let Err(error) = memory.make_private(run.pages)
        {
            // Written pages are copied one by one then.
            tracing::debug!(pages = %run.pages, %error, "pages of the working set stay shared");
        }
    }
    Ok((backings, pager))
}

/// Most pages of the working set that a clone gets of each kind, ahead of its first instruction: 64
/// MiB, some 50 ms.
const AHEAD_PAGES: u64 = 16 << 10;

/// Most zero pages that are mapped beside them: 64 MiB of guest memory, 2 ms, no memory but page tables.
const ZERO_AHEAD_PAGES: u64 = 16 << 10;

/// What to bring ahead of a clone: all that it is known to need.
pub fn plan(template: &Template) -> Plan {
    let rules = PlanRules {
        share_pages: AHEAD_PAGES,
        private_pages: AHEAD_PAGES,
        zero_pages: ZERO_AHEAD_PAGES,
        whole_ranges: false,
        zero_reads: ZeroReads::Skip,
    };
    working_set::plan(template, &rules)
}

/// What to bring of `plan`, if that is wanted; less what is held back where the clone is recorded.
pub(super) fn to_bring(plan: Plan, config: &PagerConfig, record: Option<Record>) -> Brought {
    match record {
        _ if !config.working_set => Brought::default(),
        // A run that is recorded must ask for every page itself.
        Some(Record::Run(_)) => Brought::default(),
        Some(Record::Beginning(_)) => Brought::with_probes(plan, std::process::id().into()),
        None => Brought::all(plan),
    }
}

fn options(template: &Template, config: &PagerConfig, record: Option<Record>) -> PagerOptions {
    PagerOptions {
        record: record.map(Record::max_touches),
        template: template.name(),
        io: match config.io {
            Io::Auto => IoMode::Auto,
            Io::Uring => IoMode::Uring,
            Io::Pread => IoMode::Pread,
        },
        verify: if config.verify {
            Verify::OnRead
        } else {
            Verify::Off
        },
        fault_deadline: config.fault_deadline,
        ..PagerOptions::default()
    }
}

fn paged(
    template: &Template,
    config: &PagerConfig,
    record: Option<Record>,
) -> Result<(Vec<RamBacking>, Pager<Serving>, Brought), CloneError> {
    let mut pager = Pager::new(options(template, config, record))?;
    let backings = template
        .images()?
        .into_iter()
        .map(|image| Ok(RamBacking::Paged(pager.attach(image)?)))
        .collect::<Result<_, PagerError>>()?;
    let mut brought = Brought::default();
    if config.working_set {
        brought = to_bring(plan(template), config, record);
        pager.install_ahead(&brought.plan);
    }
    Ok((backings, pager.serve()?, brought))
}

fn mapped(template: &Template) -> Result<Vec<RamBacking>, CloneError> {
    template
        .ram_files()
        .iter()
        .zip(template.spec().backends())
        .map(|(file, backend)| Ok(RamBacking::private(file, backend.bytes())?))
        .collect()
}
