#![forbid(unsafe_code)]
//! Memory modules that come and go while the machine is there.
//!
//! ```text
//! plug     next view made -- KVM slot set ------ view shown ----- the guest is told
//! unplug   the guest has let go -- next view shown -- KVM slot gone -- unmapped by the last that used it
//! ```
//!
//! Devices see what the guest may reach, never less, and nothing of it is unmapped under anybody: each
//! access holds the view of its moment, and the VM holds what its slots show.

use std::sync::Arc;

use crossbeam::channel::{Sender, bounded};

use super::devices::Devices;
use super::driver::Message;
use super::error::MachineError;
use super::hotplug::DeviceNews;
use super::lifecycle::MachineHandle;
use super::pci::lock;
use crate::device::modules::registers::{ModuleEvent, SlotModule};
use crate::device::virtio::device::MemoryFigures;
use crate::device::virtio::mem::device::SizeNotice;
use crate::device::virtio::worker::Worker;
use crate::kvm::KvmError;
use crate::kvm::vm::Vm;
use crate::memory::discard::BackendDiscards;
use crate::memory::guest::{GuestMemoryError, GuestRam, RamBacking, View};
use crate::memory::layout::Placed;

/// A module that comes.
#[derive(Debug)]
pub struct Module {
    /// Its place among the machine's backends; those from there on are counted one higher.
    pub position: usize,
    /// Id of its backend.
    pub backend: String,
    /// Its memory.
    pub backing: Arc<RamBacking>,
    /// First guest physical address.
    pub guest_address: u64,
}

impl GuestRam {
    /// Gives the guest a module, which it may find from now on.
    pub fn plug(&self, vm: &Vm, module: Module) -> Result<(), PlugError> {
        let now = self.view();
        let placed = Placed {
            guest_address: module.guest_address,
            bytes: module.backing.bytes(),
        };
        let layout = now.layout().clone().with_module(module.position, placed);
        let layout = layout.map_err(|error| GuestMemoryError::Place {
            guest_address: module.guest_address,
            reason: error.to_string(),
        })?;
        let mut backings = now.backings().to_vec();
        let position = module.position.min(backings.len());
        let known = BackendDiscards {
            id: module.backend,
            discards: module.backing.discards(),
        };
        backings.insert(position, module.backing);
        let next = Arc::new(View::new(layout, backings, Some(now.slots()))?);
        vm.show_backend(&next, position)?;
        self.gate().insert(position, known);
        self.show(next);
        Ok(())
    }

    /// Takes the module at this address away; whether there was one. Its memory goes back to the host when
    /// the last that is using it has finished.
    pub fn unplug(&self, vm: &Vm, guest_address: u64) -> Result<bool, PlugError> {
        let now = self.view();
        let Some(position) = module_at(&now, guest_address) else {
            return Ok(false);
        };
        let layout = now.layout().clone().without_module(position);
        let mut backings = now.backings().to_vec();
        backings.remove(position);
        let next = View::new(layout, backings, Some(now.slots()))?;
        self.show(Arc::new(next));
        if let Err(error) = vm.hide_backend(&now, position) {
            // The guest has it still.
            self.show(now);
            return Err(error.into());
        }
        self.gate().remove(position);
        Ok(true)
    }
}

/// What is asked of the driver about modules, and what it hears from vCPUs.
#[derive(Debug)]
pub(super) enum ModuleMessage {
    /// Put a module in a slot of this number, of a node.
    Plug(Box<Module>, (u32, u32), Sender<Result<(), MachineError>>),
    /// Ask the guest to let go of what is in a slot.
    Unplug(u32, Sender<Result<(), MachineError>>),
    /// A guest did something.
    Event(ModuleEvent),
    /// A guest has more or less memory of a device.
    Resized(String, SizeNotice),
    /// Request so much of a device's memory.
    Request(String, u64, Sender<Result<(), MachineError>>),
    /// Say what there is of a device's memory.
    Figures(
        String,
        Sender<Result<(), MachineError>>,
        Sender<MemoryFigures>,
    ),
}

impl MachineHandle {
    /// Gives the guest a memory module in a slot that is free, and tells it.
    pub fn plug_module(&self, module: Module, slot: u32, node: u32) -> Result<(), MachineError> {
        let module = Box::new(module);
        self.about_modules(|reply| ModuleMessage::Plug(module, (slot, node), reply))
    }

    /// Asks the guest to let go of the module in a slot. Whether and when it does is up to it: see
    /// [`Self::watch`]. It may be asked again.
    pub fn unplug_module(&self, slot: u32) -> Result<(), MachineError> {
        self.about_modules(|reply| ModuleMessage::Unplug(slot, reply))
    }

    /// Requests that the guest has so much of a device's memory. Whether and when it does is up to it: see
    /// [`Self::watch`].
    pub fn request_memory(&self, id: &str, bytes: u64) -> Result<(), MachineError> {
        self.about_modules(|reply| ModuleMessage::Request(id.to_owned(), bytes, reply))
    }

    /// What there is of memory that grows and shrinks.
    pub fn memory_figures(&self, id: &str) -> Result<MemoryFigures, MachineError> {
        let (sender, figures) = bounded(1);
        self.about_modules(|reply| ModuleMessage::Figures(id.to_owned(), reply, sender))?;
        let no_memory = || MachineError::NoDevice { id: id.to_owned() };
        figures.try_recv().map_err(|_| no_memory())
    }

    fn about_modules(
        &self,
        message: impl FnOnce(Sender<Result<(), MachineError>>) -> ModuleMessage,
    ) -> Result<(), MachineError> {
        let (reply, answer) = bounded(1);
        let _ = self.requests.send(Message::Module(message(reply)));
        answer.recv().map_err(|_| MachineError::Gone)?
    }
}

impl Devices {
    /// Does what is asked for.
    pub(super) fn take_module_message(&mut self, message: ModuleMessage, vm: &Vm) {
        match message {
            // Whoever asked and is gone wants no answer.
            ModuleMessage::Plug(module, place, reply) => {
                let _ = reply.send(self.plug_module(*module, place, vm));
            }
            ModuleMessage::Unplug(slot, reply) => {
                let slots = self.modules.as_ref();
                let is_there = slots.is_some_and(|slots| slots.request_unplug(slot));
                let no_module = MachineError::NoModule { slot };
                let _ = reply.send(if is_there { Ok(()) } else { Err(no_module) });
            }
            ModuleMessage::Event(event) => self.module_event(event, vm),
            ModuleMessage::Resized(id, notice) => self.tell(DeviceNews::Resized { id, notice }),
            ModuleMessage::Request(id, bytes, reply) => {
                let _ = reply.send(self.with_memory(&id, |worker| worker.request_memory(bytes)));
            }
            ModuleMessage::Figures(id, reply, figures) => {
                let found = self.with_memory(&id, Worker::memory);
                let _ = reply.send(found.map(|found| {
                    if let Some(found) = found {
                        let _ = figures.send(found);
                    }
                }));
            }
        }
    }

    fn with_memory<T>(&self, id: &str, act: impl FnOnce(&Worker) -> T) -> Result<T, MachineError> {
        let pci = self.pci.as_ref().ok_or(MachineError::NoPci)?;
        pci.with_memory(id, act)
    }

    /// Shows the guest memory that it is told of later.
    pub(super) fn show(&self, module: Module, vm: &Vm) -> Result<(), MachineError> {
        let ram = self.ram.as_ref().ok_or(MachineError::NoPci)?;
        ram.plug(vm, module).map_err(MachineError::Module)?;
        self.tell_of_memory();
        Ok(())
    }

    /// Tells devices that there is more memory, or less: other processes are given what they share.
    fn tell_of_memory(&self) {
        let devices = self.pci.iter().flat_map(|pci| &pci.devices);
        devices.for_each(|device| lock(device).worker().memory_changed());
    }

    fn plug_module(
        &mut self,
        module: Module,
        (slot, node): (u32, u32),
        vm: &Vm,
    ) -> Result<(), MachineError> {
        let (Some(slots), Some(ram)) = (&self.modules, &self.ram) else {
            return Err(MachineError::NoModule { slot });
        };
        if slots.is_taken(slot) {
            return Err(MachineError::ModuleTaken { slot });
        }
        let shown = SlotModule {
            guest_address: module.guest_address,
            bytes: module.backing.bytes(),
            node,
        };
        ram.plug(vm, module).map_err(MachineError::Module)?;
        self.tell_of_memory();
        slots.plug(slot, shown);
        tracing::info!(
            slot,
            address = shown.guest_address,
            bytes = shown.bytes,
            "memory plugged"
        );
        Ok(())
    }

    fn module_event(&mut self, event: ModuleEvent, vm: &Vm) {
        let news = match event {
            ModuleEvent::Ejected {
                slot,
                guest_address,
            } => {
                if !self.remove_module(guest_address, vm) {
                    return;
                }
                tracing::info!(slot, "memory unplugged");
                DeviceNews::ModuleGone { slot }
            }
            ModuleEvent::Outcome {
                slot,
                event,
                status,
                is_refusal,
            } => DeviceNews::ModuleOutcome {
                slot,
                event,
                status,
                is_refusal,
            },
        };
        self.tell(news);
    }

    /// Takes memory away that the guest has let go of; whether it is away.
    pub(super) fn remove_module(&self, guest_address: u64, vm: &Vm) -> bool {
        let Some(ram) = &self.ram else {
            return false;
        };
        if let Err(error) = ram.unplug(vm, guest_address) {
            tracing::error!(guest_address, "memory stays with the guest: {error}");
            return false;
        }
        self.tell_of_memory();
        true
    }
}

/// Which backend the module at this address is.
fn module_at(view: &View, guest_address: u64) -> Option<usize> {
    let mut modules = view.layout().module_segments();
    let found = modules.find(|module| module.guest_address == guest_address);
    found.map(|module| module.backend)
}

/// Why a module cannot come, or go.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// It has no place.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
    /// KVM cannot.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}
