#![forbid(unsafe_code)]
//! Memory that grows and shrinks, as monitors see it.

use serde_json::{Value, json};

use super::Vm;
use super::devices::PERIPHERAL;
use crate::machine::{Attachment, MemoryFigures};
use crate::memory::discard::DiscardSource;
use crate::qemu::line::netdev::no_netdev;
use crate::qemu::line::pci::{Device, no_drive};
use crate::qemu::qmp::message::QmpError;
use crate::report::one_line;
use crate::spec::{DeviceFault, DeviceSpec, MemFault, SpecError};

impl Vm {
    /// `device_add` of a virtio-mem-pci
    pub(super) fn memory_device_add(&mut self, device: &Device, id: &str) -> Result<(), QmpError> {
        // It names neither a disk nor a network.
        let parts = device.parts(
            &[],
            |drive| Err(no_drive(drive, false)),
            |netdev| Err(no_netdev(netdev, false)),
        );
        let parts = parts.map_err(|error| QmpError::generic(error.message()))?;
        let at = self.free_object(id).map_err(|error| {
            let is_there = self.objects().any(|backend| backend.id() == id);
            if is_there {
                QmpError::generic(format!("'memdev' property specifies a busy memdev: {id}"))
            } else {
                error
            }
        })?;
        let backend = self.added[at].spec.clone();
        let spec = &self.plan.spec;
        let new = match spec.with_memory_device(backend, parts) {
            Ok(new) => new,
            Err(error) => return Err(self.no_memory_device(device, &error)),
        };
        let made = new.devices().last().cloned();
        let found = made.and_then(|made| Some((new.memory_backend_of(&made)?, made)));
        let (position, made) =
            found.ok_or_else(|| QmpError::generic(format!("memory backend {id} has no device")))?;
        let plugged = made.clone();
        self.bring(&new, at, position, |handle, module| {
            handle.plug(plugged, Attachment::Memory(Box::new(module)))
        })?;
        self.hotplugged.insert(made.id().to_owned());
        Ok(())
    }

    /// A refusal in QEMU's words; all but its last line goes to standard error.
    fn no_memory_device(&mut self, device: &Device, error: &SpecError) -> QmpError {
        match error {
            SpecError::Device {
                reason: DeviceFault::Memory(fault),
                ..
            } => {
                if let (MemFault::Templated, Some(ram)) = (fault, self.held.ram()) {
                    ram.gate().count_known(DiscardSource::VirtioMem);
                }
                let text = fault.to_string();
                let mut lines: Vec<&str> = text.lines().collect();
                let last = lines.pop().unwrap_or_default().to_owned();
                for line in lines {
                    self.say(line);
                }
                QmpError::generic(last)
            }
            SpecError::Dimm { reason, .. } => QmpError::generic(one_line(reason)),
            other => super::devices::refusal(device, &self.plan.spec, other),
        }
    }

    /// What there is of a memory device. One that no machine has yet has nothing.
    fn memory_figures(&self, device: &DeviceSpec) -> MemoryFigures {
        let handle = self.held.handle();
        let figures = handle.and_then(|handle| handle.memory_figures(device.id()).ok());
        let parts = device.memory();
        figures.unwrap_or_else(|| MemoryFigures {
            guest_address: parts.and_then(|mem| mem.guest_address).unwrap_or(0),
            requested_bytes: parts.map_or(0, |mem| mem.requested_bytes),
            plugged_bytes: 0,
        })
    }

    fn memory_devices(&self) -> impl Iterator<Item = &DeviceSpec> {
        let devices = self.plan.spec.devices().iter();
        devices.filter(|device| device.memory().is_some())
    }

    /// The memory device of this id.
    pub(in crate::qemu) fn find_memory_device(&self, id: &str) -> Option<&DeviceSpec> {
        self.memory_devices().find(|device| device.id() == id)
    }

    /// What QEMU says of memory devices, each with its address.
    pub(super) fn query_growing(&self) -> Vec<(u64, Value)> {
        let devices = self.memory_devices().map(|device| {
            let facts = self.memory_device_facts(device);
            let address = facts["memaddr"].as_u64().unwrap_or(0);
            (address, json!({"type": "virtio-mem", "data": facts}))
        });
        devices.collect()
    }

    /// What QEMU says of a memory device.
    pub(in crate::qemu) fn memory_device_facts(&self, device: &DeviceSpec) -> Value {
        let figures = self.memory_figures(device);
        let Some(mem) = device.memory() else {
            return json!({});
        };
        json!({
            "id": device.id(),
            "memaddr": figures.guest_address,
            "requested-size": figures.requested_bytes,
            "size": figures.plugged_bytes,
            "max-size": mem.bytes,
            "block-size": mem.block(),
            "node": mem.node,
            "memdev": format!("/objects/{}", mem.backend),
        })
    }

    /// How much memory guests have by such devices.
    pub(super) fn grown_bytes(&self) -> u64 {
        let devices = self.memory_devices();
        devices
            .map(|device| self.memory_figures(device).plugged_bytes)
            .sum()
    }

    /// `qom-set` of a memory device
    pub(in crate::qemu) fn set_memory_device(
        &mut self,
        id: &str,
        name: &str,
        value: &Value,
    ) -> Result<(), QmpError> {
        match name {
            "requested-size" => (),
            "block-size" => return Err(QmpError::generic("'block-size' cannot be changed")),
            "size" => {
                let text = "Property 'virtio-mem.size' is not writable";
                return Err(QmpError::generic(text));
            }
            other => {
                return Err(QmpError::generic(format!(
                    "Attempt to set property '{other}' on device '{id}' (type 'virtio-mem-pci') after it was realized"
                )));
            }
        }
        let bytes = value.as_u64().ok_or_else(|| {
            QmpError::generic("Invalid parameter type for 'requested-size', expected: integer")
        })?;
        let new = self.plan.spec.with_requested(id, bytes);
        let new = new.map_err(|fault| {
            QmpError::generic(match fault {
                // Without the property's name QEMU says it here.
                MemFault::RequestedBlocks { block_bytes } => format!(
                    "'requested-size' has to be multiples of 'block-size' ({block_bytes:#x})"
                ),
                other => other.to_string(),
            })
        })?;
        if let Some(handle) = self.held.handle() {
            let requested = handle.request_memory(id, bytes);
            requested.map_err(|error| QmpError::generic(one_line(&error)))?;
        }
        self.plan.spec = new;
        Ok(())
    }

    /// Refuses to let go of a memory device of which the guest has something, or is to have.
    pub(super) fn refuse_plugged_memory(&self, id: &str) -> Result<(), QmpError> {
        let Some(device) = self.find_memory_device(id) else {
            return Ok(());
        };
        let figures = self.memory_figures(device);
        if figures.plugged_bytes > 0 {
            return Err(QmpError::generic(
                "virtio-mem device cannot get unplugged while some of its memory is still plugged",
            ));
        }
        if figures.requested_bytes > 0 {
            return Err(QmpError::generic(
                "virtio-mem device cannot get unplugged while 'requested-size' is not '0'",
            ));
        }
        Ok(())
    }

    /// Takes what is requested from a machine that a state was loaded into: a reset makes another one, of
    /// which as much is requested.
    pub(super) fn meet_memory_devices(&mut self) {
        let devices = self.memory_devices();
        let requested: Vec<(String, u64)> = devices
            .map(|device| {
                let figures = self.memory_figures(device);
                (device.id().to_owned(), figures.requested_bytes)
            })
            .collect();
        for (id, bytes) in requested {
            // The device has checked it as this does.
            if let Ok(spec) = self.plan.spec.with_requested(&id, bytes) {
                self.plan.spec = spec;
            }
        }
    }

    /// A guest has more or less of a memory device.
    pub(super) fn memory_resized(&mut self, id: &str) {
        let Some(device) = self.find_memory_device(id) else {
            return;
        };
        let bytes = self.memory_figures(device).plugged_bytes;
        let path = format!("{PERIPHERAL}{id}/virtio-backend");
        let data = json!({"id": id, "size": bytes, "qom-path": path});
        self.pace("MEMORY_DEVICE_SIZE_CHANGE", id, data);
    }
}
