#![forbid(unsafe_code)]
//! Running, stopping, resetting and ending the machine.

use std::time::Duration;

use serde_json::json;

use super::memory::Made;
use super::{After, End, Held, RunStatus, Vm};
use crate::arch::x86_64::boot;
use crate::arch::x86_64::regs::InitialRegisters;
use crate::machine::{self, Connections, Failure, Machine, MachineError, Marks, Outcome, Role};
use crate::memory::provide::Begin;
use crate::qemu::error::OptionError;
use crate::qemu::link::reason;
use crate::qemu::qmp::message::QmpError;
use crate::report::{exit, one_line};
use crate::sys::lock::LockKind;

/// What `cont` says of a machine that was never given a program.
const NOTHING_TO_RUN: &str =
    "there is nothing to run: Pando has no firmware; give a kernel with -kernel";

/// What is said when a machine that was loaded without `-kernel` resets.
const STANDS_STILL: &str = "the guest has reset, and there is nothing to boot, as Pando has no firmware: it stands \
     still from now on, as with QEMU where no device is bootable; give clones -kernel too if they are to reboot";

/// How long a guest that has ended may take until everybody knows.
const MAX_ENDING: Duration = Duration::from_secs(10);

impl Vm {
    /// Makes the machine anew, from its beginning. What was there must have ended.
    pub(super) fn make_machine(&mut self, begin: Begin<'_>) -> Result<(), OptionError> {
        let Made { ram, pager } = self.memory.make(begin)?;
        let connections = self.connections()?;
        let spec = &self.plan.spec;
        let machine = match &self.plan.boot {
            Some(boot) => Machine::boot(spec, ram, boot, connections),
            // It never runs: `cont` refuses.
            None => Machine::boot_at(spec, ram, &InitialRegisters::linux64(0), connections),
        };
        let machine = machine.map_err(|error| OptionError::new(one_line(&error)))?;
        self.replace(Held::Fresh(machine), pager);
        Ok(())
    }

    /// Makes a machine that runs and does nothing: what QEMU's firmware does where no device is bootable.
    fn stand_still(&mut self) -> Result<(), OptionError> {
        // A template's file keeps what it holds, as the memory of a PC does over a reset.
        let Made { ram, pager } = self.memory.make(Begin::Files)?;
        let registers = boot::idle(&ram).map_err(|error| OptionError::new(one_line(&error)))?;
        let connections = self.connections()?;
        let machine = Machine::boot_at(&self.plan.spec, ram, &registers, connections)
            .map_err(|error| OptionError::new(one_line(&error)))?;
        self.replace(Held::Fresh(machine), pager);
        Ok(())
    }

    /// What the next machine is connected to: of disks the same as the one before.
    pub(super) fn connections(&mut self) -> Result<Connections, OptionError> {
        let serial = self
            .serial
            .target()
            .map_err(|error| OptionError::new(format!("serial port: {}", reason(&error))))?;
        let spec = &self.plan.spec;
        let wrong = |error| OptionError::new(one_line(&error));
        let disks = machine::open_disks(spec, &self.disks).map_err(wrong)?;
        self.disks.clone_from(&disks);
        Ok(Connections {
            serial,
            disks,
            vsock: machine::open_vsock(spec).map_err(wrong)?,
            nets: machine::open_taps(spec).map_err(wrong)?,
            consoles: machine::open_consoles(spec).map_err(wrong)?,
            plugged: Vec::new(),
            generation_id: self.plan.generation_id,
            marks: Marks::of(spec, Role::Machine),
        })
    }

    /// Takes a machine in place of the one before.
    pub(super) fn replace(
        &mut self,
        held: Held,
        pager: Option<pando_pager::Pager<pando_pager::Serving>>,
    ) {
        self.number += 1;
        self.held = held;
        self.pager = pager;
        self.module_pagers.clear();
        self.watch_devices();
    }

    /// Lets the guest run.
    pub(in crate::qemu) fn cont(&mut self) -> Result<(), QmpError> {
        match self.status {
            RunStatus::Running => return Ok(()),
            RunStatus::InMigrate => {
                self.incoming.start = true;
                return Ok(());
            }
            RunStatus::Shutdown | RunStatus::InternalError => {
                return Err(QmpError::generic(
                    "Resetting the Virtual Machine is required",
                ));
            }
            RunStatus::FinishMigrate => {
                return Err(QmpError::generic("There's a migration process in progress"));
            }
            RunStatus::Prelaunch | RunStatus::Paused | RunStatus::PostMigrate => (),
        }
        if !self.has_program {
            return Err(QmpError::generic(NOTHING_TO_RUN));
        }
        self.write_files()?;
        self.held
            .resume(self.number, &self.ends_sender)
            .map_err(|error| QmpError::generic(one_line(&error)))?;
        self.status = RunStatus::Running;
        self.bus.send("RESUME", None);
        Ok(())
    }

    /// Files of templates are this machine's to write again: clones may have begun to read them while
    /// it had saved its state.
    fn write_files(&self) -> Result<(), QmpError> {
        self.memory
            .lock(LockKind::Exclusive)
            .map_err(|error| QmpError::generic(error.to_string()))
    }

    /// Stops the vCPUs; whether the guest can go on afterwards. One that has just ended is seen to
    /// first: a guest that resets stands at the beginning then.
    pub(super) fn halt(&mut self) -> Result<bool, MachineError> {
        match self.held.pause() {
            Ok(()) => self.status = RunStatus::Paused,
            Err(MachineError::Gone) => {
                self.status = RunStatus::Paused;
                if let Ok(end) = self.ends.recv_timeout(MAX_ENDING) {
                    self.ended(end);
                }
            }
            Err(error) => return Err(error),
        }
        Ok(self.status == RunStatus::Paused && matches!(self.after, After::Nothing))
    }

    /// Stops the guest.
    pub(in crate::qemu) fn stop(&mut self) -> Result<(), QmpError> {
        match self.status {
            RunStatus::InMigrate => self.incoming.start = false,
            RunStatus::Running => {
                let stopped = self.halt();
                if stopped.map_err(|error| QmpError::generic(one_line(&error)))? {
                    self.bus.send("STOP", None);
                }
            }
            _ => (),
        }
        Ok(())
    }

    /// Presses the power button; what comes of it is the guest's decision.
    pub(in crate::qemu) fn system_powerdown(&mut self) -> Result<(), QmpError> {
        self.held.press_power_button();
        self.after = After::Tell("POWERDOWN");
        Ok(())
    }

    /// Takes the pages of a backend now.
    pub(in crate::qemu) fn preallocate(&mut self, id: &str) -> Result<(), QmpError> {
        let position = self.plan.spec.backends().iter().position(|b| b.id() == id);
        position
            .map_or(Ok(()), |position| self.memory.preallocate(position))
            .map_err(|error| QmpError::generic(error.to_string()))
    }

    /// Resets the machine, as somebody outside asks.
    pub(in crate::qemu) fn system_reset(&mut self) -> Result<(), QmpError> {
        match self.status {
            // There is nothing yet that could be reset.
            RunStatus::InMigrate => return Ok(()),
            RunStatus::FinishMigrate => {
                return Err(QmpError::generic("There's a migration process in progress"));
            }
            _ => (),
        }
        if self.plan.boot.is_none() && !self.has_program {
            return Ok(());
        }
        self.write_files()?;
        self.after = After::Reset;
        Ok(())
    }

    /// Resets the machine; whoever asked has the answer.
    pub(super) fn reset_now(&mut self) {
        let data = json!({"guest": false, "reason": "host-qmp-system-reset"});
        self.bus.send("RESET", Some(data));
        self.reset_or_end();
    }

    fn reset_or_end(&mut self) {
        // Somebody may have stopped it in the meantime.
        if let Err(error) = self.reset(self.status) {
            self.say(&error.to_string());
            self.after = After::Exit(exit::FAILED);
        }
    }

    /// Makes the machine anew; it goes on as `status` says.
    fn reset(&mut self, status: RunStatus) -> Result<(), OptionError> {
        self.held.end();
        self.pager = None;
        self.module_pagers.clear();
        self.take_news();
        self.end_unplugging();
        match self.plan.boot {
            Some(_) => self.make_machine(Begin::Zero)?,
            None => self.stand_still()?,
        }
        self.has_program = true;
        let runs = status == RunStatus::Running;
        self.status = match status {
            RunStatus::Prelaunch => RunStatus::Prelaunch,
            _ => RunStatus::Paused,
        };
        if runs {
            self.held
                .resume(self.number, &self.ends_sender)
                .map_err(|error| OptionError::new(one_line(&error)))?;
            self.status = RunStatus::Running;
        }
        Ok(())
    }

    /// A monitor wants the end, and its answer first.
    pub(in crate::qemu) fn quit(&mut self) {
        self.migration.cancel();
        self.after = After::Quit;
    }

    /// Ends everything.
    pub(in crate::qemu) fn shut_down(&mut self, guest: bool, why: &'static str) {
        self.migration.cancel();
        let data = json!({"guest": guest, "reason": why});
        self.bus.send("SHUTDOWN", Some(data));
        self.after = After::Exit(exit::OK);
    }

    /// The guest has ended.
    pub(super) fn ended(&mut self, end: End) {
        if end.number != self.number {
            return;
        }
        tracing::info!(outcome = %end.outcome, "the machine has ended");
        match end.outcome {
            Outcome::PowerOff => self.guest_is_off("guest-shutdown"),
            Outcome::Reset => self.guest_resets(),
            // With QEMU a triple fault is a reset.
            Outcome::Failed(Failure::TripleFault { .. }) => self.guest_resets(),
            Outcome::Stopped => self.shut_down(false, "host-ui"),
            Outcome::Failed(failure) => self.failed(&failure),
        }
    }

    fn guest_is_off(&mut self, why: &'static str) {
        if !self.plan.wanted.program.no_shutdown {
            self.shut_down(true, why);
            return;
        }
        let data = json!({"guest": true, "reason": why});
        self.bus.send("SHUTDOWN", Some(data));
        self.bus.send("STOP", None);
        self.held.end();
        self.status = RunStatus::Shutdown;
    }

    fn guest_resets(&mut self) {
        if self.plan.wanted.program.no_reboot {
            self.guest_is_off("guest-reset");
            return;
        }
        if self.plan.boot.is_none() {
            self.say(STANDS_STILL);
        }
        let data = json!({"guest": true, "reason": "guest-reset"});
        self.bus.send("RESET", Some(data));
        self.reset_or_end();
    }

    fn failed(&mut self, failure: &Failure) {
        self.say(&failure.to_string());
        if let Failure::MemoryError { .. } = failure {
            let of_modules = self.module_pagers.iter().map(|kept| &kept.pager);
            let pagers = self.pager.iter().chain(of_modules);
            let poisoned = pagers.flat_map(|pager| pager.health().poisoned());
            if let Some(page) = poisoned.map(|page| page.to_string()).next() {
                self.say(&page);
            }
            self.shut_down(true, "guest-panic");
            self.after = After::Exit(exit::MEMORY);
            return;
        }
        self.held.end();
        self.status = RunStatus::InternalError;
        self.bus.send("STOP", None);
    }
}
