#![forbid(unsafe_code)]
//! Memory modules that monitors plug and unplug. The plan always has the modules that are there, so that
//! whatever machine is made next has them too.

use std::sync::{Arc, Weak};

use pando_pager::{Pager, Serving};
use serde_json::json;

use super::devices::PERIPHERAL;
use super::objects::Added;
use super::{RunStatus, Vm};
use crate::machine::Module;
use crate::memory::guest::RamBacking;
use crate::qemu::line::device;
use crate::qemu::qmp::message::{Class, QmpError};
use crate::qemu::words::Props;
use crate::report::one_line;
use crate::spec::{BackendSpec, Dimm, DimmFault, DimmParts, MachineSpec, SpecError};

/// What fills a module that came, as long as that memory is there: a device may still be at it when the guest has
/// let go of it.
#[derive(Debug)]
pub(super) struct ModulePager {
    pub(super) pager: Pager<Serving>,
    memory: Weak<RamBacking>,
}

impl Vm {
    /// `device_add` of a pc-dimm
    pub(super) fn module_add(&mut self, props: Props) -> Result<(), QmpError> {
        let mut number = self.plan.spec.dimms().len();
        while self.dimm(&format!("dimm-{number}")).is_some() {
            number += 1;
        }
        let parts = device::dimm(props, number);
        let parts = parts.map_err(|error| QmpError::generic(error.message()))?;
        self.take_news();
        if self.status == RunStatus::FinishMigrate || self.incoming.receiving {
            return Err(QmpError::generic("device_add not allowed while migrating"));
        }
        let id = parts.id.clone();
        if self
            .plan
            .spec
            .devices()
            .iter()
            .any(|device| device.id() == id)
            || self.is_generation_device(&id)
            || self.dimm(&id).is_some()
        {
            return Err(QmpError::generic(format!("Duplicate device ID '{id}'")));
        }
        let at = self.free_object(&parts.backend)?;
        let backend = self.added[at].spec.clone();
        if backend.is_rom() {
            return Err(QmpError::generic(format!(
                "memory backend {} is read-only memory, which a guest cannot use as a module that comes: give it \
                 rom=off, or name it on the command line",
                backend.id()
            )));
        }
        let new = with_dimm(&self.plan.spec, backend, parts)?;
        let dimm = new.dimms().iter().find(|dimm| dimm.id() == id).cloned();
        let dimm = dimm.ok_or_else(|| QmpError::generic(format!("there is no module {id}")))?;
        let (slot, node) = (dimm.slot(), dimm.node());
        self.bring(&new, at, dimm.backend(), |handle, module| {
            handle.plug_module(module, slot, node)
        })?;
        self.hotplugged.insert(id);
        Ok(())
    }

    /// The place among the objects of a backend that nobody has.
    pub(super) fn free_object(&self, id: &str) -> Result<usize, QmpError> {
        let free = self.added.iter().position(|added| added.spec.id() == id);
        free.ok_or_else(|| {
            if self.objects().any(|backend| backend.id() == id) {
                QmpError::generic(format!("can't use already busy memdev: {id}"))
            } else {
                QmpError::of(Class::DeviceNotFound, format!("Device '{id}' not found"))
            }
        })
    }

    /// Makes the plan `new`, in which object `at` is backend `position`, and gives that to the machine that
    /// there is. What fails changes nothing.
    pub(super) fn bring(
        &mut self,
        new: &MachineSpec,
        at: usize,
        position: usize,
        plug: impl FnOnce(
            &crate::machine::MachineHandle,
            Module,
        ) -> Result<(), crate::machine::MachineError>,
    ) -> Result<(), QmpError> {
        self.module_pagers
            .retain(|kept| kept.memory.strong_count() > 0);
        let Added { spec, file } = self.added.remove(at);
        self.memory.insert(new, position, file);
        let plugged = self.held.handle().map_or(Ok(None), |handle| {
            let made = self.memory.make_one(position);
            let (backing, pager) = made.map_err(|error| error.to_string())?;
            let backing = Arc::new(backing);
            // Known before the guest has it, which may let go of any module at once.
            let memory = Arc::downgrade(&backing);
            let kept = pager.map(|pager| ModulePager { pager, memory });
            let module = Module {
                position,
                backend: spec.id().to_owned(),
                backing,
                guest_address: new.layout().guest_address(position, 0).unwrap_or_default(),
            };
            let plugged = plug(&handle, module).map_err(|error| one_line(&error));
            plugged.map(|()| kept)
        });
        match plugged {
            Ok(kept) => self.module_pagers.extend(kept),
            Err(why) => {
                let file = self.memory.remove(&self.plan.spec, position);
                self.added.push(Added { spec, file });
                return Err(QmpError::generic(why));
            }
        }
        self.plan.spec = new.clone();
        Ok(())
    }

    /// `device_del` of a pc-dimm; as with QEMU it may be asked for again.
    pub(super) fn module_del(&mut self, id: &str) -> Result<(), QmpError> {
        if self.status == RunStatus::FinishMigrate || self.incoming.receiving {
            return Err(QmpError::generic("device_del not allowed while migrating"));
        }
        let Some(dimm) = self.dimm(id).cloned() else {
            return Ok(());
        };
        match self.held.handle() {
            None => self.module_gone(dimm.slot()),
            Some(handle) => {
                let asked = handle.unplug_module(dimm.slot());
                asked.map_err(|error| QmpError::generic(one_line(&error)))?;
            }
        }
        Ok(())
    }

    fn dimm(&self, id: &str) -> Option<&Dimm> {
        self.plan.spec.dimms().iter().find(|dimm| dimm.id() == id)
    }

    fn dimm_in(&self, slot: u32) -> Option<Dimm> {
        let mut dimms = self.plan.spec.dimms().iter();
        dimms.find(|dimm| dimm.slot() == slot).cloned()
    }

    /// A module is gone; its backend is an object that nobody has.
    pub(super) fn module_gone(&mut self, slot: u32) {
        let Some(dimm) = self.dimm_in(slot) else {
            return;
        };
        let id = dimm.id();
        let spec = self.plan.spec.without_dimm(id);
        self.release(spec, dimm.backend());
        self.hotplugged.remove(id);
        let path = format!("{PERIPHERAL}{id}");
        let data = json!({"device": id, "path": path});
        self.bus.send("DEVICE_DELETED", Some(data));
    }

    /// Makes the plan `new`, without the backend at `position`: nobody has it.
    pub(super) fn release(&mut self, new: MachineSpec, position: usize) {
        let backend = self.plan.spec.backends().get(position).cloned();
        let file = self.memory.remove(&new, position);
        self.added.extend(backend.map(|spec| Added { spec, file }));
        self.plan.spec = new;
    }

    /// How something went with a module.
    pub(super) fn module_outcome(&mut self, slot: u32, (event, status): (u8, u8), refuses: bool) {
        let Some(dimm) = self.dimm_in(slot) else {
            return;
        };
        let id = dimm.id();
        let info = json!({
            "device": id, "slot": slot.to_string(), "slot-type": "DIMM", "source": event, "status": status,
        });
        self.bus
            .send("ACPI_DEVICE_OST", Some(json!({"info": info})));
        if refuses {
            let path = format!("{PERIPHERAL}{id}");
            let data = json!({"device": id, "path": path});
            self.bus.send("DEVICE_UNPLUG_GUEST_ERROR", Some(data));
            let text = format!("the guest does not let go of it (status {status:#x})");
            let data = json!({"device": id, "msg": text});
            self.bus.send("MEM_UNPLUG_ERROR", Some(data));
        }
    }
}

/// A machine with one module more, or why not in QEMU's words.
fn with_dimm(
    spec: &MachineSpec,
    backend: BackendSpec,
    parts: DimmParts,
) -> Result<MachineSpec, QmpError> {
    spec.with_dimm(backend, parts).map_err(|error| {
        let SpecError::Dimm { reason, .. } = &error else {
            return QmpError::generic(one_line(&error));
        };
        QmpError::generic(match reason {
            DimmFault::DuplicateId { id } => format!("Duplicate device ID '{id}'"),
            other => one_line(other),
        })
    })
}
