#![forbid(unsafe_code)]
//! A template and memory joined to a machine: the order of the steps is the order of the calls.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use pando_pager::working_set::{HUGE_RANGE_PAGES, Plan, PlanRules};
use pando_pager::{
    CloneMemory, FaultCounts, PageRange, Pager, PagerError, PagerOptions, Registration, RootMemory,
    RootRange, Serving,
};
use thiserror::Error;

use super::Engine;
use super::brought::Brought;
use super::consoles::ConsoleError;
use super::control::{
    Channel, ClientMemory, ControlError, FromWorker, IO_SHARED, PagerConfig, PagerPlace, RawRegion,
};
use super::give_back::keeper::Keeper;
use super::record::Record;
use super::vsock::VsockError;
use crate::machine::{Connections, HostCheck, Machine, MachineError, MachineHandle, Paused};
use crate::memory::discard::{DiscardGate, Discards};
use crate::memory::guest::{GuestMemoryError, GuestRam, RamBacking};
use crate::memory::layout::PAGE_BYTES;
use crate::report::chain;
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
    /// More memories than the template has RAM files.
    #[error("the root has more memories than its template has RAM files")]
    MemoryCount,
    /// The memory, or the pager of its own.
    #[error("memory that a pager serves cannot be made")]
    Pager(#[from] PagerError),
    /// The supervisor cannot be told.
    #[error("cannot hand the clone's memory over to the pager process")]
    HandOver(#[from] ControlError),
    /// The clone's memory.
    #[error("cannot give the clone its memory")]
    Memory(#[from] GuestMemoryError),
    /// A network device that cannot be.
    #[error("cannot connect the clone to its network: {0}")]
    Net(String),
    /// A document that cannot be.
    #[error("cannot make the clone's document: {0}")]
    Document(String),
    /// The machine.
    #[error("the clone's machine cannot be restored")]
    Machine(#[from] MachineError),
    /// Its vsock device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// Ports of its consoles.
    #[error(transparent)]
    Console(#[from] ConsoleError),
}

/// A clone that is ready to run.
#[derive(Debug)]
pub struct Instance {
    /// Its machine, at the point of the freeze.
    pub machine: Machine<Paused>,
    /// Its pager. One of its own is stopped after the machine.
    pub paging: Paging,
    /// What was brought ahead of it.
    pub brought: Brought,
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
        let regions = registration.regions().iter();
        let memory = ClientMemory {
            regions: regions
                .map(|region| RawRegion {
                    image: region.image.number(),
                    address: region.address,
                    first_page: region.pages.start().get(),
                    pages: region.pages.count().get(),
                })
                .collect(),
            cpu: self.cpu,
            track_writes: registration.tracks_writes(),
            discards: registration.discard_map().is_some(),
        };
        let message = FromWorker::Memory(memory);
        let map = registration.discard_map();
        let descriptors: Vec<_> = [registration.as_fd()].into_iter().chain(map).collect();
        Ok(self.channel.send(&message, &descriptors)?)
    }
}

/// Makes a clone of `template`. Its memory is registered, and by a pager of its own served, before
/// the machine is restored, because restoring may touch it. With `record` a pager of its own keeps
/// what is touched.
pub fn instantiate(
    template: &Template,
    engine: Engine,
    pager: &PagerConfig,
    record: Option<Record>,
    connections: Connections,
    host_check: HostCheck,
    handover: Handover<'_>,
) -> Result<Instance, CloneError> {
    let start = Instant::now();
    let (backings, paging, brought) = match engine {
        Engine::Copy if pager.place == PagerPlace::Shared && record.is_none() => {
            let (backings, brought) = handed_over(template, pager, handover)?;
            (backings, Paging::Shared, brought)
        }
        Engine::Copy => {
            let (backings, pager, brought) = paged(template, pager, record)?;
            (backings, Paging::Own(pager), brought)
        }
        Engine::Kernel => (mapped(template)?, Paging::None, Brought::default()),
        Engine::Root => return Err(CloneError::NotForked),
    };
    let ram = GuestRam::new(template.spec().layout(), backings)?;
    let ram = ram.with_gate(gate(template, engine, pager));
    let memory = start.elapsed();
    let machine = Machine::restore(
        template.spec(),
        ram,
        template.state(),
        connections,
        host_check,
    )?;
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
        brought,
        stages,
    })
}

/// The memory that a fork inherited: as it is where nothing is missing, else with a pager that
/// brings the rest. Must come before anything touches it. What `brought` plans is there then: in
/// holes it is installed, elsewhere the pages that the clone is known to write become its own.
pub(super) fn inherited(
    template: &Template,
    mut memories: Vec<RootMemory>,
    config: &PagerConfig,
    record: Option<Record>,
    brought: &Brought,
    handover: Handover<'_>,
) -> Result<(Vec<RamBacking>, Paging), CloneError> {
    let holes: Vec<Vec<PageRange>> = memories.iter().map(|m| m.holes().to_vec()).collect();
    let (in_holes, in_root) = brought.plan.split(&holes);
    let is_tracked = config.give_back.is_some();
    if is_tracked {
        for (memory, backend) in memories.iter_mut().zip(0..) {
            let own = in_root.private.iter().filter(|run| run.backend == backend);
            memory.serve_too(own.map(|run| run.pages));
        }
    }
    let is_complete = memories.iter().all(RootMemory::is_complete);
    let (backings, paging) = if is_complete {
        (inherited_whole(memories, config)?, Paging::None)
    } else if config.place == PagerPlace::Shared && record.is_none() {
        let backings = inherited_shared(template, memories, config, &in_holes, handover)?;
        (backings, Paging::Shared)
    } else {
        let (backings, pager) = inherited_own(template, memories, config, record, &in_holes)?;
        (backings, Paging::Own(pager))
    };
    for run in &in_root.private {
        let backend = usize::try_from(run.backend).unwrap_or(usize::MAX);
        let Some(RamBacking::Paged(memory)) = backings.get(backend) else {
            continue;
        };
        if let Err(error) = memory.make_private(run.pages) {
            // Written pages are copied one by one then.
            tracing::debug!(pages = %run.pages, %error, "pages of the working set stay shared");
        } else if is_tracked && let Err(error) = memory.track(run.pages) {
            tracing::debug!(pages = %run.pages, %error, "pages count as written");
        }
    }
    Ok((backings, paging))
}

/// Who is asked before a clone's memory is discarded. It is a template's, all of it.
pub(super) fn gate(template: &Template, engine: Engine, config: &PagerConfig) -> DiscardGate {
    let discards = if config.discard_to_zero && engine != Engine::Kernel {
        Discards::Zero
    } else {
        Discards::Refused
    };
    DiscardGate::of_clone(template.spec(), discards)
}

/// Asks the guest for the memory that it is to give away. It hears of it when it runs.
pub(super) fn inflate(handle: &MachineHandle, config: &PagerConfig) -> Result<(), CloneError> {
    let Some(bytes) = config.inflate_bytes else {
        return Ok(());
    };
    if let Some(balloon) = handle.balloon()? {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        balloon.set_target(pages);
    }
    Ok(())
}

fn backings(memories: Vec<CloneMemory>) -> Vec<RamBacking> {
    memories.into_iter().map(RamBacking::Paged).collect()
}

fn inherited_whole(
    memories: Vec<RootMemory>,
    config: &PagerConfig,
) -> Result<Vec<RamBacking>, CloneError> {
    let whole = memories.into_iter().map(RootMemory::into_complete);
    let whole = whole.collect::<Result<Vec<_>, _>>();
    let mut memories = whole.map_err(|_| CloneError::NotForked)?;
    if config.discard_to_zero {
        for memory in &mut memories {
            memory
                .allow_discards_alone()
                .map_err(|source| PagerError::Setup {
                    what: "a map of discarded pages",
                    source,
                })?;
        }
    }
    Ok(backings(memories))
}

fn inherited_own(
    template: &Template,
    memories: Vec<RootMemory>,
    config: &PagerConfig,
    record: Option<Record>,
    ahead: &Plan,
) -> Result<(Vec<RamBacking>, Pager<Serving>), CloneError> {
    let options = PagerOptions {
        // Its root may fill for others what this one asks for.
        fault_counts: FaultCounts::ByRange,
        ..options(template, config, record)
    };
    let mut pager = Pager::new(options)?;
    let mut memories = template
        .images()?
        .into_iter()
        .zip(memories)
        .map(|(image, memory)| pager.attach_inherited(image, memory))
        .collect::<Result<Vec<_>, PagerError>>()?;
    if config.discard_to_zero {
        pager.allow_discards(memories.iter_mut())?;
    }
    pager.install_ahead(ahead);
    Ok((backings(memories), pager.serve()?))
}

/// Who has the clone give memory back, if that is wanted.
pub(super) fn keeper(config: &PagerConfig) -> Option<Keeper> {
    match Keeper::new(config.give_back?) {
        Ok(keeper) => Some(keeper),
        Err(error) => {
            tracing::warn!("no memory is given back: {}", chain(&error));
            None
        }
    }
}

fn registration(config: &PagerConfig) -> Result<Registration, PagerError> {
    match config.give_back {
        Some(_) => Registration::tracking_writes(),
        None => Registration::new(),
    }
}

/// Memories without a hole are registered too, of no page: so they are counted as images are.
fn inherited_shared(
    template: &Template,
    memories: Vec<RootMemory>,
    config: &PagerConfig,
    ahead: &Plan,
    handover: Handover<'_>,
) -> Result<Vec<RamBacking>, CloneError> {
    let mut registration = registration(config)?;
    let images = template.images()?;
    let mut memories = images
        .iter()
        .zip(memories)
        .map(|(image, memory)| registration.inherit(image, memory))
        .collect::<Result<Vec<_>, PagerError>>()?;
    if config.discard_to_zero {
        registration.allow_discards(memories.iter_mut())?;
    }
    handover.give(&registration)?;
    registration.install_ahead(&images, ahead, config.verify, &template.name());
    Ok(backings(memories))
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
    };
    working_set::plan(template, &rules)
}

/// What a root of `budget_pages` fills first: the ranges of what clones are known to need.
pub fn first_ranges(template: &Template, budget_pages: u64) -> Vec<RootRange> {
    let rules = PlanRules {
        share_pages: budget_pages,
        private_pages: AHEAD_PAGES,
        zero_pages: 0,
        whole_ranges: true,
    };
    let plan = working_set::plan(template, &rules);
    let mut first = Vec::new();
    let mut seen = HashSet::new();
    for run in plan.whole.iter().chain(&plan.private).chain(&plan.share) {
        let last = run.pages.end().get().max(run.pages.start().get() + 1) - 1;
        for unit in run.pages.start().get() / HUGE_RANGE_PAGES..=last / HUGE_RANGE_PAGES {
            let range = RootRange {
                backend: run.backend,
                unit,
            };
            if seen.insert(range) {
                first.push(range);
            }
        }
    }
    first
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
        track_writes: config.give_back.is_some() || record.is_some(),
        template: template.name(),
        io: config.io.into(),
        verify: config.verify(),
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
    let mut memories = template
        .images()?
        .into_iter()
        .map(|image| pager.attach(image))
        .collect::<Result<Vec<_>, PagerError>>()?;
    if config.discard_to_zero {
        pager.allow_discards(memories.iter_mut())?;
    }
    let mut brought = Brought::default();
    if config.working_set {
        brought = to_bring(plan(template), config, record);
        pager.install_ahead(&brought.plan);
    }
    Ok((backings(memories), pager.serve()?, brought))
}

/// Memory that the pager process serves. What the working set knows is installed by this process,
/// before its guest runs: it is read from the page cache then, and no message is waited for.
fn handed_over(
    template: &Template,
    config: &PagerConfig,
    handover: Handover<'_>,
) -> Result<(Vec<RamBacking>, Brought), CloneError> {
    let images = template.images()?;
    let mut registration = registration(config)?;
    let mut memories = images
        .iter()
        .map(|image| registration.map(image))
        .collect::<Result<Vec<_>, PagerError>>()?;
    if config.discard_to_zero {
        registration.allow_discards(memories.iter_mut())?;
    }
    handover.give(&registration)?;
    let mut brought = Brought::default();
    if config.working_set {
        brought = to_bring(plan(template), config, None);
        registration.install_ahead(&images, &brought.plan, config.verify, &template.name());
    }
    Ok((backings(memories), brought))
}

fn mapped(template: &Template) -> Result<Vec<RamBacking>, CloneError> {
    template
        .ram_files()
        .iter()
        .zip(template.spec().backends())
        .map(|(file, backend)| Ok(RamBacking::private(file, backend.bytes())?))
        .collect()
}
