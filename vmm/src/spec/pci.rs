#![forbid(unsafe_code)]
//! The PCI bus of a machine, and what is on it.

use super::device::place;
use super::mem::{MemFault, MemParts, of_parts};
use super::{DeviceParts, DeviceSpec, MachineSpec, SpecError};

impl MachineSpec {
    /// The same machine with a PCI bus, even if it has no device; or as its devices have it.
    #[must_use]
    pub fn with_pci(self, has_pci: bool) -> Self {
        Self {
            has_pci: has_pci || !self.devices.is_empty(),
            ..self
        }
    }

    /// The same machine with these devices. A bus stays when the last of its devices has gone.
    pub fn with_devices(self, parts: Vec<DeviceParts>) -> Result<Self, SpecError> {
        let is_known = |mem: &MemParts| {
            let mut backends = self.backends().iter();
            mem.guest_address.is_some() && backends.any(|backend| backend.id() == mem.backend)
        };
        let mut mems = of_parts(&parts).into_iter();
        if let Some((device, mem)) = mems.find(|(_, mem)| !is_known(mem)) {
            let backend = mem.backend;
            return Err(SpecError::of_memory(
                &device,
                MemFault::NoBackend { backend },
            ));
        }
        let devices = place(parts).map_err(|(id, reason)| SpecError::Device { id, reason })?;
        self.check_sharing(&devices)?;
        Ok(Self {
            has_pci: self.has_pci || !devices.is_empty(),
            devices,
            ..self
        })
    }

    /// The same machine with one device more, at the first free place unless it has one of its own.
    pub fn with_device(&self, part: DeviceParts) -> Result<Self, SpecError> {
        let mut parts: Vec<_> = self.devices.iter().map(DeviceSpec::to_parts).collect();
        parts.push(part);
        self.clone().with_devices(parts)
    }

    /// The same machine without a device.
    #[must_use]
    pub fn without_device(&self, id: &str) -> Self {
        let mut spec = self.clone();
        let gone = spec.devices.iter().find(|device| device.id() == id);
        let backend = gone.and_then(|device| spec.memory_backend_of(device));
        spec.devices.retain(|device| device.id() != id);
        match backend {
            Some(backend) => spec.without_module(backend),
            None => spec,
        }
    }

    /// Whether it has a PCI bus: there is one where there is a device, and where one was asked for.
    pub fn has_pci(&self) -> bool {
        self.has_pci
    }

    /// Devices on the PCI bus, in the order in which they were given.
    pub fn devices(&self) -> &[DeviceSpec] {
        &self.devices
    }
}
