#![forbid(unsafe_code)]
//! The devices on a machine's PCI bus: made, connected, paused, saved and restored together.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arch::x86_64::ports::PCI_CONFIG_PORTS;
use crate::device::bus::{BusError, MmioBus, PioBus};
use crate::device::pci::bus::PciBus;
use crate::device::pci::host::{ConfigMemory, ConfigPorts, Window};
use crate::device::pci::msix::{Message, MessageSink};
use crate::device::pci::state::{PCI_KIND, PCI_VERSION, PciState};
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::block::device::Block;
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::net::backend::{NetConnection, NetPort};
use crate::device::virtio::net::device::Net;
use crate::device::virtio::rng::device::Rng;
use crate::device::virtio::state::VirtioState;
use crate::device::virtio::transport::pci::{BAR_BYTES, VirtioPci};
use crate::kvm::irq::MessageSender;
use crate::kvm::vm::Vm;
use crate::memory::guest::GuestRam;
use crate::memory::layout::{PCI_CONFIG_MEMORY, PCI_WINDOW};
use crate::spec::{DeviceKind, DeviceSpec, MacAddress, MachineSpec};

use super::error::MachineError;
use super::records::{decode, decode_one, encode};
use super::state::DeviceRecord;

/// A bus with its devices.
#[derive(Debug)]
pub(super) struct PciDevices {
    ports: Arc<Mutex<ConfigPorts>>,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    /// Where network devices take their connections, by their ids.
    ports_of_nets: Vec<(String, NetPort)>,
    bus: Arc<PciBus>,
}

impl PciDevices {
    /// The devices of a machine as after power-on; `None` where it has none, and so no bus. Takes the
    /// images of its disks and the ends of its cables.
    pub(super) fn new(
        spec: &MachineSpec,
        disks: Vec<(String, Disk)>,
        nets: Vec<(String, NetConnection)>,
    ) -> Result<Option<Self>, MachineError> {
        if spec.devices().is_empty() {
            return Ok(None);
        }
        let mut disks = disks;
        let ports_of_nets = net_ports(spec, nets);
        let mut bus = PciBus::new();
        let mut devices = Vec::new();
        for device in spec.devices() {
            let made = VirtioPci::new(
                device.id(),
                device.slot(),
                PCI_WINDOW.start + u64::from(device.slot()) * BAR_BYTES,
                make(device, &mut disks, &ports_of_nets)?,
            );
            let made = Arc::new(Mutex::new(made));
            // A specification has each place once.
            bus.insert(device.slot(), Arc::clone(&made) as _);
            devices.push(made);
        }
        let bus = Arc::new(bus);
        Ok(Some(Self {
            ports: Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(&bus), 0))),
            devices,
            ports_of_nets,
            bus,
        }))
    }

    /// Goes on where `records` were saved.
    pub(super) fn restore(&mut self, records: &[DeviceRecord]) -> Result<(), MachineError> {
        let PciState { config_address } = decode(records, PCI_KIND, PCI_VERSION)?;
        self.ports = Arc::new(Mutex::new(ConfigPorts::new(
            Arc::clone(&self.bus),
            config_address,
        )));
        for device in &self.devices {
            let mut device = lock(device);
            let (state, record) = record_of(&device, records)?;
            device
                .restore(&state)
                .map_err(|error| MachineError::DeviceState {
                    kind: format!("{} {}", record.kind, device.id()),
                    reason: error.to_string(),
                })?;
        }
        Ok(())
    }

    /// Whether a record is of one of these devices, or of the bus.
    pub(super) fn has(&self, record: &DeviceRecord) -> bool {
        record.kind == PCI_KIND
            || self.devices.iter().any(|device| {
                let device = lock(device);
                let kind = device.worker().device_type();
                // What cannot be decoded is named when it is.
                kind.kind == record.kind
                    && decode_one::<VirtioState>(record, kind.version)
                        .map_or(true, |state| state.id == device.id())
            })
    }

    /// Puts the bus where the guest finds it.
    pub(super) fn insert(&self, pio: &mut PioBus, mmio: &mut MmioBus) -> Result<(), BusError> {
        pio.insert(PCI_CONFIG_PORTS, Arc::clone(&self.ports) as _)?;
        let registers = ConfigMemory::new(Arc::clone(&self.bus));
        mmio.insert(PCI_CONFIG_MEMORY, Arc::new(Mutex::new(registers)))?;
        let window = Window::new(Arc::clone(&self.bus), PCI_WINDOW.start);
        mmio.insert(PCI_WINDOW, Arc::new(Mutex::new(window)))
    }

    /// Gives the devices the VM's memory and its interrupts.
    pub(super) fn connect(&self, vm: &Vm, ram: &Arc<GuestRam>) {
        let sink: Arc<dyn MessageSink> = Arc::new(Sink(vm.message_sender()));
        for device in &self.devices {
            lock(device).connect(Arc::clone(ram), Arc::clone(&sink));
        }
    }

    /// Puts connections where their devices take them when the machine goes on.
    pub(super) fn bind_nets(&self, nets: Vec<(String, NetConnection)>) {
        for (id, connection) in nets {
            if let Some((_, port)) = self.ports_of_nets.iter().find(|(other, _)| *other == id) {
                port.put(connection);
            }
        }
    }

    /// Does all that the guest has asked for, and nothing more until [`Self::resume`].
    pub(super) fn pause(&self) {
        for device in &self.devices {
            lock(device).worker().pause();
        }
    }

    /// Works again.
    pub(super) fn resume(&self) {
        for device in &self.devices {
            lock(device).worker().resume();
        }
    }

    /// State of all devices. They must be paused.
    pub(super) fn save(&self) -> Result<Vec<DeviceRecord>, MachineError> {
        let state = PciState {
            config_address: lock(&self.ports).address(),
        };
        let mut records = vec![encode(PCI_KIND, PCI_VERSION, &state)?];
        for device in &self.devices {
            let device = lock(device);
            let kind = device.worker().device_type();
            records.push(encode(kind.kind, kind.version, &device.save())?);
        }
        Ok(records)
    }
}

/// A port for each network device, with its connection where that is known.
fn net_ports(spec: &MachineSpec, nets: Vec<(String, NetConnection)>) -> Vec<(String, NetPort)> {
    let devices = spec.devices().iter();
    let ports = devices.filter(|device| device.net().is_some());
    let ports: Vec<_> = ports
        .map(|device| (device.id().to_owned(), NetPort::default()))
        .collect();
    for (id, connection) in nets {
        if let Some((_, port)) = ports.iter().find(|(other, _)| *other == id) {
            port.put(connection);
        }
    }
    ports
}

/// The device that a specification asks for.
fn make(
    spec: &DeviceSpec,
    disks: &mut Vec<(String, Disk)>,
    ports: &[(String, NetPort)],
) -> Result<Box<dyn VirtioDevice>, MachineError> {
    match spec.kind() {
        DeviceKind::Rng => Ok(Box::new(Rng::default())),
        DeviceKind::Net(net) => {
            let port = ports.iter().find(|(id, _)| id == spec.id());
            let port = port.map(|(_, port)| port.clone()).unwrap_or_default();
            let mac = net.mac.unwrap_or(MacAddress::DEFAULT);
            Ok(Box::new(Net::new(mac, port)))
        }
        DeviceKind::Block(parts) => {
            let position = disks.iter().position(|(id, _)| id == spec.id());
            let position = position.ok_or_else(|| MachineError::NoDisk {
                id: spec.id().to_owned(),
            })?;
            let (_, disk) = disks.swap_remove(position);
            let serial = parts.serial.as_deref().unwrap_or_default();
            Ok(Box::new(Block::new(disk, serial)))
        }
    }
}

/// The record of a device, decoded.
fn record_of<'a>(
    device: &VirtioPci,
    records: &'a [DeviceRecord],
) -> Result<(VirtioState, &'a DeviceRecord), MachineError> {
    let kind = device.worker().device_type();
    let mut found = None;
    for record in records.iter().filter(|record| record.kind == kind.kind) {
        let state: VirtioState = decode_one(record, kind.version)?;
        if state.id != device.id() {
            continue;
        }
        if found.replace((state, record)).is_some() {
            return Err(MachineError::DeviceState {
                kind: format!("{} {}", kind.kind, device.id()),
                reason: "it is there twice".to_owned(),
            });
        }
    }
    found.ok_or_else(|| MachineError::MissingDevice {
        kind: format!("{} {}", kind.kind, device.id()),
    })
}

/// Messages of devices, to the VM.
#[derive(Debug)]
struct Sink(MessageSender);

impl MessageSink for Sink {
    fn send(&self, message: Message) -> io::Result<()> {
        self.0.send(message.address, message.data)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
