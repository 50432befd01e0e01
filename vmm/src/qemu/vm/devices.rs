#![forbid(unsafe_code)]
//! Devices that monitors plug and unplug. The plan always has the devices that are there, so that whatever
//! machine is made next (by a reset, of a state) has them too.

use std::time::{Duration, Instant};

use serde_json::json;

use super::plan::place_socket;
use super::{RunStatus, Vm};
use crate::device::virtio::net::backend::NetConnection;
use crate::machine::{Attachment, DeviceNews, Function, open_vsock_of};
use crate::qemu::line::console::has_ports;
use crate::qemu::line::pci::Device;
use crate::qemu::line::refused;
use crate::qemu::qmp::message::{Class, QmpError};
use crate::qemu::words::Props;
use crate::report::one_line;
use crate::spec::{DeviceFault, DeviceSpec, MachineSpec, SpecError};

/// Where QEMU has devices that were given a name.
pub(super) const PERIPHERAL: &str = "/machine/peripheral/";
/// How long a guest that was asked to let go of a device is not asked again, as with QEMU: asked twice it may
/// let go twice, and the second time of what has come there meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

impl Vm {
    /// `device_add`
    pub(in crate::qemu) fn device_add(&mut self, props: Props) -> Result<(), QmpError> {
        let mut props = props;
        if let Some(driver) = props.text("driver").ok().flatten() {
            if has_ports(&driver) {
                return Err(no_hotplug(&driver));
            }
            props.add("driver", &driver);
        }
        let ports = &self.plan.wanted.memory.pci.root_ports;
        let device = Device::read(props, "device_add", ports);
        let mut device = match device.map_err(|error| QmpError::generic(error.message()))? {
            Ok(device) => device,
            Err(mut other) => {
                let driver = other.text("driver").ok().flatten();
                if driver.as_deref() == Some("pc-dimm") {
                    other.add("driver", "pc-dimm");
                    return self.module_add(other);
                }
                return Err(not_plugged(driver.as_deref()));
            }
        };
        self.take_news();
        if self.status == RunStatus::FinishMigrate || self.incoming.receiving {
            return Err(QmpError::generic("device_add not allowed while migrating"));
        }
        let spec = &self.plan.spec;
        if !spec.has_pci() {
            let driver = &device.driver;
            return Err(QmpError::generic(format!(
                "No 'PCI' bus found for device '{driver}'"
            )));
        }
        if let Some(id) = &device.id
            && (spec.dimms().iter().any(|dimm| dimm.id() == id) || self.is_generation_device(id))
        {
            return Err(duplicate(id));
        }
        if let Some(memdev) = device.memdev() {
            let memdev = memdev.to_owned();
            return self.memory_device_add(&device, &memdev);
        }
        let pci = &self.plan.wanted.memory.pci;
        // A chardev leads to one device.
        let found = device.connect(|id| {
            let chardev = pci.vhost_user.chardev(id)?;
            let mut sockets = spec.devices().iter().filter_map(DeviceSpec::vhost_user);
            let is_taken = sockets.any(|other| chardev.is_at(&other.socket));
            (!is_taken).then_some(chardev)
        });
        found.map_err(|error| QmpError::generic(error.message()))?;
        let sources = pci.sources();
        let disk_of = |drive: &str| self.images.free(drive);
        let parts = device.parts(sources, disk_of, |netdev| self.netdevs.free(netdev));
        let mut parts = parts.map_err(|error| QmpError::generic(error.message()))?;
        place_socket(&mut parts);
        let new = spec.with_device(parts);
        let new = new.map_err(|error| refusal(&device, spec, &error))?;
        let Some(made) = new.devices().last().cloned() else {
            return Ok(());
        };
        self.plug(&device, &made)?;
        if made.balloon().is_some() {
            self.meet_balloon();
        }
        if let Some(drive) = device.drive() {
            self.images.give(drive, made.id());
        }
        if let Some(netdev) = device.netdev() {
            self.netdevs.give(netdev, made.id());
        }
        self.plan.spec = new;
        Ok(())
    }

    /// Gives a device to the machine that there is; the next one has it anyway.
    fn plug(&mut self, device: &Device, made: &DeviceSpec) -> Result<(), QmpError> {
        let attachment = self.attachment(device, made).map_err(QmpError::generic)?;
        let Some(handle) = self.held.handle() else {
            // Who makes the machine opens its files.
            return Ok(());
        };
        let disk = match &attachment {
            Attachment::Disk(disk) => Some((**disk).clone()),
            _ => None,
        };
        let plugged = handle.plug(made.clone(), attachment);
        plugged.map_err(|error| QmpError::generic(one_line(&error)))?;
        // The machine after the next reset has it as this one leaves it.
        self.disks
            .extend(disk.map(|disk| (made.id().to_owned(), disk)));
        Ok(())
    }

    /// The host's side of a device.
    fn attachment(&mut self, device: &Device, made: &DeviceSpec) -> Result<Attachment, String> {
        if self.held.handle().is_some() {
            let vsock = open_vsock_of(made).map_err(|error| one_line(&error))?;
            if let Some(vsock) = vsock {
                return Ok(Attachment::Vsock(vsock));
            }
        }
        if let Some(drive) = device.drive() {
            let disk = self.images.take(drive)?;
            return Ok(disk.map_or(Attachment::Nothing, Attachment::from));
        }
        let Some(netdev) = device.netdev() else {
            return Ok(Attachment::Nothing);
        };
        let tap = self.netdevs.take(netdev)?;
        Ok(Attachment::Net(NetConnection {
            tap,
            ..NetConnection::default()
        }))
    }

    /// `device_del`
    pub(in crate::qemu) fn device_del(&mut self, id: &str) -> Result<(), QmpError> {
        self.take_news();
        let id = id.strip_prefix(PERIPHERAL).unwrap_or(id);
        let spec = &self.plan.spec;
        if self.is_generation_device(id) {
            return Err(no_hotplug("vmgenid"));
        }
        if spec.dimms().iter().any(|dimm| dimm.id() == id) {
            return self.module_del(id);
        }
        if spec.devices().iter().all(|device| device.id() != id) {
            let desc = format!("Device '{id}' not found");
            return Err(QmpError::of(Class::DeviceNotFound, desc));
        }
        if self.status == RunStatus::FinishMigrate || self.incoming.receiving {
            return Err(QmpError::generic("device_del not allowed while migrating"));
        }
        let now = Instant::now();
        if !may_ask(self.unplugging.get(id).copied(), now) {
            return Err(QmpError::generic(format!(
                "Device {id} is already in the process of unplug"
            )));
        }
        let id = id.to_owned();
        self.refuse_plugged_memory(&id)?;
        match self.held.handle() {
            // There is no guest that could be asked.
            None => self.gone(&id),
            Some(handle) => {
                let asked = handle.unplug(&id);
                asked.map_err(|error| QmpError::generic(one_line(&error)))?;
                self.unplugging.insert(id, Some(now));
            }
        }
        Ok(())
    }

    /// Hears from a new machine what becomes of its devices, and which its guest was asked to let go of.
    pub(super) fn watch_devices(&mut self) {
        self.news = crossbeam::channel::never();
        self.unplugging.clear();
        let comes_and_goes = self.plan.spec.has_pci() || self.plan.spec.slots() > 0;
        let Some(handle) = self.held.handle().filter(|_| comes_and_goes) else {
            return;
        };
        self.news = handle.watch();
        self.meet_balloon();
        self.meet_memory_devices();
        // Of a machine that ends at this moment another one is made.
        let functions = handle.functions().unwrap_or_default();
        let going = functions.into_iter().filter(|function| function.is_going);
        // When that was nobody knows any more.
        self.unplugging
            .extend(going.filter_map(|function| Some((function.id?, None))));
    }

    /// Takes in what became of devices by now.
    pub(super) fn take_news(&mut self) {
        while let Ok(news) = self.news.try_recv() {
            self.device_news(news);
        }
    }

    /// What became of a device.
    pub(super) fn device_news(&mut self, news: DeviceNews) {
        match news {
            DeviceNews::Gone { id } => self.gone(&id),
            DeviceNews::Kept { id, .. } => {
                self.unplugging.remove(&id);
                let data = json!({"device": id, "path": format!("{PERIPHERAL}{id}")});
                self.bus.send("DEVICE_UNPLUG_GUEST_ERROR", Some(data));
            }
            DeviceNews::Resized { id, notice } => {
                // What comes from now on is told anew.
                drop(notice);
                self.memory_resized(&id);
            }
            DeviceNews::ModuleGone { slot } => self.module_gone(slot),
            DeviceNews::ModuleOutcome {
                slot,
                event,
                status,
                is_refusal,
            } => self.module_outcome(slot, (event, status), is_refusal),
        }
    }

    /// Devices that were to go when the machine was reset are gone, as with QEMU.
    pub(super) fn end_unplugging(&mut self) {
        for id in std::mem::take(&mut self.unplugging).into_keys() {
            self.gone(&id);
        }
    }

    fn gone(&mut self, id: &str) {
        self.unplugging.remove(id);
        let was_balloon = self.is_balloon(id);
        let spec = &self.plan.spec;
        let gone = spec.devices().iter().find(|device| device.id() == id);
        let backend = gone.and_then(|device| spec.memory_backend_of(device));
        let without = spec.without_device(id);
        match backend {
            Some(position) => self.release(without, position),
            None => self.plan.spec = without,
        }
        self.hotplugged.remove(id);
        // A guest that has taken it out has had this done; without one there is nobody else to do it.
        for (_, disk) in self.disks.iter().filter(|(of, _)| of == id) {
            if disk.has_pending_writes()
                && let Err(error) = disk.flush()
            {
                tracing::warn!(
                    device = id,
                    "what was written may not be on the disk: {error}"
                );
            }
        }
        self.disks.retain(|(of, _)| of != id);
        if was_balloon {
            // The next one begins anew.
            self.balloon = super::balloon::Balloon::default();
        }
        self.images.release(id);
        self.netdevs.release(id);
        let path = format!("{PERIPHERAL}{id}");
        let inner = json!({"path": format!("{path}/virtio-backend")});
        self.bus.send("DEVICE_DELETED", Some(inner));
        let data = json!({"device": id, "path": path});
        self.bus.send("DEVICE_DELETED", Some(data));
    }

    /// What is on the bus, as a guest finds it.
    pub(in crate::qemu) fn functions(&self) -> Result<Vec<Function>, QmpError> {
        let functions = self.held.handle().map(|handle| handle.functions());
        let functions = functions.unwrap_or_else(|| Ok(Vec::new()));
        functions.map_err(|error| QmpError::generic(one_line(&error)))
    }
}

/// Whether a guest may be asked to let go of a device: what there is says that it was, and when.
fn may_ask(asked: Option<Option<Instant>>, now: Instant) -> bool {
    let last = asked.flatten();
    last.is_none_or(|last| now.saturating_duration_since(last) >= PATIENCE)
}

/// A device of another kind.
fn not_plugged(driver: Option<&str>) -> QmpError {
    match driver {
        None => QmpError::generic("Parameter 'driver' is missing"),
        Some(driver @ "vmgenid") => no_hotplug(driver),
        Some(driver) => QmpError::generic(refused::device(driver)),
    }
}

fn no_hotplug(driver: &str) -> QmpError {
    QmpError::generic(format!("Device '{driver}' does not support hotplugging"))
}

fn duplicate(id: &str) -> QmpError {
    QmpError::generic(format!("Duplicate device ID '{id}'"))
}

/// A refusal in QEMU's words.
pub(super) fn refusal(device: &Device, spec: &MachineSpec, error: &SpecError) -> QmpError {
    let driver = &device.driver;
    let SpecError::Device { reason, id } = error else {
        return QmpError::generic(one_line(error));
    };
    QmpError::generic(match reason {
        DeviceFault::BadId => "Parameter 'id' expects an identifier".to_owned(),
        DeviceFault::DuplicateId => return duplicate(id),
        DeviceFault::SlotTaken { slot, other } => {
            let other = spec.devices().iter().find(|device| device.id() == other);
            let kind = other.map_or("device", |other| other.kind().word());
            let id = other.map_or("", DeviceSpec::id);
            format!(
                "PCI: slot {slot} function 0 not available for {driver}, in use by {kind}-pci,id={id}"
            )
        }
        DeviceFault::NoFreeSlot => {
            format!("PCI: no slot/function available for {driver}, all in use or reserved")
        }
        _ => one_line(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_asked_again_after_a_while() {
        let asked = Instant::now();
        let after = |time| may_ask(Some(Some(asked)), asked + time);
        assert!(!after(Duration::ZERO) && !after(PATIENCE - Duration::from_nanos(1)));
        assert!(after(PATIENCE) && after(PATIENCE * 100));
        assert!(may_ask(None, asked), "nobody has asked");
        assert!(may_ask(Some(None), asked), "somebody has, long ago");
    }
}
