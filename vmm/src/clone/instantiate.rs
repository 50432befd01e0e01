#![forbid(unsafe_code)]
//! A template and memory joined to a machine: the order of the steps is the order of the calls.

use std::time::{Duration, Instant};

use pando_pager::working_set::{MAX_TOUCHES, Plan, PlanRules, PlannedRun, ZeroReads};
use pando_pager::{Idle, IoMode, Pager, PagerError, PagerOptions, RootMemory, Serving, Verify};
use thiserror::Error;

use super::Engine;
use super::control::{Io, PagerConfig};
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
    /// How long each step took, in order.
    pub stages: Vec<(String, Duration)>,
}

/// Makes a clone of `template`. The pager serves before the machine is restored, because restoring
/// may touch the guest's memory. With `record` the pager keeps what is touched.
pub fn instantiate(
    template: &Template,
    engine: Engine,
    pager: &PagerConfig,
    record: bool,
    serial: SerialTarget,
    host_check: HostCheck,
) -> Result<Instance, CloneError> {
    let start = Instant::now();
    let (backings, pager) = match engine {
        Engine::Copy => {
            let (backings, pager) = paged(template, pager, record)?;
            (backings, Some(pager))
        }
        Engine::Kernel => (mapped(template)?, None),
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
        stages,
    })
}

/// The memory that a fork inherited: as it is where nothing is missing, else with a pager that
/// brings the rest. Must come before anything touches it.
pub(super) fn inherited(
    template: &Template,
    memories: Vec<RootMemory>,
    config: &PagerConfig,
    private: &[PlannedRun],
) -> Result<(Vec<RamBacking>, Option<Pager<Serving>>), CloneError> {
    let mut pager = None;
    let mut backings = Vec::new();
    for (image, memory) in template.images()?.into_iter().zip(memories) {
        let memory = match memory.into_complete() {
            Ok(memory) => memory,
            Err(memory) => {
                let pager = match &mut pager {
                    Some(pager) => pager,
                    None => pager.insert(Pager::new(options(template, config))?),
                };
                pager.attach_inherited(image, memory)?
            }
        };
        backings.push(RamBacking::Paged(memory));
    }
    let pager = pager.map(Pager::<Idle>::serve).transpose()?;
    for run in private {
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

/// What to bring ahead of a clone without a root: all that it is known to need.
pub fn plan_for_copy(template: &Template) -> Plan {
    let rules = PlanRules {
        share_pages: AHEAD_PAGES,
        private_pages: AHEAD_PAGES,
        zero_pages: ZERO_AHEAD_PAGES,
        whole_ranges: false,
        zero_reads: ZeroReads::Skip,
    };
    working_set::plan(template, &rules)
}

/// What to bring ahead of a fork: pages that it is known to write. The others it shares.
pub fn plan_for_root(template: &Template) -> Vec<PlannedRun> {
    let rules = PlanRules {
        share_pages: 0,
        private_pages: AHEAD_PAGES,
        zero_pages: 0,
        whole_ranges: false,
        zero_reads: ZeroReads::Skip,
    };
    working_set::plan(template, &rules).private
}

fn options(template: &Template, config: &PagerConfig) -> PagerOptions {
    PagerOptions {
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
    record: bool,
) -> Result<(Vec<RamBacking>, Pager<Serving>), CloneError> {
    let mut pager = Pager::new(PagerOptions {
        record: record.then_some(MAX_TOUCHES),
        ..options(template, config)
    })?;
    let backings = template
        .images()?
        .into_iter()
        .map(|image| Ok(RamBacking::Paged(pager.attach(image)?)))
        .collect::<Result<_, PagerError>>()?;
    // A run that is recorded must ask for every page itself.
    if config.working_set && !record {
        pager.install_ahead(&plan_for_copy(template));
    }
    Ok((backings, pager.serve()?))
}

fn mapped(template: &Template) -> Result<Vec<RamBacking>, CloneError> {
    template
        .ram_files()
        .iter()
        .zip(template.spec().backends())
        .map(|(file, backend)| Ok(RamBacking::private(file, backend.bytes())?))
        .collect()
}
