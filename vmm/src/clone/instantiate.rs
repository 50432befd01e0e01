#![forbid(unsafe_code)]
//! A template and memory joined to a machine: the order of the steps is the order of the calls.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use pando_pager::working_set::{MAX_TOUCHES, Plan, PlanRules, PlannedRun, ZeroReads};
use pando_pager::{
    Idle, IoMode, Pager, PagerError, PagerOptions, Registration, RootMemory, Serving, Verify,
};
use thiserror::Error;

use super::Engine;
use super::control::{
    Channel, ClientMemory, ControlError, FromWorker, IO_SHARED, Io, PagerConfig, PagerPlace,
    RawRegion,
};
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
    /// The supervisor cannot be told.
    #[error("cannot hand the clone's memory over to the pager process")]
    HandOver(#[from] ControlError),
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
    /// Its pager. One of its own is stopped after the machine.
    pub paging: Paging,
    /// How long each step took, in order.
    pub stages: Vec<(String, Duration)>,
}

/// Who brings the pages that are missing.
#[derive(Debug)]
pub enum Paging {
    /// Nobody: none is, or the kernel does.
    None,
    /// A thread of this process.
    Own(Pager<Serving>),
    /// The pager process.
    Shared,
}

impl Paging {
    /// The pager of this process, if it has one.
    pub fn own(&self) -> Option<&Pager<Serving>> {
        match self {
            Self::Own(pager) => Some(pager),
            Self::None | Self::Shared => None,
        }
    }

    /// How template pages are read, as far as this process knows.
    pub fn io(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Own(pager) => pager.io().name(),
            Self::Shared => IO_SHARED,
        }
    }
}

/// The way to whoever has memory served by the pager process.
#[derive(Debug, Clone, Copy)]
pub struct Handover<'a> {
    /// The supervisor.
    pub channel: &'a Channel,
    /// The CPU that the clone is kept on, if it is.
    pub cpu: Option<u32>,
}

impl Handover<'_> {
    /// Hands it over. What touches it sleeps until it is served; nobody waits for that here.
    fn give(&self, registration: &Registration) -> Result<(), CloneError> {
        let regions = (0..).zip(registration.places());
        let memory = ClientMemory {
            regions: regions
                .map(|(image, place)| RawRegion {
                    image,
                    address: place.address,
                    first_page: 0,
                    pages: place.pages.get(),
                })
                .collect(),
            cpu: self.cpu,
        };
        let message = FromWorker::Memory(memory);
        Ok(self.channel.send(&message, &[registration.as_fd()])?)
    }
}

/// Makes a clone of `template`. Its memory is registered, and by a pager of its own served, before
/// the machine is restored, because restoring may touch it. With `record` a pager of its own keeps
/// what is touched.
pub fn instantiate(
    template: &Template,
    engine: Engine,
    pager: &PagerConfig,
    record: bool,
    serial: SerialTarget,
    host_check: HostCheck,
    handover: Handover<'_>,
) -> Result<Instance, CloneError> {
    let start = Instant::now();
    let (backings, paging) = match engine {
        Engine::Copy if pager.place == PagerPlace::Shared && !record => {
            let backings = handed_over(template, pager, handover)?;
            (backings, Paging::Shared)
        }
        Engine::Copy => {
            let (backings, pager) = paged(template, pager, record)?;
            (backings, Paging::Own(pager))
        }
        Engine::Kernel => (mapped(template)?, Paging::None),
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
        paging,
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
    handover: Handover<'_>,
) -> Result<(Vec<RamBacking>, Paging), CloneError> {
    let is_complete = memories.iter().all(RootMemory::is_complete);
    let (backings, paging) = match config.place {
        PagerPlace::Shared if !is_complete => (
            inherited_shared(template, memories, handover)?,
            Paging::Shared,
        ),
        _ => inherited_own(template, memories, config)?,
    };
    for run in private {
        let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
        if let Some(RamBacking::Paged(memory)) = backings.get(backend)
            && let Err(error) = memory.make_private(run.pages)
        {
            // Written pages are copied one by one then.
            tracing::debug!(pages = %run.pages, %error, "pages of the working set stay shared");
        }
    }
    Ok((backings, paging))
}

fn inherited_own(
    template: &Template,
    memories: Vec<RootMemory>,
    config: &PagerConfig,
) -> Result<(Vec<RamBacking>, Paging), CloneError> {
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
    let paging = match pager.map(Pager::<Idle>::serve).transpose()? {
        Some(pager) => Paging::Own(pager),
        None => Paging::None,
    };
    Ok((backings, paging))
}

/// Memories without a hole are registered too, of no page: so places are images, one for one.
fn inherited_shared(
    template: &Template,
    memories: Vec<RootMemory>,
    handover: Handover<'_>,
) -> Result<Vec<RamBacking>, CloneError> {
    let mut registration = Registration::new()?;
    let backings = template
        .images()?
        .iter()
        .zip(memories)
        .map(|(image, memory)| Ok(RamBacking::Paged(registration.inherit(image, memory)?)))
        .collect::<Result<_, PagerError>>()?;
    handover.give(&registration)?;
    Ok(backings)
}

/// Most pages of the working set that a clone gets of each kind, ahead of its first instruction: 64
/// MiB, some 50 ms.
const AHEAD_PAGES: u64 = 16 << 10;

/// What to bring ahead of a clone without a root: all that it is known to need.
pub fn plan_for_copy(template: &Template) -> Plan {
    let rules = PlanRules {
        share_pages: AHEAD_PAGES,
        private_pages: AHEAD_PAGES,
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

/// Memory that the pager process serves. What the working set knows is installed by this process,
/// before its guest runs: it is read from the page cache then, and no message is waited for.
fn handed_over(
    template: &Template,
    config: &PagerConfig,
    handover: Handover<'_>,
) -> Result<Vec<RamBacking>, CloneError> {
    let images = template.images()?;
    let mut registration = Registration::new()?;
    let backings = images
        .iter()
        .map(|image| Ok(RamBacking::Paged(registration.map(image)?)))
        .collect::<Result<_, PagerError>>()?;
    handover.give(&registration)?;
    if config.working_set {
        let plan = plan_for_copy(template);
        registration.install_ahead(&images, &plan, config.verify, &template.name());
    }
    Ok(backings)
}

fn mapped(template: &Template) -> Result<Vec<RamBacking>, CloneError> {
    template
        .ram_files()
        .iter()
        .zip(template.spec().backends())
        .map(|(file, backend)| Ok(RamBacking::private(file, backend.bytes())?))
        .collect()
}
