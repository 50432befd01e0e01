#![forbid(unsafe_code)]
//! A machine as its callers hold it: what it can do now is in its type.
//!
//! ```text
//! boot | restore -> Machine<Paused> -- resume --> Machine<Running> -- wait --> Outcome
//!                      |   ^                          |
//!                    save  +---------- pause ---------+
//! ```

use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::console::backend::ConsoleConnection;
use crate::device::virtio::net::backend::NetConnection;
use crate::device::virtio::vsock::backend::VsockConnection;
use crate::memory::guest::GuestRam;
use crate::vcpu::run::Failure;

use super::connections::Marks;
use super::devices::write_uuid;
use super::driver::Message;
use super::error::MachineError;
use super::request::Refusal;
use super::stages::Stages;
use super::state::MachineState;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset; whoever made the machine decides whether to make another.
    Reset,
    /// It was stopped from outside.
    Stopped,
    /// The guest could not go on.
    Failed(Failure),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest switched itself off"),
            Self::Reset => write!(f, "the guest asked for a reset"),
            Self::Stopped => write!(f, "the machine was stopped"),
            Self::Failed(failure) => failure.fmt(f),
        }
    }
}

/// State of a [`Machine`] whose vCPUs do not run.
#[derive(Debug)]
pub struct Paused;

/// State of a [`Machine`] whose vCPUs run, until the guest ends.
#[derive(Debug)]
pub struct Running;

/// A machine. Dropping it ends it: vCPUs, then the VM, then its hold on the RAM.
#[derive(Debug)]
pub struct Machine<State> {
    // Before `ram`: dropping the driver's thread closes the VM.
    driver: DriverThread,
    ram: Arc<GuestRam>,
    stages: Stages,
    pty: Option<PathBuf>,
    state: PhantomData<State>,
}

/// A way to a machine for other threads, such as those that wait for signals.
#[derive(Debug, Clone)]
pub struct MachineHandle {
    pub(super) requests: Sender<Message>,
}

impl MachineHandle {
    pub(super) fn new(requests: Sender<Message>) -> Self {
        Self { requests }
    }

    /// Asks the machine to end; [`Machine::wait`] then returns [`Outcome::Stopped`]. Nothing
    /// happens when it has ended already.
    pub fn stop(&self, reason: impl Into<String>) {
        let reason = reason.into();
        let _ = self.requests.send(Message::Stop { reason });
    }

    /// Presses the power button. What comes of it is the guest's decision, once it runs.
    pub fn press_power_button(&self) {
        let _ = self.requests.send(Message::PressPowerButton);
    }

    /// Stops the vCPUs at a consistent point and waits for that. Whoever owns the machine still
    /// has a `Machine<Running>`; its `pause` then has nothing left to do.
    pub fn pause(&self) -> Result<(), MachineError> {
        ask(&self.requests, Message::Pause)
    }

    /// Reads everything that is not RAM, after [`Self::pause`]. RAM must be taken before
    /// [`Self::resume`].
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let (reply, answer) = bounded(1);
        let _ = self.requests.send(Message::Save(reply));
        answer.recv().map_err(|_| MachineError::Gone)?
    }

    /// Lets the vCPUs run again after [`Self::pause`].
    pub fn resume(&self) -> Result<(), MachineError> {
        ask(&self.requests, Message::Resume)
    }
}

impl<State> Machine<State> {
    pub(super) fn new(
        driver: DriverThread,
        ram: Arc<GuestRam>,
        stages: Stages,
        pty: Option<PathBuf>,
    ) -> Self {
        Self {
            driver,
            ram,
            stages,
            pty,
            state: PhantomData,
        }
    }
}

impl Machine<Paused> {
    /// Says by what it is told apart from others of its template, for a machine that was made before that was
    /// known, of a guest that has SMBIOS tables where a UUID is given.
    pub fn bind_marks(&self, marks: Marks) -> Result<(), MachineError> {
        if let Some(uuid) = marks.uuid {
            write_uuid(&self.ram, uuid)?;
        }
        if let Some(content) = marks.document {
            let (reply, answer) = bounded(1);
            self.driver.send(Message::BindDocument(content, reply));
            answer.recv().map_err(|_| MachineError::Gone)?;
        }
        Ok(())
    }

    /// Says where COM1 goes, for a machine that was made with [`SerialTarget::Later`].
    pub fn bind_serial(&self, target: SerialTarget) -> Result<(), MachineError> {
        let (reply, answer) = bounded(1);
        self.driver.send(Message::BindSerial(target, reply));
        answer.recv().map_err(|_| MachineError::Gone)?
    }

    /// Says what the vsock device is connected to, for a machine that was made before that was known. The
    /// device takes it when the machine goes on.
    pub fn bind_vsock(&self, connection: VsockConnection) -> Result<(), MachineError> {
        let (reply, answer) = bounded(1);
        self.driver.send(Message::BindVsock(connection, reply));
        answer.recv().map_err(|_| MachineError::Gone)
    }

    /// Says where the cables of network devices end, and which addresses these have, for a machine that
    /// was made before that was known. The devices take it when the machine goes on.
    pub fn bind_nets(&self, nets: Vec<(String, NetConnection)>) -> Result<(), MachineError> {
        let (reply, answer) = bounded(1);
        self.driver.send(Message::BindNets(nets, reply));
        answer.recv().map_err(|_| MachineError::Gone)
    }

    /// Says what the ports of console devices lead to, for a machine that was made before that was known. The
    /// devices take it when the machine goes on.
    pub fn bind_consoles(
        &self,
        consoles: Vec<(String, ConsoleConnection)>,
    ) -> Result<(), MachineError> {
        let (reply, answer) = bounded(1);
        self.driver.send(Message::BindConsoles(consoles, reply));
        answer.recv().map_err(|_| MachineError::Gone)
    }

    /// Lets the vCPUs run.
    pub fn resume(self) -> Result<Machine<Running>, MachineError> {
        self.driver.ask(Message::Resume)?;
        Ok(self.into_state())
    }

    /// Reads everything that is not RAM. RAM must be taken while the machine stays paused.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let (reply, answer) = bounded(1);
        self.driver.send(Message::Save(reply));
        answer.recv().map_err(|_| MachineError::Gone)?
    }

    /// Ends the machine and gives its RAM back.
    pub fn into_ram(self) -> Result<GuestRam, MachineError> {
        let Self { driver, ram, .. } = self;
        drop(driver);
        Arc::try_unwrap(ram).map_err(|_| MachineError::RamInUse)
    }
}

impl Machine<Running> {
    /// Stops the vCPUs at a consistent point.
    ///
    /// Fails with [`MachineError::Ended`] when the guest ended first.
    pub fn pause(mut self) -> Result<Machine<Paused>, MachineError> {
        match self.driver.ask(Message::Pause) {
            Ok(()) => Ok(self.into_state()),
            Err(MachineError::Gone) => Err(MachineError::Ended(self.driver.join())),
            Err(error) => Err(error),
        }
    }

    /// Waits until the guest ends or somebody stops the machine; everything of the machine but its
    /// RAM is gone then.
    pub fn wait(mut self) -> Outcome {
        self.driver.join()
    }
}

impl<State> Machine<State> {
    /// The machine's RAM, which does not change while the machine is paused.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The machine's RAM, for those who look at it when the machine has ended. While the vCPUs run
    /// its content changes at any time.
    pub fn shared_ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    /// How long the stages of making this machine took: `load` (of a kernel), `devices`,
    /// `vm`, `slots+irqchip`, `vcpus`, `state`, `threads`.
    pub fn stages(&self) -> &Stages {
        &self.stages
    }

    /// A way to this machine for other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle {
            requests: self.driver.requests.clone(),
        }
    }

    /// The terminal to open for COM1, when it goes to a new pseudo-terminal.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    fn into_state<Next>(self) -> Machine<Next> {
        Machine {
            driver: self.driver,
            ram: self.ram,
            stages: self.stages,
            pty: self.pty,
            state: PhantomData,
        }
    }
}

/// The driver's thread and the queue into it.
#[derive(Debug)]
pub(super) struct DriverThread {
    requests: Sender<Message>,
    thread: Option<JoinHandle<Outcome>>,
}

impl DriverThread {
    pub(super) fn new(requests: Sender<Message>, thread: JoinHandle<Outcome>) -> Self {
        Self {
            requests,
            thread: Some(thread),
        }
    }

    fn send(&self, message: Message) {
        // A driver that is gone shows by the reply that never comes.
        let _ = self.requests.send(message);
    }

    fn ask(
        &self,
        message: impl FnOnce(Sender<Result<(), Refusal>>) -> Message,
    ) -> Result<(), MachineError> {
        ask(&self.requests, message)
    }

    /// Waits for the end of the machine.
    fn join(&mut self) -> Outcome {
        let died = || {
            Outcome::Failed(Failure::ThreadDied {
                thread: "the machine's driver".to_owned(),
            })
        };
        self.thread.take().map_or(Outcome::Stopped, |thread| {
            thread.join().unwrap_or_else(|_| died())
        })
    }
}

impl Drop for DriverThread {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.send(Message::Stop {
                reason: "its owner let go of it".to_owned(),
            });
            self.join();
        }
    }
}

fn ask(
    requests: &Sender<Message>,
    message: impl FnOnce(Sender<Result<(), Refusal>>) -> Message,
) -> Result<(), MachineError> {
    let (reply, answer): (_, Receiver<Result<(), Refusal>>) = bounded(1);
    let _ = requests.send(message(reply));
    Ok(answer.recv().map_err(|_| MachineError::Gone)??)
}
