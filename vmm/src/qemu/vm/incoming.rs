#![forbid(unsafe_code)]
//! Loading: `-incoming` and `migrate-incoming`. Everything is compared before anything is made.

use std::path::PathBuf;
use std::thread;

use pando_pager::image::BackendIndex;

use super::memory::Made;
use super::outgoing::MigrationStatus;
use super::{After, Held, Message, RunStatus, Vm};
use crate::machine::{HostCheck, Machine, MachineState};
use crate::memory::provide::Begin;
use crate::qemu::error::OptionError;
use crate::qemu::migration::address::StateAddress;
use crate::qemu::migration::file::{self, LoadError, StateFile};
use crate::qemu::migration::ram;
use crate::qemu::migration::state::{SavedContent, SavedMachine};
use crate::qemu::qmp::message::QmpError;
use crate::report::{exit, one_line};
use crate::spec::{FileAccess, Uuid};
use crate::template::state_file;

/// What a machine that waits for a state knows.
#[derive(Debug)]
pub struct IncomingState {
    /// Whether `-incoming` was given.
    pub asked: bool,
    /// Whether a load has begun.
    pub begun: bool,
    /// Whether a thread waits for more of the state.
    pub receiving: bool,
    /// Whether the guest may run by itself when its state is there.
    pub start: bool,
}

impl IncomingState {
    pub(super) fn new(asked: bool, start: bool) -> Self {
        Self {
            asked,
            begun: false,
            receiving: false,
            start,
        }
    }
}

/// A file to load from, and what a failure means.
#[derive(Debug)]
pub struct Source {
    file: StateFile,
    /// Whether a failure ends the program.
    exit_on_error: bool,
    /// Whether the file says by itself what it leaves out: nobody could set a capability before.
    takes_capabilities: bool,
}

/// A state that may be loaded.
#[derive(Debug)]
pub struct Load {
    file: StateFile,
    saved: SavedMachine,
    /// Where RAM begins in the file.
    ram_place: u64,
    indexes: Vec<Option<BackendIndex>>,
    exit_on_error: bool,
}

/// What a thread has read of a state that may come slowly, or never.
#[derive(Debug)]
pub enum Came {
    /// Its beginning.
    Head(Source, Result<(SavedMachine, u64), LoadError>),
    /// All of it, proven, in a file without a name.
    Copy(Load, Result<StateFile, LoadError>),
    /// All of it, in memory that was made for it.
    Ram(Load, Box<Made>, Result<(), LoadError>),
}

impl Vm {
    /// `-incoming file:PATH`
    pub(super) fn load_from_command_line(
        &mut self,
        address: &StateAddress,
    ) -> Result<(), OptionError> {
        let file = file::open(address, &mut |_| None).map_err(OptionError::new)?;
        self.begin_load(file, true, true);
        Ok(())
    }

    /// `migrate-incoming`
    pub(in crate::qemu) fn migrate_incoming(
        &mut self,
        address: &StateAddress,
        exit_on_error: bool,
    ) -> Result<(), QmpError> {
        if !self.incoming.asked {
            return Err(QmpError::generic(
                "'-incoming' was not specified on the command line",
            ));
        }
        if self.incoming.begun {
            return Err(QmpError::generic(
                "The incoming migration has already been started",
            ));
        }
        let opened = file::open(address, &mut |name| self.fds.remove(name));
        self.migration.status = MigrationStatus::Setup;
        let file = opened.map_err(QmpError::generic)?;
        self.begin_load(file, exit_on_error, false);
        Ok(())
    }

    fn begin_load(&mut self, file: StateFile, exit_on_error: bool, takes_capabilities: bool) {
        self.incoming.begun = true;
        self.migration.status = MigrationStatus::Setup;
        self.migration_event("setup");
        self.after = After::Load(Box::new(Source {
            file,
            exit_on_error,
            takes_capabilities,
        }));
    }

    /// Loads the state. What does not come from a file on disk may be slow: a thread waits for it.
    pub(super) fn load(&mut self, mut source: Source) {
        self.migration.status = MigrationStatus::Active;
        self.migration_event("active");
        if source.file.is_regular {
            let head = source.file.read_head();
            self.head_came(source, head);
        } else {
            let exit_on_error = source.exit_on_error;
            self.receive(exit_on_error, move || {
                let head = source.file.read_head();
                Came::Head(source, head)
            });
        }
    }

    /// Lets a thread read what may not come at once.
    fn receive(&mut self, exit_on_error: bool, read: impl FnOnce() -> Came + Send + 'static) {
        let sender = self.sender();
        // Ends with the process, should nothing ever come.
        let started = thread::Builder::new()
            .name("incoming".to_owned())
            .spawn(move || {
                let _ = sender.send(Message::Came(Box::new(read())));
            });
        self.incoming.receiving = started.is_ok();
        if let Err(error) = started {
            let error = LoadError::io(format!("cannot start the thread that loads: {error}"));
            self.load_failed(&error, exit_on_error);
        }
    }

    /// A thread has read what it was to.
    pub(super) fn came(&mut self, came: Came) {
        self.incoming.receiving = false;
        match came {
            Came::Head(source, head) => self.head_came(source, head),
            Came::Copy(load, Err(error)) | Came::Ram(load, _, Err(error)) => {
                self.load_failed(&error, load.exit_on_error);
            }
            Came::Copy(load, Ok(file)) => {
                let saved = SavedMachine {
                    mapped_ram: false,
                    ..load.saved
                };
                self.load_from_file(Load {
                    file,
                    saved,
                    ram_place: 0,
                    ..load
                });
            }
            Came::Ram(load, made, Ok(())) => {
                let result = self.restore(&load, *made);
                self.loaded(&load, result);
            }
        }
    }

    fn head_came(&mut self, source: Source, head: Result<(SavedMachine, u64), LoadError>) {
        let exit_on_error = source.exit_on_error;
        match self.checked(source, head) {
            Ok(load) if load.file.is_regular || !has_ram(&load.saved) => self.load_from_file(load),
            // It is proven before a template's file is written.
            Ok(load) if self.writes_a_file(&load.saved) => {
                let directory = self.directory_of_files();
                self.receive(exit_on_error, move || {
                    let mut load = load;
                    let place = load.ram_place;
                    let copy = ram::copy(&load.saved, &mut load.file, place, &directory);
                    Came::Copy(load, copy)
                });
            }
            Ok(load) => match self.make_for(&load) {
                Ok(made) => self.receive(exit_on_error, move || {
                    let mut load = load;
                    let place = load.ram_place;
                    let result = ram::load_all(&load.saved, &mut load.file, place, &made.ram);
                    Came::Ram(load, Box::new(made), result)
                }),
                Err(error) => self.load_failed(&error, exit_on_error),
            },
            Err(error) => self.load_failed(&error, exit_on_error),
        }
    }

    /// Compares everything that can be compared before anything is made.
    fn checked(
        &mut self,
        source: Source,
        head: Result<(SavedMachine, u64), LoadError>,
    ) -> Result<Load, LoadError> {
        let (saved, ram_place) = head?;
        self.compare(&saved, source.takes_capabilities)?;
        if saved.mapped_ram && !source.file.can_seek && has_ram(&saved) {
            return Err(LoadError::invalid(
                "Migration requires seekable transport (e.g. file)",
            ));
        }
        Ok(Load {
            indexes: self.prove_files(&saved)?,
            file: source.file,
            saved,
            ram_place,
            exit_on_error: source.exit_on_error,
        })
    }

    fn load_from_file(&mut self, mut load: Load) {
        let result = self.load_state(&mut load);
        self.loaded(&load, result);
    }

    fn loaded(&mut self, load: &Load, result: Result<(), LoadError>) {
        match result {
            Ok(()) => self.go_on(&load.saved),
            Err(error) => self.load_failed(&error, load.exit_on_error),
        }
    }

    /// The state is loaded; what comes then is in it.
    fn go_on(&mut self, saved: &SavedMachine) {
        self.migration.status = MigrationStatus::Completed(super::outgoing::Statistics::default());
        self.migration_event("completed");
        let was = match saved.status.as_str() {
            "running" => RunStatus::Running,
            "prelaunch" => RunStatus::Prelaunch,
            _ => RunStatus::Paused,
        };
        let next = RunStatus::after_load(was, self.incoming.start);
        self.has_program = saved.has_program;
        self.status = match next {
            RunStatus::Running => RunStatus::Paused,
            other => other,
        };
        if next == RunStatus::Running
            && let Err(error) = self.cont()
        {
            self.say(&error.desc);
        }
    }

    fn load_failed(&mut self, error: &LoadError, exit_on_error: bool) {
        for line in &error.lines {
            self.say(line);
        }
        let summary = error.summary();
        self.migration.status = MigrationStatus::Failed(summary.clone());
        self.migration_event("failed");
        if exit_on_error {
            self.say(&summary);
            self.after = After::Exit(exit::FAILED);
        }
        // Otherwise another file may be tried.
        self.incoming.begun = false;
    }

    fn load_state(&mut self, load: &mut Load) -> Result<(), LoadError> {
        let place = load.ram_place;
        if self.writes_a_file(&load.saved) {
            // A state that is cut or damaged must not cost the file what it holds.
            ram::prove_all(&load.saved, &mut load.file, place)?;
        }
        let made = self.make_for(load)?;
        ram::load_all(&load.saved, &mut load.file, place, &made.ram)?;
        self.restore(load, made)
    }

    fn make_for(&self, load: &Load) -> Result<Made, LoadError> {
        // Before memory is made: files of templates are emptied for it.
        self.decode(load)?;
        self.memory
            .make(Begin::Proven(&load.indexes))
            .map_err(|error| LoadError::invalid(error.to_string()))
    }

    fn decode(&self, load: &Load) -> Result<MachineState, LoadError> {
        state_file::decode(&load.file.path, &load.saved.machine)
            .map_err(|error| LoadError::invalid(one_line(&error)))
    }

    fn restore(&mut self, load: &Load, made: Made) -> Result<(), LoadError> {
        let state = self.decode(load)?;
        let mut connections = self
            .connections()
            .map_err(|error| LoadError::invalid(error.to_string()))?;
        let spec = &self.plan.spec;
        // Unlike QEMU, which leaves the guest the UUID of the saved machine. That had tables if it had one.
        let (was, is) = (load.saved.uuid.map(Uuid), spec.identity().uuid);
        connections.marks.uuid = is.filter(|_| was.is_some() && was != is);
        let machine = Machine::restore(spec, made.ram, &state, connections, HostCheck::Due)
            .map_err(|error| LoadError::invalid(one_line(&error)))?;
        self.replace(Held::Fresh(machine), made.pager);
        Ok(())
    }

    /// Whether RAM of the state goes to the file of a template.
    fn writes_a_file(&self, saved: &SavedMachine) -> bool {
        let backends = saved.backends.iter().zip(self.plan.spec.backends());
        backends
            .filter(|(there, _)| matches!(there.content, SavedContent::Here { .. }))
            .any(|(_, here)| {
                here.file()
                    .is_some_and(|file| file.access() == FileAccess::Template)
            })
    }

    /// Where there is room for what the files of backends hold.
    fn directory_of_files(&self) -> PathBuf {
        let mut files = self.plan.spec.backends().iter().filter_map(|b| b.file());
        let parent = files.find_map(|file| file.path().parent().map(PathBuf::from));
        parent
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or_else(|| PathBuf::from("."))
    }
}

fn has_ram(saved: &SavedMachine) -> bool {
    let mut backends = saved.backends.iter();
    backends.any(|backend| matches!(backend.content, SavedContent::Here { .. }))
}
