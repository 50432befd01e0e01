#![forbid(unsafe_code)]
//! A clone that is a fork of its root: a shell with memory and machine made, which waits for its
//! orders, and then runs.

use std::time::{Duration, Instant};

use anyhow::Context;
use pando_pager::RootMemory;
use pando_pager::working_set::Plan;

use super::Engine;
use super::attend::{
    Ready, run_to_end, send, send_metrics, stop_with, watch_signals, watch_to_end,
};
use super::control::{
    Channel, Ending, FromWorker, PagerConfig, PagerPlace, ToWorker, WorkerConfig, monotonic,
};
use super::instantiate::{CloneError, Handover, gate, inflate, inherited, keeper, to_bring};
use super::marks;
use super::nets;
use super::placement::Placement;
use super::record::{Record, Recorded};
use super::sight;
use super::worker::{die_with, exit_code, serial_target};
use crate::device::legacy::console::SerialTarget;
use crate::machine::{HostCheck, Machine, Paused, Stages};
use crate::memory::guest::GuestRam;
use crate::observe::log;
use crate::observe::memory::ram::MemoryPlace;
use crate::observe::relay::Relay;
use crate::report::chain;
use crate::spec::CpuCount;
use crate::sys::pagemap::Pagemap;
use crate::template::Template;

/// What a fork has of its root.
#[derive(Debug)]
pub struct Inheritance {
    /// What the supervisor calls this process.
    pub id: u64,
    /// Whether its orders are on their way: it is a clone at once, and never a shell.
    pub is_wanted: bool,
    /// The template, open and proven.
    pub template: Template,
    /// Its memory, one per backend, in the machine's order. Holes are not registered yet.
    pub memories: Vec<RootMemory>,
    /// What clones are known to need.
    pub plan: Plan,
    /// What of it is to be recorded, if anything.
    pub record: Option<Record>,
    /// How its pager works, where it needs one.
    pub pager: PagerConfig,
    /// Whether this host was compared with the template.
    pub host_check: HostCheck,
    /// The process that must be its parent, lest it outlive it unseen.
    pub supervisor_pid: u32,
}

/// Runs the clone. Returns the process's exit code.
pub fn run(channel: &Channel, inheritance: Inheritance) -> u8 {
    log::become_shell(inheritance.id);
    // Only a pager of its own records anything here, and devices that discard memory.
    let is_complete = inheritance.memories.iter().all(RootMemory::is_complete);
    let is_shared = inheritance.pager.place == PagerPlace::Shared && inheritance.record.is_none();
    let mut devices = inheritance.template.spec().devices().iter();
    let has_balloon = devices.any(|device| device.balloon().is_some());
    let is_quiet = (is_complete || is_shared) && !has_balloon;
    let relay = if is_quiet { None } else { Relay::install() };
    let ending =
        work(channel, relay.as_ref(), inheritance).unwrap_or_else(|error| Ending::Failed {
            code: exit_code(&error),
            message: chain(error.as_ref()),
        });
    let code = ending.exit_code();
    send_metrics(channel, relay.as_ref());
    send(channel, &FromWorker::Ended(ending));
    code
}

fn work(
    channel: &Channel,
    relay: Option<&Relay>,
    inheritance: Inheritance,
) -> anyhow::Result<Ending> {
    let Inheritance {
        is_wanted,
        template,
        memories,
        plan,
        record,
        pager,
        host_check,
        supervisor_pid,
        ..
    } = inheritance;
    let began = monotonic();
    let start = Instant::now();
    die_with(supervisor_pid)?;
    let placement = placement(&memories, &pager, &template);
    let keeper = keeper(&pager);
    let mut brought = to_bring(plan, &pager, record);
    if record.is_some() {
        brought.unasked.extend(of_root(&memories)?);
    }
    let handover = Handover {
        channel,
        cpu: placement.as_ref().and_then(Placement::cpu),
    };
    let (backings, paging) = inherited(&template, memories, &pager, record, &brought, handover)?;
    let ram = GuestRam::new(template.spec().layout(), backings).map_err(CloneError::from)?;
    let ram = ram.with_gate(gate(&template, Engine::Root, &pager));
    let mut ready = Ready {
        channel,
        relay,
        paging,
        placement,
        record: record.map(|record| Recorded::new(record, &template, brought)),
        keeper,
        began,
        stages: vec![("memory".to_owned(), start.elapsed())],
    };
    if is_wanted {
        let Some((config, descriptors)) = receive_orders(channel)? else {
            return Ok(Ending::Stopped);
        };
        log::become_clone(config.clone);
        let serial = serial_target(&config.serial, descriptors)?;
        let machine = Machine::restore_and_run(
            template.spec(),
            ram,
            template.state(),
            nets::connections(&template, &config, serial)?,
            host_check,
            |handle| stop_with(ready.paging.own(), handle),
        )
        .map_err(CloneError::from)?;
        add_stages(&mut ready.stages, machine.stages());
        inflate(&machine.handle(), &pager)?;
        // Nobody knows of this process before it says that it has started.
        let signals = watch_signals()?;
        return watch_to_end(machine, ready, &signals);
    }
    let signals = watch_signals()?;
    let machine = Machine::restore(
        template.spec(),
        ram,
        template.state(),
        template
            .connections(SerialTarget::Later)
            .map_err(CloneError::from)?,
        host_check,
    )
    .map_err(CloneError::from)?;
    add_stages(&mut ready.stages, machine.stages());
    let is_warm = !channel.has_message();
    if is_warm {
        send(channel, &FromWorker::Warm);
    }
    let Some(orders) = receive_orders(channel)? else {
        return Ok(Ending::Stopped);
    };
    if is_warm {
        // Made ahead of the request: what counts begins now.
        ready.began = monotonic();
        ready.stages.clear();
    }
    connect(&machine, &template, orders, &mut ready.stages)?;
    inflate(&machine.handle(), &pager)?;
    run_to_end(machine, ready, &signals)
}

/// Keeps the clone on one CPU, where that is of use: one vCPU, and a pager that it waits for.
fn placement(
    memories: &[RootMemory],
    config: &PagerConfig,
    template: &Template,
) -> Option<Placement> {
    let needs_pager = !memories.iter().all(RootMemory::is_complete);
    let is_useful = needs_pager && config.keep_together && template.spec().cpus() == CpuCount::ONE;
    is_useful.then(Placement::together).flatten()
}

fn add_stages(stages: &mut Vec<(String, Duration)>, made: &Stages) {
    stages.extend(made.iter().map(|(name, took)| (name.to_owned(), took)));
}

/// What a fork has of its root, before anything is installed in it.
fn of_root(memories: &[RootMemory]) -> anyhow::Result<Vec<sight::Unasked>> {
    let map = Pagemap::of_self().context("cannot see what is inherited")?;
    sight::present(&map, &places(memories)).context("cannot see what is inherited")
}

fn places(memories: &[RootMemory]) -> Vec<MemoryPlace> {
    let places = memories.iter().map(RootMemory::place);
    places
        .map(|(address, bytes)| MemoryPlace { address, bytes })
        .collect()
}

type Orders = (WorkerConfig, Vec<std::os::fd::OwnedFd>);

/// `None` when it is not needed, or its supervisor is gone.
fn receive_orders(channel: &Channel) -> anyhow::Result<Option<Orders>> {
    match channel.receive::<ToWorker>()? {
        // They may have been on their way while its root died: another fork has them by now.
        Some((ToWorker::Start(config), descriptors)) if !channel.is_hung_up() => {
            Ok(Some((*config, descriptors)))
        }
        Some(_) | None => Ok(None),
    }
}

/// Gives the machine its identity: its console, its network, and where its vsock is reached.
fn connect(
    machine: &Machine<Paused>,
    template: &Template,
    (config, descriptors): Orders,
    stages: &mut Vec<(String, Duration)>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    log::become_clone(config.clone);
    let serial = serial_target(&config.serial, descriptors)?;
    machine
        .bind_serial(serial)
        .map_err(CloneError::from)
        .context("cannot connect its serial port")?;
    if let Some(connection) = nets::vsock(template, &config)? {
        machine.bind_vsock(connection).map_err(CloneError::from)?;
    }
    let marks = marks::of(template, &config)?;
    machine.bind_marks(marks).map_err(CloneError::from)?;
    let nets = nets::connect(template, &config)?;
    if !nets.is_empty() {
        machine.bind_nets(nets).map_err(CloneError::from)?;
    }
    let consoles = nets::consoles(template, &config)?;
    if !consoles.is_empty() {
        machine.bind_consoles(consoles).map_err(CloneError::from)?;
    }
    for (device, attachment) in nets::plugged(template, &config)? {
        let plugged = machine.handle().plug(device, attachment);
        plugged.map_err(CloneError::from)?;
    }
    stages.push(("identity".to_owned(), start.elapsed()));
    Ok(())
}
