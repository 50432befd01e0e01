#![forbid(unsafe_code)]
//! The devices on a machine's PCI bus: made, connected, paused, saved and restored together. Which come and
//! go while the machine runs is [`super::hotplug`]'s.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam::channel::Sender;

use crate::arch::x86_64::ports::{PCI_CONFIG_PORTS, PCI_HOTPLUG_GSI, PCI_HOTPLUG_PORTS};
use crate::device::bus::{BusError, MmioBus, PioBus};
use crate::device::pci::bus::PciBus;
use crate::device::pci::host::{ConfigMemory, ConfigPorts, Window};
use crate::device::pci::hotplug::{Hotplug, HotplugPorts, Level};
use crate::device::pci::msix::{Message, MessageSink};
use crate::device::pci::state::{
    HOTPLUG_KIND, HOTPLUG_VERSION, HotplugState, PCI_KIND, PCI_VERSION, PciState,
};
use crate::device::virtio::balloon::backend::BalloonPort;
use crate::device::virtio::balloon::device::Balloon;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::block::device::Block;
use crate::device::virtio::block::document::{Document, DocumentPort};
use crate::device::virtio::console::backend::{ConsoleConnection, ConsolePort};
use crate::device::virtio::console::device::Console;
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::limit::{HostClock, Limiter};
use crate::device::virtio::mem::device::{Mem, SizeListener};
use crate::device::virtio::net::backend::{NetConnection, NetPort};
use crate::device::virtio::net::device::Net;
use crate::device::virtio::rng::device::Rng;
use crate::device::virtio::state::VirtioState;
use crate::device::virtio::transport::pci::{BAR_BYTES, VirtioPci};
use crate::device::virtio::vhost_user::device::VhostUser;
use crate::device::virtio::vsock::backend::{VsockConnection, VsockPort};
use crate::device::virtio::vsock::device::Vsock;
use crate::kvm::irq::{LevelLine, MessageSender};
use crate::kvm::vm::Vm;
use crate::memory::guest::GuestRam;
use crate::memory::layout::{PCI_CONFIG_MEMORY, PCI_WINDOW};
use crate::spec::{DeviceKind, DeviceSpec, MacAddress, MachineSpec, VhostUserFunction};

use super::driver::Message as DriverMessage;
use super::error::MachineError;
use super::modules::ModuleMessage;
use super::records::{decode, decode_one, encode};
use super::state::DeviceRecord;

/// A bus with its devices.
#[derive(Debug)]
pub(super) struct PciDevices {
    ports: Arc<Mutex<ConfigPorts>>,
    pub(super) devices: Vec<Arc<Mutex<VirtioPci>>>,
    /// Where devices take their connections.
    pub(super) connections: Ports,
    pub(super) bus: Arc<PciBus>,
    pub(super) hotplug: Arc<Hotplug>,
    pub(super) outside: Option<Outside>,
}

/// Where devices take their connections.
#[derive(Debug)]
pub(super) struct Ports {
    /// That of the vsock device, if there is one.
    pub(super) vsock: VsockPort,
    /// Those of network devices, by their ids.
    pub(super) nets: Vec<(String, NetPort)>,
    /// That of the document, if there is one.
    pub(super) document: DocumentPort,
    /// Those of console devices, by their ids.
    pub(super) consoles: Vec<(String, ConsolePort)>,
    /// That of the balloon, if there is one.
    pub(super) balloon: Option<BalloonPort>,
    /// Who hears what memory grows and shrinks.
    pub(super) driver: Arc<OnceLock<Sender<DriverMessage>>>,
}

impl Ports {
    /// Tells the driver that a guest has more or less memory of a device.
    fn size_listener(&self, id: &str) -> SizeListener {
        let (id, driver) = (id.to_owned(), Arc::clone(&self.driver));
        Arc::new(move |notice| {
            if let Some(driver) = driver.get() {
                let message = ModuleMessage::Resized(id.clone(), notice);
                // A driver that has ended takes its devices along.
                let _ = driver.send(DriverMessage::Module(message));
            }
        })
    }
}

/// What devices are connected to.
#[derive(Clone)]
pub(super) struct Outside {
    pub(super) ram: Arc<GuestRam>,
    pub(super) sink: Arc<dyn MessageSink>,
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Outside")
    }
}

impl PciDevices {
    /// The devices of a machine as after power-on; `None` where it has none, and so no bus. Takes the
    /// images of its disks, the host's side of its vsock, the ends of its cables, and those of its ports.
    pub(super) fn new(
        spec: &MachineSpec,
        disks: Vec<(String, Disk)>,
        vsock: Option<VsockConnection>,
        nets: Vec<(String, NetConnection)>,
        consoles: Vec<(String, ConsoleConnection)>,
    ) -> Result<Option<Self>, MachineError> {
        if !spec.has_pci() {
            return Ok(None);
        }
        let mut disks = disks;
        let connections = Ports {
            vsock: VsockPort::default(),
            nets: net_ports(spec.devices(), nets),
            document: DocumentPort::default(),
            consoles: console_ports(spec.devices(), consoles),
            balloon: balloon_port(spec.devices()),
            driver: Arc::default(),
        };
        if let Some(vsock) = vsock {
            connections.vsock.put(vsock);
        }
        let bus = PciBus::new();
        let mut devices = Vec::new();
        for device in spec.devices() {
            let made = VirtioPci::new(
                device.id(),
                device.slot(),
                PCI_WINDOW.start + u64::from(device.slot()) * BAR_BYTES,
                make(device, &mut disks, &connections)?,
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
            connections,
            hotplug: Arc::new(Hotplug::new(Arc::clone(&bus), HotplugState::default())),
            bus,
            outside: None,
        }))
    }

    /// Goes on where `records` were saved.
    pub(super) fn restore(&mut self, records: &[DeviceRecord]) -> Result<(), MachineError> {
        let PciState { config_address } = decode(records, PCI_KIND, PCI_VERSION)?;
        self.ports = Arc::new(Mutex::new(ConfigPorts::new(
            Arc::clone(&self.bus),
            config_address,
        )));
        let state: HotplugState = decode(records, HOTPLUG_KIND, HOTPLUG_VERSION)?;
        self.hotplug = Arc::new(Hotplug::new(Arc::clone(&self.bus), state));
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
            || record.kind == HOTPLUG_KIND
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
        let hotplug = HotplugPorts::new(Arc::clone(&self.hotplug));
        pio.insert(PCI_HOTPLUG_PORTS, Arc::new(Mutex::new(hotplug)))?;
        let registers = ConfigMemory::new(Arc::clone(&self.bus));
        mmio.insert(PCI_CONFIG_MEMORY, Arc::new(Mutex::new(registers)))?;
        let window = Window::new(Arc::clone(&self.bus), PCI_WINDOW.start);
        mmio.insert(PCI_WINDOW, Arc::new(Mutex::new(window)))
    }

    /// Gives the devices the VM's memory and its interrupts.
    pub(super) fn connect(&mut self, vm: &Vm, ram: &Arc<GuestRam>) {
        let outside = Outside {
            ram: Arc::clone(ram),
            sink: Arc::new(Sink(vm.message_sender())),
        };
        for device in &self.devices {
            lock(device).connect(Arc::clone(ram), Arc::clone(&outside.sink));
        }
        self.outside = Some(outside);
        let line = vm.level_line(PCI_HOTPLUG_GSI);
        self.hotplug.connect(Box::new(HotplugLine(line)));
    }

    /// Says what the vsock device is connected to; it takes that when the machine goes on.
    pub(super) fn bind_vsock(&self, connection: VsockConnection) {
        self.connections.vsock.put(connection);
    }

    /// Puts what the document says where its device takes it when the machine goes on.
    pub(super) fn bind_document(&self, content: Vec<u8>) {
        self.connections.document.put(content);
    }

    /// Puts connections where their devices take them when the machine goes on.
    pub(super) fn bind_nets(&self, nets: Vec<(String, NetConnection)>) {
        for (id, connection) in nets {
            let mut ports = self.connections.nets.iter();
            if let Some((_, port)) = ports.find(|(other, _)| *other == id) {
                port.put(connection);
            }
        }
    }

    /// As [`Self::bind_nets`], for consoles.
    pub(super) fn bind_consoles(&self, consoles: Vec<(String, ConsoleConnection)>) {
        for (id, connection) in consoles {
            let mut ports = self.connections.consoles.iter();
            if let Some((_, port)) = ports.find(|(other, _)| *other == id) {
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

    /// Works from now on.
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
        let mut records = vec![
            encode(PCI_KIND, PCI_VERSION, &state)?,
            encode(HOTPLUG_KIND, HOTPLUG_VERSION, &self.hotplug.save())?,
        ];
        for device in &self.devices {
            let device = lock(device);
            let kind = device.worker().device_type();
            records.push(encode(kind.kind, kind.version, &device.save())?);
        }
        Ok(records)
    }
}

/// A port for each network device, with its connection where that is known.
pub(super) fn net_ports(
    devices: &[DeviceSpec],
    nets: Vec<(String, NetConnection)>,
) -> Vec<(String, NetPort)> {
    let ports = devices.iter().filter(|device| device.net().is_some());
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

/// A place for the connection of each console device, with it where that is known.
fn console_ports(
    devices: &[DeviceSpec],
    consoles: Vec<(String, ConsoleConnection)>,
) -> Vec<(String, ConsolePort)> {
    let places = devices.iter().filter(|device| device.console().is_some());
    let places: Vec<_> = places
        .map(|device| (device.id().to_owned(), ConsolePort::default()))
        .collect();
    for (id, connection) in consoles {
        if let Some((_, place)) = places.iter().find(|(other, _)| *other == id) {
            place.put(connection);
        }
    }
    places
}

/// The way to the balloon, where there is one.
pub(super) fn balloon_port(devices: &[DeviceSpec]) -> Option<BalloonPort> {
    let balloon = devices.iter().find_map(DeviceSpec::balloon);
    balloon.map(|_| BalloonPort::default())
}

/// The device that a specification asks for.
pub(super) fn make(
    spec: &DeviceSpec,
    disks: &mut Vec<(String, Disk)>,
    ports: &Ports,
) -> Result<Box<dyn VirtioDevice>, MachineError> {
    match spec.kind() {
        DeviceKind::Rng => Ok(Box::new(Rng::default())),
        DeviceKind::Mem(parts) => Ok(Box::new(Mem::new(
            parts,
            Some(ports.size_listener(spec.id())),
        ))),
        DeviceKind::Document => Ok(Box::new(Document::new(ports.document.clone()))),
        DeviceKind::Vsock(parts) => Ok(Box::new(Vsock::new(parts.cid, ports.vsock.clone()))),
        DeviceKind::Net(net) => {
            let port = ports.nets.iter().find(|(id, _)| id == spec.id());
            let port = port.map(|(_, port)| port.clone()).unwrap_or_default();
            let mac = net.mac.unwrap_or(MacAddress::DEFAULT);
            let clock = Arc::new(HostClock::default());
            Ok(Box::new(
                Net::new(mac, port).with_limits(&net.limits, clock),
            ))
        }
        DeviceKind::Balloon(parts) => Ok(Box::new(Balloon::new(
            *parts,
            ports.balloon.clone().unwrap_or_default(),
        ))),
        DeviceKind::Console(parts) => {
            let place = ports.consoles.iter().find(|(id, _)| id == spec.id());
            let place = place.map(|(_, place)| place.clone()).unwrap_or_default();
            Ok(Box::new(Console::new(parts, place)))
        }
        DeviceKind::VhostUser(parts) => {
            let device = match parts.function {
                VhostUserFunction::Block => VhostUser::block(&parts.socket),
                VhostUserFunction::Net { mac } => {
                    VhostUser::net(&parts.socket, mac.unwrap_or(MacAddress::DEFAULT))
                }
            };
            let device = device.map_err(|source| MachineError::VhostUser {
                id: spec.id().to_owned(),
                source,
            })?;
            Ok(Box::new(device))
        }
        DeviceKind::Block(parts) => {
            let position = disks.iter().position(|(id, _)| id == spec.id());
            let position = position.ok_or_else(|| MachineError::NoDisk {
                id: spec.id().to_owned(),
            })?;
            let (_, disk) = disks.swap_remove(position);
            let serial = parts.serial.as_deref().unwrap_or_default();
            let limiter = Limiter::new(&parts.limits, Arc::new(HostClock::default()));
            Ok(Box::new(Block::new(disk, serial).with_limiter(limiter)))
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

/// The line of devices that come and go.
pub(super) struct HotplugLine(pub(super) LevelLine);

impl Level for HotplugLine {
    fn set(&self, is_raised: bool) {
        if let Err(error) = self.0.set(is_raised) {
            tracing::warn!("the guest cannot be told of its devices: {error}");
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
