#![forbid(unsafe_code)]
//! Devices that come and go while the machine is there. The driver's thread makes them and lets go of them;
//! the guest takes them out on its vCPUs' threads (see [`crate::device::pci::hotplug`]), and the driver hears
//! of it before it hears that such a vCPU has stopped: a state that is saved has what is there.

use std::sync::{Arc, Mutex};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use crate::device::pci::bus::{ConfigAddress, HOST_BRIDGE_SLOT};
use crate::device::pci::hotplug::SlotEvent;
use crate::device::virtio::balloon::backend::BalloonPort;
use crate::device::virtio::block::document::DocumentPort;
use crate::device::virtio::mem::device::SizeNotice;
use crate::device::virtio::transport::pci::{BAR_BYTES, VirtioPci};
use crate::device::virtio::vsock::backend::VsockPort;
use crate::device::virtio::worker::Worker;
use crate::kvm::vm::Vm;
use crate::spec::{DeviceSpec, LAST_SLOT, MAX_SLOTS};

use super::connections::Attachment;
use super::devices::Devices;
use super::driver::Message;
use super::error::MachineError;
use super::lifecycle::MachineHandle;
use super::modules::ModuleMessage;
use super::pci::{PciDevices, Ports, balloon_port, lock, make, net_ports};
use super::request::Phase;

/// Registers that describe a function to whoever asks.
const HEADER_BYTES: usize = 64;

/// Most news that wait. For each place there is one that its device has gone, or that it is kept, and no
/// other before somebody plugs or unplugs there again, who takes in first what waits.
///
/// For each slot of memory the same, and how it went when something came. For each device that is memory one
/// that there is more or less of it.
const MAX_NEWS: usize = 3 * (LAST_SLOT as usize + 1) + 4 * MAX_SLOTS as usize;

/// What became of a device.
#[derive(Debug, PartialEq, Eq)]
pub enum DeviceNews {
    /// The guest has let go of it, and everything that it had of the host's is closed.
    Gone {
        /// What it was called.
        id: String,
    },
    /// The guest was asked to let go of it and says that it cannot.
    Kept {
        /// What it is called.
        id: String,
        /// Why, as ACPI has it.
        status: u8,
    },
    /// The guest has let go of the memory module in a slot.
    ModuleGone {
        /// The slot.
        slot: u32,
    },
    /// A guest has more or less of memory that grows and shrinks: see [`MachineHandle::memory_figures`].
    Resized {
        /// What its device is called.
        id: String,
        /// Until it is dropped there are no more such news of the device.
        notice: SizeNotice,
    },
    /// The guest says how something went with the memory module in a slot.
    ModuleOutcome {
        /// The slot.
        slot: u32,
        /// What was asked of it, as ACPI has it.
        event: u8,
        /// How that went.
        status: u8,
        /// Whether it was asked to let go of it, and will not.
        is_refusal: bool,
    },
}

/// A function on the bus as a guest finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// What its device is called; the host bridge has no name.
    pub id: Option<String>,
    /// Its place.
    pub slot: u8,
    /// The first 64 bytes of its registers.
    pub header: Vec<u8>,
    /// Length of its memory, which its first base address register is for; 0 where it has none.
    pub memory_bytes: u64,
    /// Whether the guest was asked to let go of it, and has not.
    pub is_going: bool,
}

/// What is asked of the driver, and what it hears from vCPUs.
#[derive(Debug)]
pub(super) enum DeviceMessage {
    /// Plug a device with the host's side of it.
    Plug(
        Box<DeviceSpec>,
        Attachment,
        Sender<Result<(), MachineError>>,
    ),
    /// Ask the guest to let go of a device.
    Unplug(String, Sender<Result<(), MachineError>>),
    /// Say what is on the bus.
    List(Sender<Vec<Function>>),
    /// Say how the balloon is reached.
    Balloon(Sender<Option<BalloonPort>>),
    /// Tell what becomes of devices from now on.
    Watch(Sender<DeviceNews>),
    /// A guest did something.
    Slot(SlotEvent),
}

impl MachineHandle {
    /// Plugs a device and tells the guest, which finds it when it looks. A disk comes with its image, a network
    /// device with the end of its cable if it has one.
    pub fn plug(&self, device: DeviceSpec, attachment: Attachment) -> Result<(), MachineError> {
        self.about_devices(|reply| DeviceMessage::Plug(Box::new(device), attachment, reply))?
    }

    /// Asks the guest to let go of a device. Whether and when it does is up to it: see [`Self::watch`]. It may
    /// be asked again.
    pub fn unplug(&self, id: &str) -> Result<(), MachineError> {
        self.about_devices(|reply| DeviceMessage::Unplug(id.to_owned(), reply))?
    }

    /// What is on the bus, the host bridge first; nothing where there is none.
    pub fn functions(&self) -> Result<Vec<Function>, MachineError> {
        self.about_devices(DeviceMessage::List)
    }

    /// The devices on the bus by their names.
    pub fn devices(&self) -> Result<Vec<String>, MachineError> {
        let functions = self.functions()?.into_iter();
        Ok(functions.filter_map(|function| function.id).collect())
    }

    /// The way to the balloon; `None` where there is none.
    pub fn balloon(&self) -> Result<Option<BalloonPort>, MachineError> {
        self.about_devices(DeviceMessage::Balloon)
    }

    /// What becomes of devices from now on, for one who listens: a message for each that goes, and at most one
    /// for each call of [`Self::unplug`]. Who plugs or unplugs takes in first what waits here.
    pub fn watch(&self) -> Receiver<DeviceNews> {
        let (sender, news) = bounded(MAX_NEWS);
        // Of a machine that has ended there are no news.
        let message = DeviceMessage::Watch(sender);
        let _ = self.requests.send(Message::Device(message));
        news
    }

    fn about_devices<T>(
        &self,
        message: impl FnOnce(Sender<T>) -> DeviceMessage,
    ) -> Result<T, MachineError> {
        let (reply, answer) = bounded(1);
        let _ = self.requests.send(Message::Device(message(reply)));
        answer.recv().map_err(|_| MachineError::Gone)
    }
}

impl Devices {
    /// What guests do to devices goes to the driver. Before any vCPU runs.
    pub(super) fn tell_of_slots(&self, driver: &Sender<Message>) {
        if let Some(slots) = &self.modules {
            let driver = driver.clone();
            slots.listen(Box::new(move |event| {
                let _ = driver.send(Message::Module(ModuleMessage::Event(event)));
            }));
        }
        if let Some(pci) = &self.pci {
            let driver = driver.clone();
            // There is one.
            let _ = pci.connections.driver.set(driver.clone());
            pci.hotplug.listen(Box::new(move |event| {
                // A driver that has ended takes its devices along.
                let _ = driver.send(Message::Device(DeviceMessage::Slot(event)));
            }));
        }
    }

    /// Plugs what is there before the first instruction. Behind [`Self::connect`].
    pub(super) fn plug_first(&mut self) -> Result<(), MachineError> {
        for (spec, attachment) in std::mem::take(&mut self.plugged) {
            let pci = self.pci.as_mut().ok_or(MachineError::NoPci)?;
            pci.plug(&spec, attachment, Phase::Paused)?;
        }
        Ok(())
    }

    /// Does what is asked for.
    pub(super) fn take_message(&mut self, message: DeviceMessage, phase: Phase, vm: &Vm) {
        let no_bus = || Err(MachineError::NoPci);
        match message {
            // Whoever asked and is gone wants no answer.
            DeviceMessage::Plug(device, mut attachment, reply) => {
                let memory = attachment.take_memory();
                let shown = memory.map_or(Ok(()), |memory| self.show(*memory, vm));
                let is_shown = shown.is_ok();
                let pci = self.pci.as_mut();
                let plug = |pci: &mut PciDevices| pci.plug(&device, attachment, phase);
                let plugged = shown.and_then(|()| pci.map_or_else(no_bus, plug));
                let address = device.memory().and_then(|memory| memory.guest_address);
                if let (true, Err(_), Some(address)) = (is_shown, &plugged, address) {
                    self.remove_module(address, vm);
                }
                let _ = reply.send(plugged);
            }
            DeviceMessage::Unplug(id, reply) => {
                let pci = self.pci.as_ref();
                let _ = reply.send(pci.map_or_else(no_bus, |pci| pci.request_unplug(&id)));
            }
            DeviceMessage::List(reply) => {
                let functions = self.pci.as_ref().map(PciDevices::functions);
                let _ = reply.send(functions.unwrap_or_default());
            }
            DeviceMessage::Balloon(reply) => {
                let pci = self.pci.as_ref();
                let _ = reply.send(pci.and_then(|pci| pci.connections.balloon.clone()));
            }
            DeviceMessage::Watch(news) => self.news = Some(news),
            DeviceMessage::Slot(event) => {
                let address = self.pci.as_ref().and_then(|pci| pci.memory_in(event));
                let news = self.pci.as_mut().and_then(|pci| pci.take_event(event));
                if let Some(address) = address {
                    self.remove_module(address, vm);
                }
                if let Some(news) = news {
                    self.tell(news);
                }
            }
        }
    }

    /// Tells whoever listens what became of a device.
    pub(super) fn tell(&self, news: DeviceNews) {
        if let Some(watcher) = &self.news
            && let Err(TrySendError::Full(news)) = watcher.try_send(news)
        {
            tracing::warn!(?news, "news of a device were dropped: nobody takes them in");
        }
    }
}

impl PciDevices {
    fn plug(
        &mut self,
        spec: &DeviceSpec,
        attachment: Attachment,
        phase: Phase,
    ) -> Result<(), MachineError> {
        let taken = || MachineError::Taken {
            id: spec.id().to_owned(),
            slot: spec.slot(),
        };
        if (self.devices.iter().map(|device| lock(device)))
            .any(|other| other.id() == spec.id() || other.slot() == spec.slot())
        {
            return Err(taken());
        }
        let id = spec.id().to_owned();
        let (mut disks, mut nets) = (Vec::new(), Vec::new());
        let vsock = VsockPort::default();
        match attachment {
            Attachment::Nothing => (),
            Attachment::Disk(disk) => disks.push((id, *disk)),
            Attachment::Net(connection) => nets.push((id, connection)),
            Attachment::Vsock(connection) => vsock.put(connection),
            // It was plugged before.
            Attachment::Memory(_) => (),
        }
        let ports = Ports {
            nets: net_ports(std::slice::from_ref(spec), nets),
            document: DocumentPort::default(),
            // Ports are not plugged.
            consoles: Vec::new(),
            vsock,
            balloon: balloon_port(std::slice::from_ref(spec)),
            driver: Arc::clone(&self.connections.driver),
        };
        let device = make(spec, &mut disks, &ports)?;
        if let Some(outside) = &self.outside {
            outside.ram.gate().require_for(spec)?;
        }
        // Without an address, as after a reset: the guest chooses one.
        let device = VirtioPci::new(spec.id(), spec.slot(), 0, device);
        if let Some(outside) = &self.outside {
            device.connect(Arc::clone(&outside.ram), Arc::clone(&outside.sink));
        }
        match phase {
            Phase::Paused => device.worker().pause(),
            _ => device.worker().resume(),
        }
        let device = Arc::new(Mutex::new(device));
        if !self.hotplug.plug(spec.slot(), Arc::clone(&device) as _) {
            return Err(taken());
        }
        if ports.balloon.is_some() {
            self.connections.balloon = ports.balloon;
        }
        tracing::info!(device = spec.id(), slot = spec.slot(), "plugged");
        self.devices.push(device);
        Ok(())
    }

    fn request_unplug(&self, id: &str) -> Result<(), MachineError> {
        let slot = self.devices.iter().find_map(|device| {
            let device = lock(device);
            (device.id() == id).then(|| device.slot())
        });
        let slot = slot.ok_or_else(|| MachineError::NoDevice { id: id.to_owned() })?;
        self.hotplug.request_unplug(slot);
        Ok(())
    }

    /// Where the memory is of a device that is taken out.
    fn memory_in(&self, event: SlotEvent) -> Option<u64> {
        let SlotEvent::Ejected { slot } = event else {
            return None;
        };
        let mut devices = self.devices.iter().map(|device| lock(device));
        let device = devices.find(|device| device.slot() == slot)?;
        Some(device.worker().memory()?.guest_address)
    }

    /// What there is of a device that is memory.
    pub(super) fn with_memory<T>(
        &self,
        id: &str,
        act: impl FnOnce(&Worker) -> T,
    ) -> Result<T, MachineError> {
        let mut devices = self.devices.iter().map(|device| lock(device));
        let device = devices.find(|device| device.id() == id);
        let device = device.ok_or_else(|| MachineError::NoDevice { id: id.to_owned() })?;
        Ok(act(device.worker()))
    }

    /// What a guest did to a device; lets go of one that it has taken out.
    fn take_event(&mut self, event: SlotEvent) -> Option<DeviceNews> {
        let (SlotEvent::Ejected { slot } | SlotEvent::Refused { slot, .. }) = event;
        let at = (self.devices.iter()).position(|device| lock(device).slot() == slot)?;
        let id = lock(self.devices.get(at)?).id().to_owned();
        match event {
            SlotEvent::Ejected { .. } => {
                let device = self.devices.remove(at);
                lock(&device).worker().settle();
                if lock(&device).worker().device_type().kind == "virtio-balloon" {
                    self.connections.balloon = None;
                }
                // The last that holds it: its thread ends and its files are closed here.
                drop(device);
                tracing::info!(device = id, slot, "unplugged");
                Some(DeviceNews::Gone { id })
            }
            SlotEvent::Refused { status, .. } => {
                tracing::info!(device = id, slot, status, "the guest does not let go of it");
                Some(DeviceNews::Kept { id, status })
            }
        }
    }

    fn functions(&self) -> Vec<Function> {
        let taken = self.bus.taken();
        let slots = HOST_BRIDGE_SLOT..=LAST_SLOT;
        let slots = slots.filter(|slot| taken >> slot & 1 != 0);
        let functions = slots.map(|slot| {
            let mut header = vec![0; HEADER_BYTES];
            let at = ConfigAddress {
                bus: 0,
                slot,
                function: 0,
                offset: 0,
            };
            self.bus.read_config(at, &mut header);
            let mut devices = self.devices.iter().map(|device| lock(device));
            let id = devices.find(|device| device.slot() == slot);
            let id = id.map(|device| device.id().to_owned());
            Function {
                memory_bytes: if id.is_some() { BAR_BYTES } else { 0 },
                id,
                slot,
                header,
                is_going: self.hotplug.is_requested(slot),
            }
        });
        functions.collect()
    }
}
