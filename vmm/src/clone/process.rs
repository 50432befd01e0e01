#![forbid(unsafe_code)]
//! A worker process as its supervisor sees it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, waitid};
use thiserror::Error;

use super::cgroup::CloneGroup;
use super::control::{Channel, ControlError, Ending, Serial, ToWorker, WorkerConfig, monotonic};
use crate::console::{ConsoleError, GuestConsole};
use crate::report::exit;
use crate::sys::spawn::spawn_into;

/// The hidden subcommand that a worker runs.
pub const WORKER_COMMAND: &str = "clone-worker";

/// Why a worker could not be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// The program could not be started.
    #[error("cannot start a clone's process")]
    Spawn(#[source] io::Error),
    /// Its orders could not be sent.
    #[error("cannot tell a clone's process what to run")]
    Orders(#[from] ControlError),
    /// It cannot be watched.
    #[error("cannot watch a clone's process")]
    Watch(#[source] io::Error),
    /// Its console could not be made.
    #[error("cannot make a clone's console")]
    Console(#[from] ConsoleError),
    /// It cannot have the network that it is to have: why.
    #[error("--net: {0}")]
    Net(String),
}

/// How long dropping a process waits for its end.
const DROP_LIMIT: Duration = Duration::from_secs(10);

/// Where the supervisor wants a clone's COM1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialPlan {
    /// Nowhere.
    Null,
    /// A Unix socket at this path.
    Unix(std::path::PathBuf),
    /// A console that the supervisor holds.
    Supervisor,
    /// The supervisor's own standard input and output.
    Terminal,
}

/// A process whose end this one is told of: a child that was started or forked. Dropping it kills
/// it and takes its exit status.
#[derive(Debug)]
pub struct ChildProcess {
    pid: u32,
    pidfd: OwnedFd,
    is_reaped: bool,
    /// Removed when the process is.
    group: Option<CloneGroup>,
}

impl ChildProcess {
    /// Starts a program.
    pub fn spawn(command: &mut Command) -> Result<Self, SpawnError> {
        let mut child = command.spawn().map_err(SpawnError::Spawn)?;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        if pidfd.is_err() {
            // Nobody would hear of its end, nor take it.
            let _ = child.kill();
            let _ = child.wait();
        }
        let pidfd = pidfd.map_err(|errno| SpawnError::Spawn(errno.into()))?;
        // Dropping a `Child` neither ends nor awaits it.
        Ok(Self::new(child.id(), pidfd))
    }

    /// A child that somebody else made for this process.
    pub fn new(pid: u32, pidfd: OwnedFd) -> Self {
        Self {
            pid,
            pidfd,
            is_reaped: false,
            group: None,
        }
    }

    /// The cgroup in which it began, if it has one of its own.
    #[must_use]
    pub fn in_group(mut self, group: Option<CloneGroup>) -> Self {
        self.group = group;
        self
    }

    /// Its cgroup, if it has one of its own.
    pub fn group(&self) -> Option<&CloneGroup> {
        self.group.as_ref()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it at once.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
    }

    /// Takes its exit status if it has ended; whether it has.
    pub(super) fn has_ended(&mut self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let ended = waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
        self.is_reaped = !matches!(ended, Ok(None) | Err(rustix::io::Errno::INTR));
        self.is_reaped
    }

    /// Neither ends it nor waits for it any more: whoever inherits it takes its exit status.
    pub fn leave(mut self) {
        self.is_reaped = true;
    }

    /// Takes how it ended, for one that did not say so. `None` where that cannot be had yet: of one that another
    /// process traces, although its pidfd is readable, until that lets go of it (ptrace(2)).
    pub fn reap(&mut self) -> Option<Ending> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let ended =
            rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(self.pidfd.as_fd()), options));
        self.is_reaped = !matches!(ended, Ok(None));
        match ended {
            Ok(status) => {
                status.map(|status| unsaid(status.terminating_signal(), status.exit_status()))
            }
            Err(error) => Some(Ending::Failed {
                code: exit::FAILED,
                message: format!("it was lost: {error}"),
            }),
        }
    }
}

impl AsFd for ChildProcess {
    /// Becomes readable when the process ends.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        if self.is_reaped {
            return;
        }
        self.kill();
        let deadline = Instant::now() + DROP_LIMIT;
        while !self.has_ended() {
            if Instant::now() > deadline {
                let pid = self.pid;
                tracing::warn!(pid, "a process was killed and has not ended: it is left");
                return;
            }
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            let pause = Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            let _ = poll(&mut fds, Some(&pause));
            if !fds[0].revents().is_empty() {
                // It has ended, or another process that traces it has not been told.
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

/// Orders on their way to a worker: its control socket, with its first message in it.
#[derive(Debug)]
pub struct Orders {
    /// The supervisor's end.
    pub channel: Channel,
    /// The worker's end.
    pub theirs: OwnedFd,
    /// The worker's console, if the supervisor is to hold it.
    pub console: Option<GuestConsole>,
}

/// A worker that was started.
#[derive(Debug)]
pub struct CloneProcess {
    process: ChildProcess,
    /// Messages to and from it.
    pub channel: Channel,
    /// When it was asked for.
    pub requested: Instant,
    /// How long the system took to start the process.
    pub spawn: Duration,
    /// When the system had started it, on the monotonic clock.
    pub spawned: Duration,
}

/// Tells the worker at the other end of `channel` what to run; gives its console, if the
/// supervisor is to hold it, to which `input` was sent before anything runs.
pub fn give_orders(
    channel: &Channel,
    config: WorkerConfig,
    serial: &SerialPlan,
    input: &[u8],
) -> Result<Option<GuestConsole>, SpawnError> {
    let mut console = None;
    let mut passed = Vec::new();
    let serial = match serial {
        SerialPlan::Null => Serial::Null,
        SerialPlan::Unix(path) => Serial::Unix(path.clone()),
        SerialPlan::Supervisor => {
            let (mut ours, end) = GuestConsole::pair()?;
            ours.send(input)?;
            console = Some(ours);
            passed.push(end);
            Serial::Passed
        }
        SerialPlan::Terminal => Serial::Terminal,
    };
    let mut descriptors: Vec<BorrowedFd<'_>> = passed.iter().map(AsFd::as_fd).collect();
    if serial == Serial::Terminal {
        descriptors.extend([rustix::stdio::stdin(), rustix::stdio::stdout()]);
    }
    channel.send(
        &ToWorker::Start(Box::new(WorkerConfig { serial, ..config })),
        &descriptors,
    )?;
    Ok(console)
}

impl Orders {
    /// A new control socket with the orders waiting in it: the process reads them as soon as it
    /// runs.
    pub fn new(
        config: WorkerConfig,
        serial: &SerialPlan,
        input: &[u8],
    ) -> Result<Self, SpawnError> {
        let (channel, theirs) = Channel::pair()?;
        let console = give_orders(&channel, config, serial, input)?;
        Ok(Self {
            channel,
            theirs,
            console,
        })
    }
}

impl CloneProcess {
    /// Starts `program` as a worker; with it comes its console, if the supervisor is to hold it.
    /// Must be called on a thread that lives as long as the clone, for the kernel ends a worker
    /// with the thread that started it.
    pub fn spawn(
        program: &Path,
        config: WorkerConfig,
        serial: &SerialPlan,
        input: &[u8],
        group: Option<CloneGroup>,
    ) -> Result<(Self, Option<GuestConsole>), SpawnError> {
        let requested = Instant::now();
        let Orders {
            channel,
            theirs,
            console,
        } = Orders::new(config, serial, input)?;
        let process = match group {
            Some(group) => spawn_in(group, program, &theirs)?,
            None => {
                let mut command = Command::new(program);
                command
                    .arg(WORKER_COMMAND)
                    .stdin(Stdio::from(theirs))
                    .stdout(Stdio::null());
                ChildProcess::spawn(&mut command)?
            }
        };
        Ok((Self::adopt(process, channel, requested), console))
    }

    /// A worker that was made for this process by now.
    pub fn adopt(process: ChildProcess, channel: Channel, requested: Instant) -> Self {
        Self {
            process,
            channel,
            requested,
            spawn: requested.elapsed(),
            spawned: monotonic(),
        }
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The directory of its cgroup, if it has one of its own.
    pub fn cgroup(&self) -> Option<&Path> {
        self.process.group().map(CloneGroup::path)
    }

    /// Becomes readable when the process ends.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// Asks it to stop.
    pub fn ask_to_stop(&self) {
        // An error means that it is gone, which its pidfd tells as well. One that reads nothing may still
        // hear a signal; and if not, what follows the grace.
        if let Ok(false) = self.channel.send_now(&ToWorker::Stop, &[]) {
            self.process.signal(Signal::TERM);
        }
    }

    /// Ends it at once.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Waits for its end and takes how it ended, for one that did not say so.
    pub fn wait(&mut self) -> Ending {
        // An interrupted wait is tried again.
        while poll(&mut [PollFd::new(&self.process.pidfd, PollFlags::IN)], None).is_err() {}
        self.process.reap().unwrap_or_else(traced)
    }

    /// The process, and its control socket.
    pub fn into_parts(self) -> (ChildProcess, Channel) {
        (self.process, self.channel)
    }
}

/// The end of a process that another one traces and has not been told of.
pub fn traced() -> Ending {
    Ending::Failed {
        code: exit::FAILED,
        message: "it has ended, and a process that traces it was not told yet: it is left"
            .to_owned(),
    }
}

/// Starts `program` as a worker in a cgroup.
fn spawn_in(
    group: CloneGroup,
    program: &Path,
    theirs: &OwnedFd,
) -> Result<ChildProcess, SpawnError> {
    let null = fs::OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .map_err(SpawnError::Spawn)?;
    let (pid, pidfd) = spawn_into(
        group.descriptor(),
        program,
        WORKER_COMMAND,
        theirs.as_fd(),
        null.as_fd(),
    )
    .map_err(SpawnError::Spawn)?;
    let pid = pid.as_raw_nonzero().get().unsigned_abs();
    Ok(ChildProcess::new(pid, pidfd).in_group(Some(group)))
}

/// How a process ended that did not say so itself.
fn unsaid(signal: Option<i32>, code: Option<i32>) -> Ending {
    let code = code.and_then(|code| u8::try_from(code).ok());
    let message = match (signal, code) {
        (Some(signal), _) => format!("it was killed by signal {signal}"),
        (None, Some(code)) => {
            let meaning = exit::meaning(code);
            format!("its process ended with code {code} ({meaning}) without a word")
        }
        (None, None) => "its process ended without a word".to_owned(),
    };
    Ending::Failed {
        // Ending well without saying how is a failure too.
        code: code
            .filter(|&code| code != exit::OK)
            .unwrap_or(exit::FAILED),
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_a_process_that_reads_nothing_does_not_wait() {
        let child = ChildProcess::spawn(Command::new("sleep").arg("600")).unwrap();
        let (channel, _unread) = Channel::pair().unwrap();
        while channel.send_now(&ToWorker::Stop, &[]).unwrap() {}
        let mut clone = CloneProcess::adopt(child, channel, Instant::now());
        clone.ask_to_stop();
        let Ending::Failed { message, .. } = clone.wait() else {
            panic!("it ended well");
        };
        assert!(message.contains("killed by signal 15"), "{message}");
    }

    fn said(signal: Option<i32>, code: Option<i32>) -> (u8, String) {
        match unsaid(signal, code) {
            Ending::Failed { code, message } => (code, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_worker_without_words_ends_with_the_code_of_its_process() {
        let (code, message) = said(None, Some(5));
        assert_eq!(code, exit::MEMORY);
        assert!(
            message.contains("guest memory could not be read"),
            "{message}"
        );
        let (code, message) = said(Some(9), None);
        assert_eq!(code, exit::FAILED);
        assert!(message.contains("killed by signal 9"), "{message}");
        assert_eq!(said(None, Some(0)).0, exit::FAILED);
        assert_eq!(said(None, Some(3)).0, exit::HOST);
    }
}
