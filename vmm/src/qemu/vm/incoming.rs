#![forbid(unsafe_code)]
//! Loading: `-incoming` and `migrate-incoming`. Everything is compared before anything is made.

use std::path::Path;

use pando_pager::image::{BackendIndex, Index};

use super::outgoing::MigrationStatus;
use super::{After, Held, RunStatus, Vm};
use crate::machine::{Connections, HostCheck, Machine};
use crate::memory::provide::Begin;
use crate::qemu::error::OptionError;
use crate::qemu::line::identity::Uuid;
use crate::qemu::migration::address::StateAddress;
use crate::qemu::migration::file::{self, LoadError, StateFile};
use crate::qemu::migration::ram::{self, Contents, Placement};
use crate::qemu::migration::state::{SavedBackend, SavedContent, SavedMachine};
use crate::qemu::qmp::message::QmpError;
use crate::report::{exit, one_line};
use crate::template::seal::Seal;
use crate::template::state_file;

/// What a machine that waits for a state knows.
#[derive(Debug)]
pub struct IncomingState {
    /// Whether `-incoming` was given.
    pub asked: bool,
    /// Whether a load has begun.
    pub begun: bool,
    /// Whether the guest may run by itself when its state is there.
    pub start: bool,
}

impl IncomingState {
    pub(super) fn new(asked: bool, start: bool) -> Self {
        Self {
            asked,
            begun: false,
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

    /// Loads the state; what comes then is in it.
    pub(super) fn load(&mut self, source: Source) {
        self.migration.status = MigrationStatus::Active;
        self.migration_event("active");
        let exit_on_error = source.exit_on_error;
        match self.load_state(source) {
            Ok(saved) => {
                self.migration.status =
                    MigrationStatus::Completed(super::outgoing::Statistics::default());
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
            Err(error) => self.load_failed(&error, exit_on_error),
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

    fn load_state(&mut self, source: Source) -> Result<SavedMachine, LoadError> {
        let Source {
            mut file,
            takes_capabilities,
            ..
        } = source;
        let (saved, ram_place) = file.read_head()?;
        self.compare(&saved, takes_capabilities)?;
        let indexes = self.prove_files(&saved)?;
        let made = self
            .memory
            .make(Begin::Proven(&indexes))
            .map_err(|error| LoadError::invalid(error.to_string()))?;
        load_ram(&saved, &mut file, ram_place, &made.ram)?;
        let state = state_file::decode(&file.path, &saved.machine)
            .map_err(|error| LoadError::invalid(one_line(&error)))?;
        let target = self
            .serial
            .target()
            .map_err(|error| LoadError::invalid(format!("serial port: {error}")))?;
        let spec = &self.plan.spec;
        let generation_id = self.plan.generation_id;
        let machine = Connections::open(spec, target)
            .and_then(|to| {
                let to = Connections {
                    generation_id,
                    ..to
                };
                Machine::restore(spec, made.ram, &state, to, HostCheck::Due)
            })
            .map_err(|error| LoadError::invalid(one_line(&error)))?;
        self.replace(Held::Fresh(machine), made.pager);
        Ok(saved)
    }

    /// Refuses a state of another machine. Nothing was read or made yet.
    fn compare(&mut self, saved: &SavedMachine, takes_capabilities: bool) -> Result<(), LoadError> {
        if takes_capabilities {
            self.migration.capabilities.ignore_shared = saved.ignore_shared;
            self.migration.capabilities.mapped_ram = saved.mapped_ram;
        }
        let ours = self.migration.capabilities;
        for (name, here, there) in [
            ("x-ignore-shared", ours.ignore_shared, saved.ignore_shared),
            ("mapped-ram", ours.mapped_ram, saved.mapped_ram),
        ] {
            if here != there {
                let word = |on| if on { "on" } else { "off" };
                return Err(LoadError::invalid(format!(
                    "Capability {name} is {}, but received capability is {}",
                    word(here),
                    word(there)
                )));
            }
        }
        let kind = &self.plan.wanted.machine.kind;
        if saved.kind != *kind {
            return Err(LoadError::invalid(format!(
                "Machine type received is '{}' and local is '{kind}'",
                saved.kind
            )));
        }
        if let (true, Some(there)) = (ours.validate_uuid, saved.uuid) {
            let here = self.plan.wanted.identity.uuid.unwrap_or_default();
            if here.0 != there {
                return Err(LoadError::invalid(format!(
                    "UUID received is {} and local is {here}",
                    Uuid(there)
                )));
            }
        }
        let cpus = self.plan.spec.cpus().get();
        if saved.cpus != cpus {
            return Err(LoadError::invalid(format!(
                "the state has {} vCPUs, this machine {cpus}: give it -smp {}",
                saved.cpus, saved.cpus
            )));
        }
        self.compare_backends(saved)
    }

    fn compare_backends(&self, saved: &SavedMachine) -> Result<(), LoadError> {
        let ours = self.plan.spec.backends();
        let of_ram = |line: String| {
            LoadError::invalid(line)
                .and("error while loading state for instance 0x0 of device 'ram'")
        };
        for there in &saved.backends {
            let Some(here) = ours.iter().find(|backend| backend.id() == there.id) else {
                return Err(of_ram(format!(
                    "Unknown ramblock \"{}\", cannot accept migration",
                    there.id
                )));
            };
            if here.bytes() != there.bytes {
                return Err(of_ram(format!(
                    "Size mismatch: {}: {:#x} != {:#x}: Invalid argument",
                    there.id,
                    there.bytes,
                    here.bytes()
                )));
            }
            if here.is_rom() != there.is_rom {
                let (word, how) = if there.is_rom {
                    ("read-only memory", "readonly=on alone")
                } else {
                    (
                        "memory that the guest writes",
                        "share=off,readonly=on,rom=off",
                    )
                };
                return Err(of_ram(format!(
                    "memory backend \"{}\" is {word} in the state, and not here: give it {how}",
                    there.id
                )));
            }
        }
        if let Some(more) = ours
            .iter()
            .find(|here| saved.backends.iter().all(|there| there.id != here.id()))
        {
            return Err(of_ram(format!(
                "memory backend \"{}\" is not in the state: leave it out, or save the template again with it",
                more.id()
            )));
        }
        let layout = self.plan.spec.layout();
        for (position, (here, there)) in ours.iter().zip(&saved.backends).enumerate() {
            let address = layout.guest_address(position, 0).unwrap_or(0);
            if here.id() != there.id || address != there.guest_address {
                let at = |id: &str| {
                    let position = ours.iter().position(|backend| backend.id() == id);
                    position.and_then(|position| layout.guest_address(position, 0))
                };
                return Err(of_ram(format!(
                    "memory backend \"{}\" is at {:#x} in the state and at {:#x} here: give the backends in \
                     the same order",
                    there.id,
                    there.guest_address,
                    at(&there.id).unwrap_or(0)
                )));
            }
        }
        Ok(())
    }

    /// For each backend that is left out, its index, once its file is known to be the one that was
    /// saved.
    fn prove_files(&self, saved: &SavedMachine) -> Result<Vec<Option<BackendIndex>>, LoadError> {
        saved
            .backends
            .iter()
            .enumerate()
            .map(|(position, there)| match &there.content {
                SavedContent::Here { .. } => Ok(None),
                SavedContent::LeftOut {
                    offset_bytes,
                    seal,
                    index,
                } => self
                    .prove_file(position, there, (*offset_bytes, *seal), index)
                    .map(Some),
            })
            .collect()
    }

    fn prove_file(
        &self,
        position: usize,
        there: &SavedBackend,
        (offset_bytes, seal): (u64, Seal),
        index: &[u8],
    ) -> Result<BackendIndex, LoadError> {
        let id = &there.id;
        let here = &self.plan.spec.backends()[position];
        let (Some(source), Some(file)) = (here.file(), self.memory.file(position)) else {
            return Err(LoadError::invalid(format!(
                "memory backend \"{id}\" is left out of the state, and here it has no file that could have its \
                 content: give it memory-backend-file with share=off,readonly=on,rom=off"
            )));
        };
        let path = source.path();
        if source.offset_bytes() != offset_bytes {
            return Err(LoadError::invalid(format!(
                "memory backend \"{id}\" begins at offset {offset_bytes:#x} of its file in the state, and at {:#x} \
                 here",
                source.offset_bytes()
            )));
        }
        let damaged = |why: String| {
            LoadError::invalid(format!(
                "the index of memory backend \"{id}\" in the state is damaged: {why}"
            ))
        };
        let decoded = Index::decode(index).map_err(|error| damaged(error.to_string()))?;
        let index = match decoded.into_backends().pop() {
            Some((name, index)) if name == *id && index.pages().bytes() == there.bytes => index,
            _ => return Err(damaged("it is another backend's".to_owned())),
        };
        let now = Seal::of(file, path).map_err(|error| LoadError::invalid(one_line(&error)))?;
        // The same file, not written since: its pages are proven as they are read.
        if now != seal && !holds(file, &index)? {
            return Err(LoadError::invalid(changed(id, path, now, seal)));
        }
        Ok(index)
    }
}

/// Whether a file holds what an index says, whatever file it is.
fn holds(file: &std::fs::File, index: &BackendIndex) -> Result<bool, LoadError> {
    use pando_pager::image::{ChunkIndex, PageKind};
    let found = BackendIndex::scan(file, index.pages().bytes(), &mut |_, _| ())
        .map_err(|error| LoadError::io(one_line(&error)))?;
    // A hole and zeros read the same.
    let data = |index: &BackendIndex| {
        let runs = index.runs().filter(|(_, kind)| *kind == PageKind::Data);
        runs.map(|(pages, _)| pages).collect::<Vec<_>>()
    };
    let chunks = index
        .pages()
        .get()
        .div_ceil(pando_pager::image::CHUNK_PAGES);
    Ok(data(&found) == data(index)
        && (0..chunks)
            .map(ChunkIndex::new)
            .all(|chunk| found.checksum(chunk) == index.checksum(chunk)))
}

fn changed(id: &str, path: &Path, now: Seal, seal: Seal) -> String {
    let how = if now.inode != seal.inode {
        "it is another file, with other content"
    } else {
        "it was written since"
    };
    format!(
        "memory backend \"{id}\": {} does not hold what it held when the state was saved: {how}; give each backend \
         the file of its template, and save the state again if the template ran on",
        path.display()
    )
}

fn load_ram(
    saved: &SavedMachine,
    file: &mut StateFile,
    mut place: u64,
    ram: &crate::memory::guest::GuestRam,
) -> Result<(), LoadError> {
    for (position, backend) in saved.backends.iter().enumerate() {
        let SavedContent::Here { runs, checksum } = &backend.content else {
            continue;
        };
        let placement = if saved.mapped_ram {
            Placement::Mapped(place)
        } else {
            Placement::Packed
        };
        let contents = Contents {
            runs: runs.clone(),
            checksum: *checksum,
        };
        ram::load(ram, position, &contents, placement, &mut file.file).map_err(|error| {
            LoadError::io(format!(
                "RAM of \"{}\" in {} cannot be used: {error}",
                backend.id,
                file.path.display()
            ))
            .and("error while loading state section id 0(ram)")
        })?;
        place += backend.bytes;
    }
    Ok(())
}
