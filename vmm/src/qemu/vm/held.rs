#![forbid(unsafe_code)]
//! The machine of the moment: none, one that has not run yet, one that has.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam::channel::Sender;

use super::End;
use crate::machine::{Machine, MachineError, MachineHandle, MachineState, Paused};
use crate::memory::guest::GuestRam;

/// A machine, in whichever way it is held.
#[derive(Debug, Default)]
pub enum Held {
    /// There is none: it waits for a state, or has ended.
    #[default]
    Nothing,
    /// It has not run yet.
    Fresh(Machine<Paused>),
    /// It has run; a thread waits for its end.
    Started(Started),
}

/// A machine that has run.
#[derive(Debug)]
pub struct Started {
    handle: MachineHandle,
    ram: Arc<GuestRam>,
    watcher: JoinHandle<()>,
}

impl Held {
    /// Lets the vCPUs run. Its end comes through `ends` with this `number`.
    pub fn resume(&mut self, number: u64, ends: &Sender<End>) -> Result<(), MachineError> {
        match std::mem::take(self) {
            Self::Nothing => Err(MachineError::Gone),
            Self::Started(started) => {
                let result = started.handle.resume();
                *self = Self::Started(started);
                result
            }
            Self::Fresh(machine) => {
                let machine = machine.resume()?;
                let (handle, ram) = (machine.handle(), machine.shared_ram());
                let ends = ends.clone();
                let name = "watcher".to_owned();
                let watcher = thread::Builder::new()
                    .name(name.clone())
                    .spawn(move || {
                        let outcome = machine.wait();
                        // There is one machine at a time, and room for several ends.
                        let _ = ends.try_send(End { number, outcome });
                    })
                    .map_err(|source| MachineError::Thread {
                        thread: name,
                        source,
                    })?;
                *self = Self::Started(Started {
                    handle,
                    ram,
                    watcher,
                });
                Ok(())
            }
        }
    }

    /// Stops the vCPUs at a consistent point.
    pub fn pause(&self) -> Result<(), MachineError> {
        match self {
            Self::Nothing => Err(MachineError::Gone),
            Self::Fresh(_) => Ok(()),
            Self::Started(started) => started.handle.pause(),
        }
    }

    /// A way to the machine; `None` where there is none.
    pub fn handle(&self) -> Option<MachineHandle> {
        match self {
            Self::Nothing => None,
            Self::Fresh(machine) => Some(machine.handle()),
            Self::Started(started) => Some(started.handle.clone()),
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        match self {
            Self::Nothing => (),
            Self::Fresh(machine) => machine.handle().press_power_button(),
            Self::Started(started) => started.handle.press_power_button(),
        }
    }

    /// Everything but RAM. The vCPUs must be stopped.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        match self {
            Self::Nothing => Err(MachineError::Gone),
            Self::Fresh(machine) => machine.save(),
            Self::Started(started) => started.handle.save(),
        }
    }

    /// The machine's RAM.
    pub fn ram(&self) -> Option<Arc<GuestRam>> {
        match self {
            Self::Nothing => None,
            Self::Fresh(machine) => Some(machine.shared_ram()),
            Self::Started(started) => Some(Arc::clone(&started.ram)),
        }
    }

    /// Ends the machine and waits for that.
    pub fn end(&mut self) {
        if let Self::Started(started) = std::mem::take(self) {
            started.handle.stop("its monitor ended it");
            // The thread has nothing that could fail.
            let _ = started.watcher.join();
        }
    }
}
