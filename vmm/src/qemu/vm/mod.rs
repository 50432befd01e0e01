#![forbid(unsafe_code)]
//! The machine as its monitors see it. One thread, [`Vm::run`], owns everything; monitors, signals
//! and the machine's own end reach it through two queues.

mod balloon;
mod blocks;
mod compare;
mod control;
mod devices;
mod discards;
mod functions;
mod growing;
mod held;
mod hubs;
mod incoming;
mod memory;
mod modules;
mod nets;
mod objects;
mod order;
mod outgoing;
mod paced;
mod plan;
mod query;
mod serial;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded, select};
use pando_pager::{Pager, Serving};

pub(super) use functions::{pci_text, query_pci};
pub use held::Held;
pub use incoming::{Came, IncomingState};
pub use outgoing::{MigrationStatus, Saved};
pub use plan::Plan;
pub use status::RunStatus;

use self::blocks::Images;
use self::memory::Memory;
use self::nets::Netdevs;
use self::outgoing::Migration;
use self::serial::SerialPort;
use super::error::OptionError;
use super::line::wanted::Incoming;
use super::qmp::port::{Ask, Bus, MAX_REQUESTS, Reply};
use super::{hmp, qmp};
use crate::machine::{DeviceNews, Disks, Outcome};
use crate::memory::provide::Begin;

/// Most ends of machines that wait: there is one machine at a time.
const MAX_ENDS: usize = 8;
/// Most descriptors that clients can leave with `getfd`.
pub const MAX_FDS: usize = 64;

/// What reaches the machine's thread.
#[derive(Debug)]
pub enum Message {
    /// A monitor asks.
    Ask(Ask),
    /// A state was written, or not.
    Saved(Saved),
    /// A thread has read more of a state that is being loaded.
    Came(Box<Came>),
    /// A person at the terminal wants the end.
    Quit,
    /// A signal came.
    Signal(i32),
}

/// A machine has ended.
#[derive(Debug)]
pub struct End {
    /// Which machine of this process.
    pub number: u64,
    /// How.
    pub outcome: Outcome,
}

/// What is done once the answer to a command is on its way.
#[derive(Debug, Default)]
pub enum After {
    /// Nothing.
    #[default]
    Nothing,
    /// Save the state.
    Save(Box<outgoing::Target>),
    /// Load a state.
    Load(Box<incoming::Source>),
    /// Reset the machine.
    Reset,
    /// Tell clients of an event.
    Tell(&'static str),
    /// End because a monitor asked for it.
    Quit,
    /// End with this exit code.
    Exit(u8),
}

/// Tells a person something, on standard error behind the program's name.
pub type Teller = Box<dyn FnMut(&str)>;

/// The machine and all that belongs to it.
pub struct Vm {
    pub(super) plan: Plan,
    memory: Memory,
    pub(super) held: Held,
    /// Counts machines of this process.
    pub(super) number: u64,
    pub(super) pager: Option<Pager<Serving>>,
    module_pagers: Vec<modules::ModulePager>,
    pub(super) status: RunStatus,
    /// Whether the machine has anything to run.
    pub(super) has_program: bool,
    migration: Migration,
    pub(super) incoming: IncomingState,
    pub(super) bus: Bus,
    /// Descriptors that clients left, by name.
    pub(super) fds: BTreeMap<String, OwnedFd>,
    /// What came with the command of the moment.
    pub(super) passed: Vec<OwnedFd>,
    pub(super) after: After,
    /// Properties that `qom-set` changed, by object and name.
    pub(super) changed: BTreeMap<(String, String), bool>,
    /// Backends that monitors added.
    added: Vec<objects::Added>,
    /// What is wanted of the balloon.
    balloon: balloon::Balloon,
    /// Events that come at most so often.
    paced: paced::Paced,
    /// Memory devices that came while the machine was there.
    hotplugged: BTreeSet<String>,
    /// Images that devices have or may get.
    images: Images,
    /// Ends of cables that devices have or may get.
    netdevs: Netdevs,
    /// Devices that the guest was asked to let go of, and has not; when that was, if it was asked here.
    unplugging: BTreeMap<String, Option<Instant>>,
    /// What becomes of the machine's devices.
    news: Receiver<DeviceNews>,
    serial: SerialPort,
    /// Disks of the machines of this process, the next one too.
    disks: Disks,
    hubs: Vec<hubs::OpenHub>,
    sender: Sender<Message>,
    inbox: Receiver<Message>,
    ends_sender: Sender<End>,
    ends: Receiver<End>,
    tell: Teller,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("plan", &self.plan)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Opens the memory and COM1. There is no machine yet: see [`Self::power_on`].
    pub fn new(plan: Plan, mut tell: Teller) -> Result<Self, OptionError> {
        let memory = Memory::open(&plan.spec)?;
        let (sender, inbox) = bounded(MAX_REQUESTS);
        let hubs = hubs::open(plan.wanted.hubs.all(), &sender, &mut *tell)?;
        let serial = SerialPort::open(plan.wanted.serial.as_ref(), &hubs, &mut *tell)?;
        let (ends_sender, ends) = bounded(MAX_ENDS);
        let images = Images::open(&plan.wanted.memory.pci, plan.spec.devices())?;
        let netdevs = Netdevs::open(&plan.wanted.memory.pci, plan.spec.devices())?;
        let waits = plan.wanted.incoming.is_some();
        let mut vm = Self {
            has_program: plan.boot.is_some(),
            migration: Migration::new(plan.wanted.capabilities),
            incoming: IncomingState::new(waits, !plan.wanted.program.stopped),
            status: if waits {
                RunStatus::InMigrate
            } else {
                RunStatus::Prelaunch
            },
            plan,
            memory,
            held: Held::Nothing,
            number: 0,
            pager: None,
            module_pagers: Vec::new(),
            bus: Bus::default(),
            fds: BTreeMap::new(),
            passed: Vec::new(),
            after: After::Nothing,
            changed: BTreeMap::new(),
            added: Vec::new(),
            balloon: balloon::Balloon::default(),
            paced: paced::Paced::default(),
            hotplugged: BTreeSet::new(),
            images,
            netdevs,
            unplugging: BTreeMap::new(),
            news: crossbeam::channel::never(),
            serial,
            disks: Disks::new(),
            hubs,
            sender,
            inbox,
            ends_sender,
            ends,
            tell,
        };
        for spare in std::mem::take(&mut vm.plan.spare) {
            let added = vm.add_object(spare);
            added.map_err(|error| OptionError::new(error.desc))?;
        }
        Ok(vm)
    }

    /// Makes the machine unless it waits for a state. Nothing runs yet. The file of a template is written here, so
    /// this comes behind all that can be refused without it.
    pub fn power_on(&mut self) -> Result<(), OptionError> {
        match self.status {
            RunStatus::InMigrate => Ok(()),
            _ => self.make_machine(Begin::Files),
        }
    }

    /// The way to this machine's thread.
    pub fn sender(&self) -> Sender<Message> {
        self.sender.clone()
    }

    /// Where monitors get their events from.
    pub fn bus(&mut self) -> &mut Bus {
        &mut self.bus
    }

    /// Begins with what the command line asks for; the exit code, if that is the end already.
    pub fn begin(&mut self) -> Option<u8> {
        self.start();
        let mut end = self.settle();
        // Who started a daemon waits to hear that all is well.
        while end.is_none() && self.incoming.receiving && self.plan.wanted.program.daemonize {
            end = self.step();
        }
        end
    }

    /// Runs until the end; the exit code. [`Self::begin`] comes first.
    pub fn run(&mut self) -> u8 {
        let mut end = self.settle();
        loop {
            match end {
                Some(code) => return code,
                None => end = self.step(),
            }
        }
    }

    /// Waits for what happens next and sees to it; the exit code, if that is the end.
    fn step(&mut self) -> Option<u8> {
        let (inbox, ends) = (self.inbox.clone(), self.ends.clone());
        let news = self.news.clone();
        let (balloon, due) = (self.balloon.changes.clone(), self.paced.when());
        select! {
            recv(ends) -> end => if let Ok(end) = end {
                self.ended(end);
            },
            recv(news) -> news => match news {
                Ok(news) => self.device_news(news),
                // The machine has ended.
                Err(_) => self.news = crossbeam::channel::never(),
            },
            recv(balloon) -> changed => match changed {
                Ok(()) => self.balloon_changed(),
                Err(_) => self.balloon.changes = crossbeam::channel::never(),
            },
            recv(due) -> _ => self.send_due(),
            recv(inbox) -> message => if let Ok(message) = message {
                self.take(message);
            },
        }
        self.settle()
    }

    /// Does what comes behind an answer; the exit code, if that is the end.
    fn settle(&mut self) -> Option<u8> {
        loop {
            match std::mem::take(&mut self.after) {
                After::Nothing => return None,
                After::Save(target) => self.save(*target),
                After::Load(source) => self.load(*source),
                After::Reset => self.reset_now(),
                After::Tell(event) => self.bus.send(event, None),
                After::Quit => self.shut_down(false, "host-qmp-quit"),
                After::Exit(code) => {
                    self.held.end();
                    self.finish_ports();
                    return Some(code);
                }
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Ask(Ask::Qmp(request, fds, reply)) => {
                self.passed = fds;
                let result = qmp::commands::execute(self, &request.command, request.arguments);
                self.passed.clear();
                let events = self.bus.sent();
                // A monitor that is gone wants no answer.
                let _ = reply.send(Reply { result, events });
            }
            Message::Ask(Ask::Hmp(line, reply)) => {
                let _ = reply.send(hmp::execute(self, &line));
            }
            Message::Saved(saved) => self.saved(saved),
            Message::Came(came) => self.came(*came),
            Message::Quit => self.shut_down(false, "host-ui"),
            Message::Signal(signal) => {
                self.say(&format!("terminating on signal {signal}"));
                self.shut_down(false, "host-signal");
            }
        }
    }

    /// What the command line asks for first.
    fn start(&mut self) {
        match self.plan.wanted.incoming.clone() {
            Some(Incoming::From(address, typed)) => {
                if let Err(error) = self.load_from_command_line(&address) {
                    for line in error.at(&typed).lines() {
                        self.say(&line);
                    }
                    self.after = After::Exit(1);
                }
            }
            Some(Incoming::Defer) => (),
            None if self.plan.wanted.program.stopped => (),
            None => {
                if let Err(error) = self.cont() {
                    self.say(&error.desc);
                    self.after = After::Exit(1);
                }
            }
        }
    }

    pub(super) fn say(&mut self, line: &str) {
        (self.tell)(line);
    }
}
