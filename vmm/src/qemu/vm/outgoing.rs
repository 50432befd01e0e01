#![forbid(unsafe_code)]
//! Saving: `migrate`. The machine stops, what is not RAM is read, and a thread writes the file, so
//! that monitors go on being answered.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pando_pager::image::{BackendIndex, Index};
use serde_json::{Value, json};

use super::{Message, RunStatus, Vm};
use crate::memory::guest::GuestRam;
use crate::qemu::migration::address::StateAddress;
use crate::qemu::migration::capability::Capabilities;
use crate::qemu::migration::file::{self, StateFile};
use crate::qemu::migration::ram::{self, Placement};
use crate::qemu::migration::state::{SavedBackend, SavedContent, SavedMachine, SavedTopology};
use crate::qemu::qmp::message::QmpError;
use crate::report::one_line;
use crate::spec::{BackendSource, FileAccess, FileSource};
use crate::sys::lock::{LockKind, is_locked};
use crate::template::seal::Seal;
use crate::template::state_file;

/// Where a save is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationStatus {
    /// There was none.
    None,
    /// It was asked for.
    Setup,
    /// It is being written.
    Active,
    /// It is complete.
    Completed(Statistics),
    /// It was called off.
    Cancelled,
    /// It failed, for this reason.
    Failed(String),
}

/// Figures of a save.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// How long the machine was stopped for it.
    pub downtime: Duration,
    /// How long all took.
    pub total: Duration,
    /// Bytes of RAM that the file has.
    pub written_bytes: u64,
    /// Bytes of RAM that the file stands for, what is left out not counted.
    pub ram_bytes: u64,
    /// Bytes of the file in all.
    pub file_bytes: u64,
}

/// All that `migrate` keeps.
#[derive(Debug)]
pub(super) struct Migration {
    /// `migrate-set-capabilities`
    pub(super) capabilities: Capabilities,
    /// `migrate-set-parameters` of those that change nothing here: kept to be asked for.
    pub(super) parameters: std::collections::BTreeMap<String, Value>,
    /// The last save.
    pub(super) status: MigrationStatus,
    cancel: Arc<AtomicBool>,
    /// What the machine goes back to when a save fails.
    before: RunStatus,
    began: Instant,
}

impl Migration {
    pub(super) fn new(capabilities: Capabilities) -> Self {
        Self {
            capabilities,
            parameters: std::collections::BTreeMap::new(),
            status: MigrationStatus::None,
            cancel: Arc::default(),
            before: RunStatus::Paused,
            began: Instant::now(),
        }
    }

    /// Calls a save off; nothing happens when there is none.
    pub(super) fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }
}

/// A file to save to.
#[derive(Debug)]
pub struct Target(StateFile);

/// What the thread that writes says in the end.
#[derive(Debug)]
pub struct Saved {
    result: Result<Statistics, String>,
    cancelled: bool,
}

/// What the thread needs.
struct Job {
    target: StateFile,
    saved: SavedMachine,
    ram: Arc<GuestRam>,
    /// For each backend: its file, where it is left out.
    left_out: Vec<Option<LeftOut>>,
    cancel: Arc<AtomicBool>,
}

struct LeftOut {
    file: std::fs::File,
    path: PathBuf,
    offset_bytes: u64,
}

impl Vm {
    /// `migrate`: checks, opens the file, and saves once the answer is out.
    pub(in crate::qemu) fn migrate(&mut self, address: &StateAddress) -> Result<(), QmpError> {
        if let Some(why) = self.status.save_refusal() {
            return Err(QmpError::generic(why));
        }
        self.refuse_layers().map_err(QmpError::generic)?;
        let opened = file::create(address, &mut |name| self.fds.remove(name));
        let opened = opened.and_then(|target| self.refuse_memory(target));
        let target = match opened {
            Ok(target) => target,
            Err(why) => {
                self.migration.status = MigrationStatus::Failed(why.clone());
                return Err(QmpError::generic(why));
            }
        };
        if self.migration.capabilities.mapped_ram && !target.can_seek {
            let why = "Migration requires seekable transport (e.g. file)";
            self.migration.status = MigrationStatus::Failed(why.to_owned());
            return Err(QmpError::generic(why));
        }
        self.migration.status = MigrationStatus::Setup;
        self.migration.cancel = Arc::default();
        self.migration.began = Instant::now();
        self.migration_event("setup");
        self.after = super::After::Save(Box::new(Target(target)));
        Ok(())
    }

    /// Refuses a machine with a disk of which a state says nothing and that ends with this process.
    fn refuse_layers(&self) -> Result<(), String> {
        let mut disks = self.disks.iter();
        match disks.find(|(_, disk)| disk.has_own_layer()) {
            None => Ok(()),
            Some((id, _)) => Err(format!(
                "disk '{id}' has snapshot=on, and what its guest has written ends with this process: \
                 a state of its memory would be loaded over the image without it"
            )),
        }
    }

    /// Refuses a descriptor of what is memory; of a path its lock has told.
    fn refuse_memory(&self, target: StateFile) -> Result<StateFile, String> {
        let name = target.path.display();
        let facts = target.file.metadata().ok();
        if let Some(id) = facts.and_then(|facts| self.backend_of(&facts)) {
            return Err(format!(
                "{name} is the file of memory backend {id}, which nothing else may write: name another file"
            ));
        }
        // A lock that was taken by path is this file's own, and does not count here.
        if target.is_regular && is_locked(&target.file).unwrap_or(false) {
            return Err(format!(
                "{name} is the memory of a machine that is there, or a state that is being saved or loaded: name \
                 another file"
            ));
        }
        Ok(target)
    }

    /// The memory backend whose file this is.
    pub(super) fn backend_of(&self, facts: &Metadata) -> Option<&str> {
        let place = |facts: &Metadata| (facts.dev(), facts.ino());
        let is_same = |position| {
            let file = self.memory.file(position);
            let of_backend = file.and_then(|file| file.metadata().ok());
            of_backend.is_some_and(|of_backend| place(&of_backend) == place(facts))
        };
        let mut backends = self.plan.spec.backends().iter().enumerate();
        backends.find_map(|(position, backend)| is_same(position).then(|| backend.id()))
    }

    pub(super) fn migration_event(&self, status: &str) {
        if self.migration.capabilities.events {
            self.bus.send("MIGRATION", Some(json!({"status": status})));
        }
    }

    /// QEMU looks for changed pages twice: before the machine stops, and behind that.
    fn pass_event(&self, pass: u32) {
        if self.migration.capabilities.events {
            self.bus.send("MIGRATION_PASS", Some(json!({"pass": pass})));
        }
    }

    /// Stops the machine and starts the thread that writes.
    pub(super) fn save(&mut self, target: Target) {
        self.migration.before = self.status;
        self.pass_event(1);
        self.migration.status = MigrationStatus::Active;
        self.migration_event("active");
        if self.status == RunStatus::Running {
            match self.halt() {
                Ok(true) => (),
                Ok(false) => {
                    // There is nothing that could go on.
                    self.migration.before = self.status;
                    self.save_failed("the guest ended before its state was saved".to_owned());
                    return;
                }
                Err(error) => {
                    self.save_failed(one_line(&error));
                    return;
                }
            }
            self.bus.send("STOP", None);
        }
        self.status = RunStatus::FinishMigrate;
        // What the guest let go of before it stood still is not there to be saved.
        self.take_news();
        let started = self
            .job(target.0)
            .and_then(|job| self.start_job(job).map_err(|error| error.to_string()));
        match started {
            Ok(()) => {
                self.migration_event("device");
                self.pass_event(2);
            }
            Err(why) => self.save_failed(why),
        }
    }

    fn job(&self, target: StateFile) -> Result<Job, String> {
        // The guest ran until now, and its last requests are done.
        self.refuse_layers()?;
        let state = self.held.save().map_err(|error| one_line(&error))?;
        let machine = state_file::encode(&target.path, &state).map_err(|error| one_line(&error))?;
        let ram = self.held.ram().ok_or("the machine has ended")?;
        if ram.layout() != self.plan.spec.layout() {
            return Err("memory is just coming or going: save again in a moment".to_owned());
        }
        let capabilities = self.migration.capabilities;
        let mut left_out = Vec::new();
        let mut backends = Vec::new();
        for (position, backend) in self.plan.spec.backends().iter().enumerate() {
            let shared = match backend.source() {
                BackendSource::File(source) if source.access() == FileAccess::Template => {
                    Some(source)
                }
                _ => None,
            };
            let file = self.memory.file(position).zip(shared);
            // A page index begins where its file does.
            let is_whole = |source: &&FileSource| source.offset_bytes() == 0;
            let file = file.filter(|(_, source)| capabilities.ignore_shared && is_whole(source));
            left_out.push(match file {
                Some((file, source)) => Some(LeftOut {
                    file: file.try_clone().map_err(|error| error.to_string())?,
                    path: source.path().to_owned(),
                    offset_bytes: source.offset_bytes(),
                }),
                None => None,
            });
            backends.push(SavedBackend {
                id: backend.id().to_owned(),
                bytes: backend.bytes(),
                guest_address: ram.layout().guest_address(position, 0).unwrap_or(0),
                is_rom: backend.is_rom(),
                content: SavedContent::Here {
                    runs: Vec::new(),
                    checksum: 0,
                },
            });
        }
        let status = match self.migration.before {
            RunStatus::Running | RunStatus::Prelaunch => self.migration.before,
            _ => RunStatus::Paused,
        };
        Ok(Job {
            target,
            saved: SavedMachine {
                kind: self.plan.wanted.machine.kind.clone(),
                cpus: self.plan.spec.cpus().get(),
                status: status.name().to_owned(),
                has_program: self.has_program,
                uuid: self.plan.spec.identity().uuid.map(|uuid| uuid.0),
                ignore_shared: capabilities.ignore_shared,
                mapped_ram: capabilities.mapped_ram,
                backends,
                topology: SavedTopology::of(&self.plan.spec),
                machine,
            },
            ram,
            left_out,
            cancel: Arc::clone(&self.migration.cancel),
        })
    }

    fn start_job(&self, job: Job) -> io::Result<()> {
        let sender = self.sender();
        let began = self.migration.began;
        thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || {
                let cancel = Arc::clone(&job.cancel);
                let stopped = Instant::now();
                let result = job.run().map(|statistics| Statistics {
                    downtime: stopped.elapsed(),
                    total: began.elapsed(),
                    ..statistics
                });
                let _ = sender.send(Message::Saved(Saved {
                    result,
                    cancelled: cancel.load(Ordering::Relaxed),
                }));
            })?;
        Ok(())
    }

    /// The thread has ended.
    pub(super) fn saved(&mut self, saved: Saved) {
        match saved.result {
            Ok(statistics) => {
                self.migration.status = MigrationStatus::Completed(statistics);
                self.status = RunStatus::PostMigrate;
                // Nobody writes the files now: clones may read them while this machine is still there.
                if let Err(error) = self.memory.lock(LockKind::Shared) {
                    self.say(&error.to_string());
                }
                self.migration_event("completed");
            }
            Err(_) if saved.cancelled => {
                self.back();
                self.migration.status = MigrationStatus::Cancelled;
                self.migration_event("cancelled");
            }
            Err(why) => self.save_failed(why),
        }
    }

    fn save_failed(&mut self, why: String) {
        self.say(&why);
        self.migration.status = MigrationStatus::Failed(why);
        self.back();
        self.migration_event("failed");
    }

    /// The machine goes on as before the save.
    fn back(&mut self) {
        self.status = match self.migration.before {
            RunStatus::Running => RunStatus::Paused,
            other => other,
        };
        if self.migration.before == RunStatus::Running
            && let Err(error) = self.cont()
        {
            self.say(&error.desc);
        }
    }
}

impl Job {
    fn run(mut self) -> Result<Statistics, String> {
        let cannot = |path: &PathBuf, error: &io::Error| {
            format!("Unable to write to file {}: {error}", path.display())
        };
        let mut ram_bytes = 0;
        for position in 0..self.saved.backends.len() {
            let content = match self.left_out.get(position).and_then(Option::as_ref) {
                Some(left_out) => self.index(position, left_out)?,
                None => {
                    let bytes = self.saved.backends[position].bytes;
                    ram_bytes += bytes;
                    let found = ram::contents(&self.ram, position, bytes, &self.cancel)
                        .map_err(|error| format!("cannot read RAM: {error}"))?;
                    SavedContent::Here {
                        runs: found.runs,
                        checksum: found.checksum,
                    }
                }
            };
            self.saved.backends[position].content = content;
        }
        let path = self.target.path.clone();
        let mut place = self
            .target
            .write_head(&self.saved)
            .map_err(|error| cannot(&path, &error))?;
        let head_bytes = place - self.target.offset_bytes;
        let mut written_bytes = 0;
        for (position, backend) in self.saved.backends.iter().enumerate() {
            let SavedContent::Here { runs, .. } = &backend.content else {
                continue;
            };
            let placement = if self.saved.mapped_ram {
                Placement::Mapped(place)
            } else {
                Placement::Packed
            };
            ram::save(
                &self.ram,
                position,
                runs,
                placement,
                &mut self.target.file,
                &self.cancel,
            )
            .map_err(|error| cannot(&path, &error))?;
            place += backend.bytes;
            written_bytes += runs.iter().map(|(_, count)| count * 4096).sum::<u64>();
        }
        if self.saved.mapped_ram && written_bytes > 0 {
            // Zero pages at the end are a hole.
            let result = self.target.file.set_len(place);
            result.map_err(|error| cannot(&path, &error))?;
        }
        Ok(Statistics {
            written_bytes,
            ram_bytes,
            file_bytes: head_bytes + written_bytes,
            ..Statistics::default()
        })
    }

    fn index(&self, position: usize, left_out: &LeftOut) -> Result<SavedContent, String> {
        let backend = &self.saved.backends[position];
        let seal = Seal::of(&left_out.file, &left_out.path).map_err(|error| one_line(&error))?;
        let index = BackendIndex::scan(&left_out.file, backend.bytes, &mut |_, _| ())
            .map_err(|error| one_line(&error))?;
        Ok(SavedContent::LeftOut {
            offset_bytes: left_out.offset_bytes,
            seal,
            index: Index::new(vec![(backend.id.clone(), index)]).encode(),
        })
    }
}
