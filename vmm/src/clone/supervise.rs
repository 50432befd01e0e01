#![forbid(unsafe_code)]
//! The supervisor: starts clones, hears what they report, ends them in order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use thiserror::Error;

use super::cgroup::CloneGroups;
use super::closing::close_elsewhere;
use super::consoles::ConsolePlan;
use super::control::{Ending, FromWorker, Serial, WorkerConfig};
use super::forks::Forks;
use super::learn::Learner;
use super::marks::{self, DocumentPattern};
pub use super::member::{Clone, CloneOptions, Event, GivenBack, RootOptions};
use super::nets::{self, NetPattern};
use super::paging::{Owner, SharedPaging};
use super::process::{CloneProcess, SerialPlan, SpawnError};
use super::token::{self, Kind, parse_token};
use super::usage::Usage;
use super::vsock::VsockPlan;
use super::{END_SIGNALS, Engine};
use crate::console::GuestConsole;
use crate::device::legacy::console::SavedTerminal;
use crate::machine::HostCheck;
use crate::observe::metrics;
use crate::observe::series::KnownSeries;
use crate::observe::stats::PagerStats;
use crate::pager_process::descriptor;
use crate::report::{chain, exit};
use crate::template::Template;

/// How long clones that were asked to stop may take before they are killed.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// Longest wait for something to happen.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// Why the supervisor cannot work.
#[derive(Debug, Error)]
pub enum SuperviseError {
    /// The system refused something that supervising needs.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// All clones of one template.
#[derive(Debug)]
pub struct Supervisor {
    pub(super) options: CloneOptions,
    pub(super) epoll: OwnedFd,
    signals: UnixStream,
    pub(super) clones: Vec<Clone>,
    /// Engine `root`: the root, its shells, and the clones that are being forked.
    pub(super) forks: Forks,
    /// The pager process, where clones share one.
    pub(super) paging: SharedPaging,
    pub(super) usage: Usage,
    pub(super) vsock: VsockPlan,
    pub(super) consoles: ConsolePlan,
    /// Numbers of clones have changed since they were published.
    counts_changed: bool,
    /// What happened outside of [`Self::wait`].
    pub(super) pending: Vec<Event>,
    /// How much RAM the template's guest has; `None` if that could not be read.
    pub(super) ram_bytes: Option<u64>,
    /// What other processes may record.
    pub(super) series: KnownSeries,
    /// What all pagers did.
    pub pager_stats: PagerStats,
    /// What clones touch, on its way to the template's working set.
    pub(super) learner: Learner,
    /// Cgroups of clones, if they have some. Behind what holds their processes: it removes them.
    pub(super) groups: Option<CloneGroups>,
    /// Cables of clones' network devices, which [`nets::check`] has proven.
    pub nets: Vec<NetPattern>,
    /// What their documents have, which [`marks::check`] has proven.
    pub documents: Vec<DocumentPattern>,
}

/// How long is waited at the end for clones that were killed.
const END_LIMIT: Duration = Duration::from_secs(10);

impl Supervisor {
    /// A supervisor without clones. Takes [`END_SIGNALS`] for itself.
    pub fn new(options: CloneOptions) -> Result<Self, SuperviseError> {
        let system = |action| move |source| SuperviseError::System { action, source };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| system("watch clones")(errno.into()))?;
        let (signals, end) = UnixStream::pair().map_err(system("watch for signals"))?;
        for signal in END_SIGNALS {
            end.try_clone()
                .and_then(|end| signal_hook::low_level::pipe::register(signal, end))
                .map_err(system("watch for signals"))?;
        }
        let series = KnownSeries::of(&options.name);
        let ram_bytes = Template::ram_bytes_in(&options.template);
        let ram_bytes = ram_bytes.inspect_err(|error| {
            tracing::info!("memory of clones is not measured: {}", chain(error));
        });
        let learner = Learner::new(options.pager.learn, &options.template, &options.name);
        let supervisor = Self {
            learner,
            options,
            epoll,
            signals,
            clones: Vec::new(),
            forks: Forks::default(),
            paging: SharedPaging::default(),
            usage: Usage::default(),
            vsock: VsockPlan::default(),
            consoles: ConsolePlan::default(),
            counts_changed: false,
            pending: Vec::new(),
            ram_bytes: ram_bytes.ok(),
            series,
            pager_stats: PagerStats::default(),
            groups: None,
            nets: Vec::new(),
            documents: Vec::new(),
        };
        supervisor
            .watch(supervisor.signals.as_fd(), token::SIGNAL)
            .map_err(system("watch for signals"))?;
        metrics::register(&supervisor.options.name);
        supervisor.publish();
        Ok(supervisor)
    }

    /// All clones, in the order in which they were asked for.
    pub fn clones(&self) -> &[Clone] {
        &self.clones
    }

    /// One clone.
    pub fn clone_mut(&mut self, clone: usize) -> Option<&mut Clone> {
        self.clones.get_mut(clone)
    }

    /// How many clones have not ended.
    pub fn live(&self) -> usize {
        self.clones.iter().filter(|clone| clone.is_live()).count()
    }

    /// Starts a clone and returns its number; `input` waits on its console before it runs. A clone
    /// that cannot be started has failed and leaves the others alone: [`Self::wait`] tells of its end
    /// as of any other.
    pub fn start(&mut self, serial: &SerialPlan, input: &[u8]) -> usize {
        let number = self.clones.len();
        if let Some(refused) = self.refuse_without_room(number) {
            self.clones.push(refused);
        } else if self.options.engine == Engine::Root {
            self.start_fork(number, serial, input);
        } else {
            if self.options.engine == Engine::Copy {
                self.prepare_paging();
            }
            let clone = self.spawn(number, serial, input).unwrap_or_else(|error| {
                metrics::count_failure(&self.options.name);
                self.pending.push(Event::Ended(number));
                Clone::failed(Ending::Failed {
                    code: exit::FAILED,
                    message: chain(&error),
                })
            });
            if clone.process.is_some() {
                self.usage.made();
            }
            self.clones.push(clone);
        }
        self.publish_counts();
        number
    }

    pub(super) fn config(&self, number: usize) -> Result<WorkerConfig, SpawnError> {
        Ok(WorkerConfig {
            clone: number as u64,
            template: self.options.template.clone(),
            engine: self.options.engine,
            serial: Serial::Null,
            vsock: self.vsock.orders(number as u64),
            consoles: self.consoles.orders(),
            pager: self.options.pager.clone(),
            host_check_is_due: self.options.host_check == HostCheck::Due,
            supervisor_pid: std::process::id(),
            verbosity: self.options.verbosity,
            record: self.options.pager.learn.record(number as u64),
            documents: marks::plans(&self.documents, number as u64),
            nets: nets::plans(&self.nets, number as u64).map_err(SpawnError::Net)?,
        })
    }

    fn spawn(
        &mut self,
        number: usize,
        serial: &SerialPlan,
        input: &[u8],
    ) -> Result<Clone, SpawnError> {
        let config = self.config(number)?;
        let terminal = saved_terminal(serial);
        let group = self.new_group();
        let (process, console) =
            CloneProcess::spawn(&self.options.program, config, serial, input, group)?;
        let spawn = process.spawn;
        let mut clone = Clone::new(serial, terminal);
        clone.stages.push(("spawn".to_owned(), spawn));
        self.adopt(number, &mut clone, process, console)?;
        Ok(clone)
    }

    /// Watches a process and makes it the clone's.
    pub(super) fn adopt(
        &self,
        number: usize,
        clone: &mut Clone,
        process: CloneProcess,
        console: Option<GuestConsole>,
    ) -> Result<(), SpawnError> {
        self.watch(process.channel.as_fd(), token::token(number, Kind::Control))
            .and_then(|()| self.watch(process.pidfd(), token::token(number, Kind::Process)))
            .and_then(|()| match &console {
                Some(console) => self.watch(console.as_fd(), token::token(number, Kind::Console)),
                None => Ok(()),
            })
            .map_err(SpawnError::Watch)?;
        clone.pid = process.pid();
        clone.process = Some(process);
        clone.console = console;
        Ok(())
    }

    /// Waits for something to happen, at most until `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<Vec<Event>, SuperviseError> {
        let mut events = std::mem::take(&mut self.pending);
        let timeout = if events.is_empty() {
            self.wait_at_most(timeout.min(LOOK_PERIOD))
        } else {
            Duration::ZERO
        };
        let mut ready = Vec::with_capacity(EVENTS);
        let timespec = rustix::event::Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut ready),
            Some(&timespec),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => (),
            Err(errno) => {
                return Err(SuperviseError::System {
                    action: "watch clones",
                    source: errno.into(),
                });
            }
        }
        for event in &ready {
            let data = event.data.u64();
            if data == token::SIGNAL {
                let mut byte = [0];
                let _ = io::Read::read(&mut &self.signals, &mut byte);
                events.push(Event::Signal);
            } else if data == token::ROOT {
                self.hear_root();
            } else if data == token::PAGER {
                self.hear_pager();
            } else if let Some((clone, kind)) = parse_token(data) {
                events.extend(self.attend(clone, kind));
            }
        }
        self.tend_paging();
        self.tend_forks();
        self.usage.sample_if_due();
        self.publish_if_changed();
        events.append(&mut self.pending);
        if self.options.measure_memory {
            let clones = &self.clones;
            self.usage.measure(&self.options.name, |clone| {
                let process = clones.get(clone)?.process.as_ref();
                process.map(CloneProcess::pid)
            });
        }
        Ok(events)
    }

    /// Asks every clone to stop, waits, and kills those that take longer than `grace`.
    pub fn stop_all(&mut self, grace: Duration) -> Result<(), SuperviseError> {
        let deadline = Instant::now() + grace;
        self.end_forks();
        for process in self
            .clones
            .iter()
            .filter_map(|clone| clone.process.as_ref())
        {
            process.ask_to_stop();
        }
        let mut killed: Option<Instant> = None;
        while self.live() > 0 {
            if killed.is_some_and(|killed| killed.elapsed() > END_LIMIT) {
                self.leave_clones();
                break;
            }
            for event in self.wait(Duration::from_millis(100))? {
                if let Event::Output(clone) = event {
                    self.drain_console(clone);
                }
            }
            if Instant::now() > deadline && killed.is_none() {
                tracing::warn!(
                    clones = self.live(),
                    "clones did not stop in time: killing them"
                );
                self.clones
                    .iter()
                    .filter_map(|clone| clone.process.as_ref())
                    .for_each(CloneProcess::kill);
                killed = Some(Instant::now());
            }
        }
        self.end_paging();
        self.take_last_strays();
        self.leave_dying();
        Ok(())
    }

    /// Waits no longer for clones that were killed: whatever holds them (a disk that does not answer), it is
    /// not in the power of this process.
    fn leave_clones(&mut self) {
        for clone in &mut self.clones {
            let Some(process) = clone.process.take() else {
                continue;
            };
            let (process, channel) = process.into_parts();
            let pid = process.pid();
            tracing::warn!(pid, "a clone was killed and has not ended: it is left");
            clone.ending.get_or_insert_with(|| Ending::Failed {
                code: exit::FAILED,
                message: format!("its process {pid} was killed and has not ended: it was left"),
            });
            close_elsewhere(vec![channel.into()]);
            process.leave();
        }
    }

    /// Takes the console of a clone out of the supervisor's watch, once it is closed.
    pub fn forget_console(&mut self, clone: usize) {
        if let Some(console) = self
            .clones
            .get_mut(clone)
            .and_then(|clone| clone.console.take())
        {
            let _ = epoll::delete(&self.epoll, console.as_fd());
        }
    }

    /// Takes what a console has to say and drops it.
    pub fn discard_console(&mut self, clone: usize) {
        self.drain_console(clone);
        if let Some(console) = self.clones.get_mut(clone).and_then(|c| c.console.as_mut()) {
            while console.take_line().is_some() {}
        }
    }

    /// Takes what a console has to say and keeps it; a closed one is no longer watched, or it would
    /// be ready for ever.
    fn drain_console(&mut self, clone: usize) {
        let console = self.clones.get_mut(clone).and_then(|c| c.console.as_mut());
        if let Some(console) = console
            && !console.poll().unwrap_or(false)
        {
            let _ = epoll::delete(&self.epoll, console.as_fd());
        }
    }

    fn attend(&mut self, number: usize, kind: Kind) -> Option<Event> {
        if kind == Kind::Shell {
            self.hear_shell(number);
            return None;
        }
        let clone = self.clones.get_mut(number)?;
        if kind == Kind::Console {
            if let Some(process) = &clone.process
                && clone.first_output.is_none()
            {
                let took = process.requested.elapsed();
                clone.first_output = Some(took);
                metrics::record_start(
                    &self.options.name,
                    self.options.engine.name(),
                    "total",
                    took,
                );
            }
            return Some(Event::Output(number));
        }
        let process = clone.process.as_mut()?;
        match kind {
            Kind::Console | Kind::Shell => None,
            Kind::Control => match process.channel.receive::<FromWorker>() {
                Ok(Some((FromWorker::Memory(memory), descriptors))) => {
                    self.take_memory(Owner::Clone(number), memory, descriptors);
                    None
                }
                Ok(Some((message, descriptors))) => match descriptor::none(descriptors) {
                    Ok(()) => self.hear(number, message),
                    Err(error) => {
                        self.condemn(number, exit::FAILED, &chain(&error));
                        None
                    }
                },
                Ok(None) => {
                    // The process is ending; its pidfd will say so.
                    let _ = epoll::delete(&self.epoll, process.channel.as_fd());
                    None
                }
                Err(error) => {
                    self.condemn(number, exit::FAILED, &chain(&error));
                    None
                }
            },
            Kind::Process => Some(self.bury(number)),
        }
    }

    /// Has the numbers of clones looked at again at the end of the next [`Self::wait`]: once for all
    /// that happened meanwhile.
    pub(super) fn publish_counts(&mut self) {
        self.counts_changed = true;
    }

    fn publish_if_changed(&mut self) {
        if std::mem::take(&mut self.counts_changed) {
            self.publish();
        }
    }

    fn publish(&self) {
        let count = |state: fn(&Clone) -> bool| self.clones.iter().filter(|c| state(c)).count();
        let name = &self.options.name;
        metrics::set_clones(
            name,
            "starting",
            count(|c| c.is_live() && c.running.is_none()),
        );
        metrics::set_clones(
            name,
            "running",
            count(|c| c.is_live() && c.running.is_some()),
        );
        metrics::set_clones(name, "ended", count(|c| !c.is_live()));
        metrics::set_clones(name, "warm", self.forks.warm());
    }

    /// Before a descriptor is closed that others have too: the kernel would go on telling of it.
    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    pub(super) fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        )
        .map_err(io::Error::from)
    }
}

/// The terminal's settings, where a clone is to have it.
pub(super) fn saved_terminal(serial: &SerialPlan) -> Option<SavedTerminal> {
    match serial {
        SerialPlan::Terminal => SavedTerminal::save(std::io::stdin()),
        SerialPlan::Null | SerialPlan::Unix(_) | SerialPlan::Supervisor => None,
    }
}
