#![forbid(unsafe_code)]
//! Engine `root` in the supervisor: the root process, the shells that wait, the clones that are
//! being forked.
//!
//! ```text
//! start --> a shell waits?  -- yes --> it gets its orders
//!              | no
//!              v
//!           waiting -- Fork, few at a time --> flying -- Forked --> the clone has its process
//!              ^                                  |
//!              +------ the root died -------------+
//! ```

mod ended;
mod failed;
mod rooms;
mod shells;
mod strays;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::cgroup::CloneGroup;
use super::control::{Channel, Ending, FromWorker};
use super::hole_faults::HoleFaults;
use super::member::{Clone, Event};
use super::paging::Owner;
use super::pool::Demand;
use super::process::{ChildProcess, CloneProcess, SerialPlan, SpawnError, give_orders};
use super::root_care::Refill;
use super::silence::Silence;
use super::supervise::{Supervisor, saved_terminal};
use super::token::{self, Kind};
use crate::console::GuestConsole;
use crate::machine::HostCheck;
use crate::observe::memory::available_bytes;
use crate::observe::metrics;
use crate::pager_process::descriptor;
use crate::report::{chain, exit};
use crate::root::process::RootProcess;
use crate::root::protocol::{FromRoot, RootConfig};

/// Most forks that are asked for and not made: neither end of a socket may fill it while the other
/// does the same.
const FLYING_LIMIT: usize = 8;
/// A root that died is replaced this often ...
const RESTART_LIMIT: usize = 8;
/// ... in this time; after that what kills it is no accident.
const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// Who a fork is for.
#[derive(Debug)]
pub(super) enum Purpose {
    Clone {
        number: usize,
        serial: SerialPlan,
        input: Vec<u8>,
        requested: Instant,
    },
    Shell,
}

/// A fork that was asked for.
#[derive(Debug)]
pub(super) struct Flight {
    purpose: Purpose,
    channel: Channel,
    console: Option<GuestConsole>,
    pub(super) asked: Instant,
    group: Option<CloneGroup>,
}

/// A fork that waits for its orders, or will in a moment.
#[derive(Debug)]
pub(super) struct Shell {
    pub(super) id: u64,
    pub(super) process: ChildProcess,
    pub(super) channel: Channel,
    is_warm: bool,
}

/// What the supervisor has of engine `root`. Each request in it is one of a clone that was asked
/// for, or of a pool that has a ceiling.
#[derive(Debug, Default)]
pub struct Forks {
    pub(super) root: Option<RootProcess>,
    pub(super) is_ready: bool,
    /// How long the root has said nothing though it owed an answer.
    pub(super) silence: Silence,
    pub(super) hole_faults: HoleFaults,
    pub(super) waiting: VecDeque<Purpose>,
    pub(super) flying: HashMap<u64, Flight>,
    /// One for each fork under way: room for the descriptor of its process. Without room the kernel
    /// drops that descriptor, and a process that nobody can wait for is left.
    rooms: Vec<OwnedFd>,
    strays: strays::Strays,
    pub(super) shells: Vec<Shell>,
    pub(super) demand: Demand,
    pub(super) refill: Refill,
    /// The pool is too small and waits for a calm moment.
    pub(super) is_short: bool,
    /// Shells that were killed and have not ended.
    pub(super) dying: Vec<ChildProcess>,
    next_id: u64,
    restarts: VecDeque<Instant>,
    /// Bytes that the root holds for all clones, and bytes of its holes.
    pub filled: Option<(u64, u64)>,
    /// Roots that were started.
    pub roots_started: u64,
    pub(super) is_ended: bool,
}

impl Forks {
    /// How many shells have their machine made.
    pub fn warm(&self) -> usize {
        self.shells.iter().filter(|shell| shell.is_warm).count()
    }

    /// The process number of the root, if there is one.
    pub fn root_pid(&self) -> Option<u32> {
        self.root.as_ref().map(RootProcess::pid)
    }

    pub(super) fn take_warm(&mut self) -> Option<Shell> {
        let warm = self.shells.iter().position(|shell| shell.is_warm)?;
        Some(self.shells.swap_remove(warm))
    }
}

impl Supervisor {
    /// Engine `root`: its root process and how full its pool is.
    pub fn forks(&self) -> &Forks {
        &self.forks
    }

    /// Engine `root`: has the root made, and its pool filled, before the first clone is asked for.
    /// What goes wrong is the first clone's to tell.
    pub fn prepare(&mut self) {
        if self.forks.root.is_none()
            && !self.forks.is_ended
            && let Err(message) = self.start_root()
        {
            tracing::warn!("{message}");
        }
    }

    /// Starts a clone as a fork of the root: a shell that waits, or a new one.
    pub(super) fn start_fork(&mut self, number: usize, serial: &SerialPlan, input: &[u8]) {
        let requested = Instant::now();
        self.clones.push(Clone::new(serial, saved_terminal(serial)));
        self.forks.demand.note(self.options.root.shells, requested);
        self.forks.refill.starting.insert(number);
        while let Some(shell) = self.forks.take_warm() {
            let id = shell.id;
            match self.activate(shell, number, serial, input, requested) {
                Ok(()) => return,
                // It died unseen: the next one.
                Err(error) => self.forget_shell(id, number, &chain(&error)),
            }
        }
        self.forks.waiting.push_back(Purpose::Clone {
            number,
            serial: serial.clone(),
            input: input.to_vec(),
            requested,
        });
        self.send_forks();
    }

    fn activate(
        &mut self,
        shell: Shell,
        number: usize,
        serial: &SerialPlan,
        input: &[u8],
        requested: Instant,
    ) -> Result<(), SpawnError> {
        let console = give_orders(&shell.channel, self.config(number)?, serial, input)?;
        let _ = rustix::event::epoll::delete(&self.epoll, shell.channel.as_fd());
        let process = CloneProcess::adopt(shell.process, shell.channel, requested);
        self.paging
            .give(Owner::Shell(shell.id), Owner::Clone(number));
        self.install(number, process, console)
    }

    fn install(
        &mut self,
        number: usize,
        process: CloneProcess,
        console: Option<GuestConsole>,
    ) -> Result<(), SpawnError> {
        let Some(slot) = self.clones.get_mut(number) else {
            return Ok(());
        };
        let mut clone = std::mem::replace(slot, Clone::new(&SerialPlan::Null, None));
        let adopted = self.adopt(number, &mut clone, process, console);
        self.clones[number] = clone;
        adopted
    }

    /// Asks the root for as many forks as may be under way; starts one if there is none.
    pub(super) fn send_forks(&mut self) {
        if self.forks.is_ended || self.forks.waiting.is_empty() {
            return;
        }
        if self.forks.root.is_none()
            && let Err(message) = self.start_root()
        {
            self.fail_waiting(exit::FAILED, &message);
            return;
        }
        while self.forks.is_ready && self.forks.flying.len() < FLYING_LIMIT {
            let Some(purpose) = self.forks.waiting.pop_front() else {
                return;
            };
            self.send_fork(purpose);
        }
    }

    fn send_fork(&mut self, purpose: Purpose) {
        let (channel, theirs) = match Channel::pair() {
            Ok(pair) => pair,
            Err(error) => return self.fail_purpose(&purpose, exit::FAILED, &chain(&error)),
        };
        let room = match self.room_for_a_process() {
            Ok(room) => room,
            Err(message) => return self.fail_purpose(&purpose, exit::FAILED, &message),
        };
        let id = self.forks.next_id;
        self.forks.next_id += 1;
        let group = self.new_group();
        let is_clone = matches!(purpose, Purpose::Clone { .. });
        let cgroup = group.as_ref().map(CloneGroup::descriptor);
        let sent = match &self.forks.root {
            Some(root) => root.fork(id, is_clone, theirs.as_fd(), cgroup),
            None => return self.forks.waiting.push_front(purpose),
        };
        if let Err(error) = sent {
            // Its end will be heard of, and what waits goes to the next root.
            tracing::debug!("{}", chain(&error));
            self.forks.waiting.push_front(purpose);
            self.forks.is_ready = false;
            return;
        }
        // While the root forks.
        let console = match &purpose {
            Purpose::Clone {
                number,
                serial,
                input,
                ..
            } => (self.config(*number))
                .and_then(|config| give_orders(&channel, config, serial, input)),
            Purpose::Shell => Ok(None),
        };
        let console = match console {
            Ok(console) => console,
            // The fork ends when its control socket closes, and is not known when it is told of.
            Err(error) => return self.fail_purpose(&purpose, exit::FAILED, &chain(&error)),
        };
        let flight = Flight {
            purpose,
            channel,
            console,
            asked: Instant::now(),
            group,
        };
        self.forks.flying.insert(id, flight);
        self.forks.rooms.push(room);
    }

    fn start_root(&mut self) -> Result<(), String> {
        let now = Instant::now();
        let restarts = &mut self.forks.restarts;
        while restarts
            .front()
            .is_some_and(|then| now.saturating_duration_since(*then) > RESTART_WINDOW)
        {
            restarts.pop_front();
        }
        if restarts.len() >= RESTART_LIMIT {
            return Err(format!(
                "the root process of {} ended {RESTART_LIMIT} times within {} s; its log says why",
                self.options.template.display(),
                RESTART_WINDOW.as_secs()
            ));
        }
        restarts.push_back(now);
        let budget_bytes = self
            .options
            .root
            .budget_bytes
            .or_else(|| Some(available_bytes()? / 2))
            .unwrap_or(u64::MAX);
        let config = RootConfig {
            template: self.options.template.clone(),
            budget_bytes,
            pager: self.options.pager.clone(),
            host_check_is_due: self.options.host_check == HostCheck::Due,
            supervisor_pid: std::process::id(),
            verbosity: self.options.verbosity,
        };
        let root =
            RootProcess::start(&self.options.program, config).map_err(|error| chain(&error))?;
        self.watch(root.channel(), token::ROOT)
            .map_err(|error| format!("cannot watch the root process: {error}"))?;
        self.forks.root = Some(root);
        self.forks.silence.heard();
        self.forks.is_ready = false;
        self.forks.hole_faults.root_is_new();
        self.forks.roots_started += 1;
        Ok(())
    }

    /// The root has something to say, or has ended.
    pub(super) fn hear_root(&mut self) {
        let Some(root) = &self.forks.root else {
            return;
        };
        // What comes may be the descriptor of a process.
        drop(self.forks.rooms.pop());
        match root.receive() {
            Ok(Some((message, descriptors))) => {
                self.keep_room(&message);
                self.obey_root(message, descriptors);
            }
            Ok(None) => self.lose_root("it ended"),
            Err(error) => self.lose_root(&chain(&error)),
        }
    }

    fn obey_root(&mut self, message: FromRoot, descriptors: Vec<OwnedFd>) {
        self.forks.silence.heard();
        match message {
            FromRoot::Ready {
                backend_pages,
                filled_bytes,
                hole_bytes,
                took,
            } => {
                tracing::info!(filled_bytes, hole_bytes, ?took, "the root is ready");
                self.forks.filled = Some((filled_bytes, hole_bytes));
                self.forks.is_ready = true;
                self.forks.hole_faults.backends_are(&backend_pages);
                metrics::set_root_memory(&self.options.name, filled_bytes);
                metrics::record_start(&self.options.name, "root", "root", took);
            }
            FromRoot::Filling { filled_bytes } => {
                tracing::debug!(filled_bytes, "the root fills its memory");
            }
            FromRoot::Filled {
                filled_bytes,
                hole_bytes,
                promoted_ranges,
            } => self.root_filled((filled_bytes, hole_bytes), promoted_ranges),
            FromRoot::Forked { id, pid } => match descriptors.into_iter().next() {
                Some(pidfd) => self.forked(id, ChildProcess::new(pid, pidfd)),
                None => self.lose_root("it forked and gave no pidfd"),
            },
            FromRoot::NotForked { id, message } => {
                if let Some(flight) = self.forks.flying.remove(&id) {
                    self.fail_purpose(&flight.purpose, exit::FAILED, &message);
                }
            }
            FromRoot::Failed { code, message } => {
                self.drop_root();
                self.land_flights();
                self.fail_waiting(code, &message);
            }
        }
        self.send_forks();
    }

    fn forked(&mut self, id: u64, process: ChildProcess) {
        // A fork that nobody waits for any more is killed by being dropped.
        let Some(flight) = self.forks.flying.remove(&id) else {
            return;
        };
        self.usage.made();
        let process = process.in_group(flight.group);
        match flight.purpose {
            Purpose::Clone {
                number, requested, ..
            } => {
                let is_wanted = self.clones.get(number).is_some_and(|c| c.ending.is_none());
                if !is_wanted {
                    self.usage.unmade();
                    return;
                }
                let process = CloneProcess::adopt(process, flight.channel, requested);
                let installed = self.install(number, process, flight.console);
                match installed {
                    Ok(()) => {
                        let took = flight.asked.elapsed();
                        self.clones[number].stages.push(("fork".to_owned(), took));
                    }
                    Err(error) => self.fail_clone(number, exit::FAILED, &chain(&error)),
                }
            }
            Purpose::Shell => {
                let number = usize::try_from(id).unwrap_or(usize::MAX);
                let shell = Shell {
                    id,
                    process,
                    channel: flight.channel,
                    is_warm: false,
                };
                if self
                    .watch(shell.channel.as_fd(), token::token(number, Kind::Shell))
                    .is_ok()
                {
                    self.forks.shells.push(shell);
                }
            }
        }
    }

    /// A shell is warm, or has ended.
    pub(super) fn hear_shell(&mut self, number: usize) {
        let id = number as u64;
        let Some(at) = self.forks.shells.iter().position(|shell| shell.id == id) else {
            return;
        };
        let ended = match self.forks.shells[at].channel.receive::<FromWorker>() {
            Ok(Some((FromWorker::Memory(memory), descriptors))) => {
                return self.take_memory(Owner::Shell(id), memory, descriptors);
            }
            Ok(Some((message, descriptors))) => match (descriptor::none(descriptors), message) {
                (Err(error), _) => chain(&error),
                (Ok(()), FromWorker::Warm) => {
                    self.forks.shells[at].is_warm = true;
                    self.publish_counts();
                    return;
                }
                (Ok(()), FromWorker::Ended(Ending::Failed { message, .. })) => message,
                _ => return,
            },
            Ok(None) => "it ended without a word".to_owned(),
            Err(error) => chain(&error),
        };
        tracing::warn!(shell = id, "a shell is lost: {ended}");
        self.paging.forget(Owner::Shell(id));
        let shell = self.forks.shells.swap_remove(at);
        self.usage.unmade();
        let _ = rustix::event::epoll::delete(&self.epoll, shell.channel.as_fd());
        self.end_shell(shell.process);
        self.publish_counts();
    }

    /// The root is gone; its clones are not. What was being forked is asked of the next one.
    pub(super) fn lose_root(&mut self, why: &str) {
        if !self.forks.is_ended {
            tracing::warn!("the root process is lost: {why}");
        }
        self.drop_root();
        self.land_flights();
        self.send_forks();
    }

    /// A fork whose making was not confirmed ends when its control socket closes.
    fn land_flights(&mut self) {
        if !self.forks.flying.is_empty() {
            self.forks.strays.expect();
        }
        self.forks.rooms.clear();
        let mut flights: Vec<_> = self.forks.flying.drain().collect();
        flights.sort_by_key(|(id, _)| std::cmp::Reverse(*id));
        for (_, flight) in flights {
            self.forks.waiting.push_front(flight.purpose);
        }
    }

    /// Ends what no clone has become, and the root.
    pub(super) fn end_forks(&mut self) {
        self.forks.is_ended = true;
        self.land_flights();
        let stopped: Vec<Purpose> = self.forks.waiting.drain(..).collect();
        for purpose in stopped {
            if let Purpose::Clone { number, .. } = purpose
                && let Some(clone) = self.clones.get_mut(number)
            {
                clone.ending = Some(Ending::Stopped);
                self.pending.push(Event::Ended(number));
            }
        }
        for shell in std::mem::take(&mut self.forks.shells) {
            self.paging.forget(Owner::Shell(shell.id));
            self.end_shell(shell.process);
        }
        self.drop_root();
    }
}
