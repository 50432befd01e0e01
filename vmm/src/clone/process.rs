#![forbid(unsafe_code)]
//! A worker process as its supervisor sees it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};
use thiserror::Error;

use super::control::{Channel, ControlError, Ending, Serial, ToWorker, WorkerConfig, monotonic};
use crate::console::{ConsoleError, GuestConsole};
use crate::report::exit;

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
}

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

/// A worker that was started.
#[derive(Debug)]
pub struct CloneProcess {
    child: Child,
    pidfd: OwnedFd,
    /// Messages to and from it.
    pub channel: Channel,
    /// When it was asked for.
    pub requested: Instant,
    /// How long the system took to start the process.
    pub spawn: Duration,
    /// When the system had started it, on the monotonic clock.
    pub spawned: Duration,
}

impl CloneProcess {
    /// Starts `program` as a worker; with it comes its console, if the supervisor is to hold it, to
    /// which `input` was sent before anything runs. Must be called on a thread that lives as long
    /// as the clone, for the kernel ends a worker with the thread that started it.
    pub fn spawn(
        program: &Path,
        config: WorkerConfig,
        serial: &SerialPlan,
        input: &[u8],
    ) -> Result<(Self, Option<GuestConsole>), SpawnError> {
        let requested = Instant::now();
        let (channel, theirs) = Channel::pair()?;
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
        // The orders wait in the socket: the process reads them as soon as it runs.
        channel.send(
            &ToWorker::Start(WorkerConfig { serial, ..config }),
            &descriptors,
        )?;
        let child = Command::new(program)
            .arg(WORKER_COMMAND)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(SpawnError::Spawn)?;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .map_err(|errno| SpawnError::Spawn(errno.into()))?;
        let process = Self {
            child,
            pidfd,
            channel,
            requested,
            spawn: requested.elapsed(),
            spawned: monotonic(),
        };
        Ok((process, console))
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when the process ends.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Asks it to stop.
    pub fn ask_to_stop(&self) {
        // An error means that it is gone, which its pidfd tells as well.
        let _ = self.channel.send(&ToWorker::Stop, &[]);
    }

    /// Ends it at once.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Takes the end of a process that ended without saying how.
    pub fn reap(&mut self) -> Ending {
        match self.child.wait() {
            Ok(status) => unsaid(status),
            Err(error) => Ending::Failed {
                code: exit::FAILED,
                message: format!("it was lost: {error}"),
            },
        }
    }
}

/// How a process ended that did not say so itself.
fn unsaid(status: ExitStatus) -> Ending {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let message = match (status.signal(), code) {
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

impl Drop for CloneProcess {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(raw_status: i32) -> (u8, String) {
        match unsaid(ExitStatus::from_raw(raw_status)) {
            Ending::Failed { code, message } => (code, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_worker_without_words_ends_with_the_code_of_its_process() {
        let (code, message) = said(5 << 8);
        assert_eq!(code, exit::MEMORY);
        assert!(
            message.contains("guest memory could not be read"),
            "{message}"
        );
        let (code, message) = said(9);
        assert_eq!(code, exit::FAILED);
        assert!(message.contains("killed by signal 9"), "{message}");
        assert_eq!(said(0).0, exit::FAILED);
        assert_eq!(said(3 << 8).0, exit::HOST);
    }
}
