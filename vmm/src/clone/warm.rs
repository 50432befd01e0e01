#![forbid(unsafe_code)]
//! Runs of a template that are recorded: one clone at a time, engine `copy`, nothing ahead of
//! demand, ended when it has become quiet.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pando_pager::working_set::Trace;
use rustix::event::{PollFd, PollFlags, Timespec};
use thiserror::Error;

use super::consoles::ConsoleOrders;
use super::control::{Ending, FromWorker, PagerConfig, Serial, WorkerConfig};
use super::process::{CloneProcess, SerialPlan, SpawnError};
use super::record::{Arriving, Record, Recording};
use super::supervise::STOP_GRACE;
use super::vsock::VsockOrders;
use super::{END_SIGNALS, Engine};
use crate::console::GuestConsole;
use crate::report::exit;

/// How much longer than its time a run may take, for its start, its end and its trace.
const SURPLUS: Duration = Duration::from_secs(60);
/// How long is waited for news before the time is looked at.
const LOOK_PERIOD: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Why a run was not recorded.
#[derive(Debug, Error)]
pub enum WarmError {
    /// Its process could not be started.
    #[error("run {run} could not be started")]
    Spawn {
        /// Which run, counted from 1.
        run: u64,
        /// Why.
        #[source]
        source: SpawnError,
    },
    /// The system refused something that watching needs.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The clone failed.
    #[error("run {run} failed: {message}; its console ended with:\n{tail}")]
    Failed {
        /// Which run.
        run: u64,
        /// Exit code of its process.
        code: u8,
        /// What happened.
        message: String,
        /// The last lines of COM1.
        tail: String,
    },
    /// The clone did not end.
    #[error("run {run} was given up: it took longer than {seconds} s; give it less --seconds")]
    Overdue {
        /// Which run.
        run: u64,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The clone ended well and did not say what it had touched.
    #[error("run {run} ended without its trace: its process was stopped before it was quiet")]
    Untold {
        /// Which run.
        run: u64,
    },
    /// A signal came.
    #[error("interrupted in run {run}: what the runs before it taught is kept")]
    Interrupted {
        /// Which run.
        run: u64,
    },
}

impl WarmError {
    /// What a program that fails with this exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed { code, .. } => *code,
            _ => exit::FAILED,
        }
    }
}

/// What all runs have in common.
#[derive(Debug, Clone)]
pub struct WarmOptions {
    /// The `pando` program.
    pub program: PathBuf,
    /// The template's directory.
    pub template: PathBuf,
    /// How the pager works.
    pub pager: PagerConfig,
    /// How much clones log.
    pub verbosity: u8,
    /// What COM1 gets before the guest runs.
    pub input: Vec<u8>,
    /// When a run ends.
    pub recording: Recording,
}

/// One run that was recorded.
#[derive(Debug)]
pub struct WarmRun {
    /// What was touched.
    pub trace: Trace,
    /// How it ended.
    pub ending: Ending,
    /// From the request to the end of the process.
    pub took: Duration,
}

/// Records runs.
#[derive(Debug)]
pub struct Warmer {
    options: WarmOptions,
    signals: UnixStream,
}

/// A run under way.
struct Underway {
    run: u64,
    process: CloneProcess,
    console: Option<GuestConsole>,
    arriving: Arriving,
    ending: Option<Ending>,
    /// Whether the control socket may still have something.
    is_heard: bool,
}

impl Warmer {
    /// Takes [`END_SIGNALS`] for itself.
    pub fn new(options: WarmOptions) -> Result<Self, WarmError> {
        let system = |source| WarmError::System {
            action: "watch for signals",
            source,
        };
        let (signals, end) = UnixStream::pair().map_err(system)?;
        for signal in END_SIGNALS {
            end.try_clone()
                .and_then(|end| signal_hook::low_level::pipe::register(signal, end))
                .map_err(system)?;
        }
        Ok(Self { options, signals })
    }

    /// Records a run; runs are counted from 1. Must be called on a thread that lives as long as
    /// the clone, as all starting of workers.
    pub fn run(&self, run: u64) -> Result<WarmRun, WarmError> {
        let began = Instant::now();
        let mut underway = self.start(run)?;
        let due = self.options.recording.limit + SURPLUS;
        while !self.news(&mut underway)? {
            if began.elapsed() > due {
                // Its process is killed when this is dropped.
                return Err(WarmError::Overdue {
                    run,
                    seconds: due.as_secs(),
                });
            }
        }
        let ending = underway.end();
        match ending {
            Ending::Failed { code, message } => Err(WarmError::Failed {
                run,
                code,
                message,
                tail: underway.tail(),
            }),
            ending => {
                let trace = underway.arriving.finish(run);
                Ok(WarmRun {
                    trace: trace.ok_or(WarmError::Untold { run })?,
                    ending,
                    took: began.elapsed(),
                })
            }
        }
    }

    fn start(&self, run: u64) -> Result<Underway, WarmError> {
        let config = WorkerConfig {
            clone: run,
            template: self.options.template.clone(),
            engine: Engine::Copy,
            serial: Serial::Null,
            vsock: VsockOrders::default(),
            consoles: ConsoleOrders::default(),
            pager: self.options.pager.clone(),
            // Done once, before the first run.
            host_check_is_due: false,
            supervisor_pid: std::process::id(),
            verbosity: self.options.verbosity,
            record: Some(Record::Run(self.options.recording)),
            nets: Vec::new(),
            documents: Vec::new(),
        };
        let (process, console) = CloneProcess::spawn(
            &self.options.program,
            config,
            &SerialPlan::Supervisor,
            &self.options.input,
            None,
        )
        .map_err(|source| WarmError::Spawn { run, source })?;
        Ok(Underway {
            run,
            process,
            console,
            arriving: Arriving::default(),
            ending: None,
            is_heard: true,
        })
    }

    /// Waits for something to happen and attends to it; whether the process has ended.
    fn news(&self, underway: &mut Underway) -> Result<bool, WarmError> {
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::from_borrowed_fd(underway.process.pidfd(), PollFlags::IN),
        ];
        if underway.is_heard {
            fds.push(PollFd::new(&underway.process.channel, PollFlags::IN));
        }
        if let Some(console) = &underway.console {
            fds.push(PollFd::from_borrowed_fd(console.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, Some(&LOOK_PERIOD)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => (),
            Err(errno) => {
                return Err(WarmError::System {
                    action: "watch a clone",
                    source: errno.into(),
                });
            }
        }
        let is_ready = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
        let (signal, ended) = (is_ready(fds.first()), is_ready(fds.get(1)));
        let says = underway.is_heard && is_ready(fds.get(2));
        drop(fds);
        if signal {
            return Err(self.interrupted(underway));
        }
        if says {
            underway.hear();
        }
        underway.read_console();
        Ok(ended)
    }

    /// Ends the clone in order, or by force when it takes too long.
    fn interrupted(&self, underway: &Underway) -> WarmError {
        let _ = (&self.signals).read(&mut [0; 16]);
        underway.process.ask_to_stop();
        let pidfd = underway.process.pidfd();
        let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
        let grace = Timespec {
            tv_sec: i64::try_from(STOP_GRACE.as_secs()).unwrap_or(1),
            tv_nsec: 0,
        };
        let _ = rustix::event::poll(&mut fds, Some(&grace));
        WarmError::Interrupted { run: underway.run }
    }
}

impl Underway {
    /// Takes one message.
    fn hear(&mut self) {
        match self.process.channel.receive::<FromWorker>() {
            Ok(Some((FromWorker::Touched(piece), _))) => self.arriving.add(piece),
            Ok(Some((FromWorker::Ended(ending), _))) => self.ending = Some(ending),
            Ok(Some((
                FromWorker::Started { .. }
                | FromWorker::Metrics(_)
                | FromWorker::Warm
                | FromWorker::Judged(_)
                | FromWorker::GaveBack { .. }
                | FromWorker::Forget { .. }
                // It is no fork.
                | FromWorker::HoleFaults(_)
                // A recorded clone has a pager of its own.
                | FromWorker::Memory(_),
                _,
            ))) => (),
            Ok(None) => self.is_heard = false,
            Err(error) => {
                tracing::error!(run = self.run, "{}", crate::report::chain(&error));
                self.is_heard = false;
                self.process.kill();
            }
        }
    }

    /// Takes what the guest printed, of which the console keeps the end.
    fn read_console(&mut self) {
        let Some(console) = &mut self.console else {
            return;
        };
        let is_open = console.poll().unwrap_or(false);
        while console.take_line().is_some() {}
        if !is_open {
            self.console = None;
        }
    }

    /// Takes leave of a process that ended: what it said last, and its exit.
    fn end(&mut self) -> Ending {
        while self.is_heard {
            self.hear();
        }
        let unsaid = self.process.wait();
        self.ending.take().unwrap_or(unsaid)
    }

    fn tail(&self) -> String {
        let tail = self.console.as_ref().map(GuestConsole::tail);
        tail.unwrap_or_else(|| "  (it was closed)".to_owned())
    }
}
