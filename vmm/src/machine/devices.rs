#![forbid(unsafe_code)]
//! The devices of a machine outside the kernel: made, connected, saved and restored together.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::channel::Sender;

use crate::arch::x86_64::ports::{
    COM1_GSI, COM1_PORTS, I8042_COMMAND_PORTS, I8042_DATA_PORTS, MODULE_HOTPLUG_GSI,
    MODULE_HOTPLUG_PORTS, POWER_BUTTON_GSI, POWER_PORTS, SPEAKER_PORTS, TIMER_PORTS,
};
use crate::arch::x86_64::smbios;
use crate::device::bus::{BusError, MmioBus, PioBus};
use crate::device::irq::IrqLine;
use crate::device::legacy::console::{Console, SerialTarget};
use crate::device::legacy::i8042::I8042;
use crate::device::legacy::power::Power;
use crate::device::legacy::serial::Serial;
use crate::device::legacy::state::{SERIAL_KIND, SERIAL_VERSION, SerialState};
use crate::device::modules::registers::{ModulePorts, ModuleSlots, SlotModule};
use crate::device::modules::state::{MODULES_KIND, MODULES_VERSION, ModulesState};
use crate::device::virtio::console::backend::ConsoleConnection;
use crate::device::virtio::net::backend::NetConnection;
use crate::device::virtio::vsock::backend::VsockConnection;
use crate::kvm::KvmError;
use crate::kvm::timer::Timer;
use crate::kvm::vm::Vm;
use crate::memory::guest::GuestRam;
use crate::spec::{DeviceSpec, Dimm, MachineSpec, Uuid};

use super::connections::{Attachment, Connections};
use super::error::MachineError;
use super::generation::{self, GENERATION_KIND, GENERATION_VERSION, GenerationId};
use super::hotplug::DeviceNews;
use super::pci::{HotplugLine, PciDevices};
use super::records::{decode, encode};
use super::state::DeviceRecord;
use super::timer::{TimerPorts, TimerSlot};

/// All devices outside the kernel.
///
/// Keyboard controller and power registers hold no state; COM1 does.
pub(super) struct Devices {
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    com1: Arc<Mutex<Serial>>,
    com1_irq: IrqLine,
    power_button: IrqLine,
    console: Console,
    timer: TimerSlot,
    /// Where the machine has a PCI bus.
    pub(super) pci: Option<PciDevices>,
    /// Where the machine has a generation ID.
    generation: Option<GenerationId>,
    /// What the guest is to be called from now on, where it was told that before.
    uuid: Option<Uuid>,
    /// Devices that are plugged before the first instruction.
    pub(super) plugged: Vec<(DeviceSpec, Attachment)>,
    /// Where the machine has slots for memory modules.
    pub(super) modules: Option<Arc<ModuleSlots>>,
    /// The machine's memory, when it is connected.
    pub(super) ram: Option<Arc<GuestRam>>,
    /// Who hears what becomes of devices.
    pub(super) news: Option<Sender<DeviceNews>>,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Devices")
            .field("pio", &self.pio)
            .field("mmio", &self.mmio)
            .finish_non_exhaustive()
    }
}

impl Devices {
    /// Devices as after power-on; opens where COM1 goes.
    pub(super) fn new(spec: &MachineSpec, to: Connections) -> Result<Self, MachineError> {
        let Connections {
            serial,
            disks,
            vsock,
            nets,
            consoles,
            plugged,
            generation_id,
            marks,
        } = to;
        let pci = PciDevices::new(spec, disks, vsock, nets, consoles)?;
        let generation = generation_of(spec, generation_id)?;
        let modules = slots_of(spec, &ModulesState::default());
        let devices = Self::build(serial, pci, (generation, modules), |irq, console| {
            Ok(Serial::new(irq, console.output()))
        })?;
        devices.bind_document(marks.document);
        Ok(Self { plugged, ..devices })
    }

    /// Devices that go on where `records` were saved. Interrupts that they hold reach the guest
    /// when the devices are connected.
    pub(super) fn from_records(
        spec: &MachineSpec,
        to: Connections,
        records: &[DeviceRecord],
    ) -> Result<Self, MachineError> {
        let Connections {
            serial,
            disks,
            vsock,
            nets,
            consoles,
            plugged,
            generation_id,
            marks,
        } = to;
        let mut pci = PciDevices::new(spec, disks, vsock, nets, consoles)?;
        let is_known = |record: &&DeviceRecord| {
            record.kind == SERIAL_KIND
                || (record.kind == MODULES_KIND && spec.slots() > 0)
                || (record.kind == GENERATION_KIND && spec.has_generation_id())
                || pci.as_ref().is_some_and(|pci| pci.has(record))
        };
        if let Some(unknown) = records.iter().find(|record| !is_known(record)) {
            return Err(MachineError::UnknownDevice {
                kind: unknown.kind.clone(),
            });
        }
        let state: SerialState = decode(records, SERIAL_KIND, SERIAL_VERSION)?;
        if spec.has_generation_id() {
            // That of the machine that was saved, which this one is not.
            let _: [u8; 16] = decode(records, GENERATION_KIND, GENERATION_VERSION)?;
        }
        let generation = generation_of(spec, generation_id)?;
        if let Some(pci) = &mut pci {
            pci.restore(records)?;
        }
        let saved = match records.iter().any(|record| record.kind == MODULES_KIND) {
            true => decode(records, MODULES_KIND, MODULES_VERSION)?,
            // Saved before modules could come and go.
            false => ModulesState::default(),
        };
        let modules = slots_of(spec, &saved);
        let devices = Self::build(serial, pci, (generation, modules), |irq, console| {
            Serial::restore(irq, console.output(), &state)
                .map_err(|source| device_error(SERIAL_KIND, source))
        })?;
        devices.bind_document(marks.document);
        Ok(Self {
            plugged,
            uuid: marks.uuid.filter(|_| spec.identity().tells_guest()),
            ..devices
        })
    }

    fn build(
        target: SerialTarget,
        pci: Option<PciDevices>,
        (generation, modules): (Option<GenerationId>, Option<Arc<ModuleSlots>>),
        make_serial: impl FnOnce(IrqLine, &Console) -> Result<Serial, MachineError>,
    ) -> Result<Self, MachineError> {
        let console = Console::open(target).map_err(|e| device_error(SERIAL_KIND, e))?;
        let com1_irq = IrqLine::new().map_err(|e| device_error(SERIAL_KIND, e))?;
        let com1 = Arc::new(Mutex::new(make_serial(com1_irq.clone(), &console)?));
        let timer = TimerSlot::default();
        let mut pio = ports(&com1, &timer).map_err(|e| device_error("ports", e))?;
        if let Some(slots) = &modules {
            let ports = Arc::new(Mutex::new(ModulePorts::new(Arc::clone(slots))));
            pio.insert(MODULE_HOTPLUG_PORTS, ports)
                .map_err(|e| device_error("memory slots", e))?;
        }
        let mut mmio = MmioBus::new();
        if let Some(pci) = &pci {
            pci.insert(&mut pio, &mut mmio)
                .map_err(|e| device_error("pci", e))?;
        }
        Ok(Self {
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            com1,
            com1_irq,
            power_button: IrqLine::new().map_err(|e| device_error("power button", e))?,
            console,
            timer,
            pci,
            generation,
            uuid: None,
            plugged: Vec::new(),
            modules,
            ram: None,
            news: None,
        })
    }

    /// Says which timer is behind its ports. Once, before any vCPU runs.
    pub(super) fn connect_timer(&self, timer: &Arc<Timer>) {
        // There is one VM.
        let _ = self.timer.set(Arc::clone(timer));
    }

    /// Connects the devices to the VM's interrupts and its memory.
    pub(super) fn connect(&mut self, vm: &Vm, ram: &Arc<GuestRam>) -> Result<(), KvmError> {
        if let Some(pci) = &mut self.pci {
            pci.connect(vm, ram);
        }
        self.ram = Some(Arc::clone(ram));
        if let Some(slots) = &self.modules {
            slots.connect(Box::new(HotplugLine(vm.level_line(MODULE_HOTPLUG_GSI))));
        }
        vm.connect_irq(self.com1_irq.event(), COM1_GSI)?;
        vm.connect_irq(self.power_button.event(), POWER_BUTTON_GSI)
    }

    /// Gives the machine its own generation ID, where it has any.
    pub(super) fn write_generation(&self, ram: &GuestRam) -> Result<(), MachineError> {
        self.generation.map_or(Ok(()), |id| id.write(ram))
    }

    /// Gives a machine that goes on its own UUID and generation ID, where its guest knows others. Of the latter
    /// the guest is told.
    pub(super) fn renew_identity(&self, vm: &Vm, ram: &GuestRam) -> Result<(), MachineError> {
        if let Some(uuid) = self.uuid {
            write_uuid(ram, uuid)?;
        }
        if self.generation.is_none() {
            return Ok(());
        }
        self.write_generation(ram)?;
        generation::notify(vm)
    }

    /// Waits until every interrupt that a device has raised has reached the VM's chips.
    pub(super) fn flush_irqs(&self, vm: &Vm) -> Result<(), KvmError> {
        vm.flush_irq(self.com1_irq.event(), COM1_GSI)?;
        vm.flush_irq(self.power_button.event(), POWER_BUTTON_GSI)
    }

    /// Presses the power button: whether the guest cares is up to it.
    pub(super) fn press_power_button(&self) {
        if let Err(error) = self.power_button.trigger() {
            tracing::warn!("the power button cannot be pressed: {error}");
        }
    }

    /// Says where COM1 goes, for a machine that was made before that was known.
    pub(super) fn bind_serial(&mut self, target: SerialTarget) -> Result<(), MachineError> {
        self.console
            .bind(target)
            .map_err(|e| device_error(SERIAL_KIND, e))
    }

    /// Says what the vsock is connected to, for a machine that was made before that was known.
    pub(super) fn bind_vsock(&self, connection: VsockConnection) {
        if let Some(pci) = &self.pci {
            pci.bind_vsock(connection);
        }
    }

    /// Says what the document has, where that is another one.
    pub(super) fn bind_document(&self, content: Option<Vec<u8>>) {
        if let (Some(pci), Some(content)) = (&self.pci, content) {
            pci.bind_document(content);
        }
    }

    /// Says where cables of network devices end, for a machine that was made before that was known.
    pub(super) fn bind_nets(&self, nets: Vec<(String, NetConnection)>) {
        if let Some(pci) = &self.pci {
            pci.bind_nets(nets);
        }
    }

    /// Says what ports of consoles lead to, for a machine that was made before that was known.
    pub(super) fn bind_consoles(&self, consoles: Vec<(String, ConsoleConnection)>) {
        if let Some(pci) = &self.pci {
            pci.bind_consoles(consoles);
        }
    }

    /// Lets in what input waits outside. `on_quit` is called when somebody at a terminal asks to quit.
    pub(super) fn attach(&mut self, on_quit: Box<dyn Fn() + Send>) -> Result<(), MachineError> {
        self.console
            .attach(Arc::clone(&self.com1), on_quit)
            .map_err(|e| device_error(SERIAL_KIND, e))
    }

    /// Lets input in from now on.
    pub(super) fn feed(&mut self) -> Result<(), MachineError> {
        self.console
            .feed()
            .map_err(|e| device_error(SERIAL_KIND, e))
    }

    /// Does all that the guest has asked for; from then on guest memory is left alone. No vCPU may run.
    pub(super) fn pause(&self) {
        if let Some(pci) = &self.pci {
            pci.pause();
        }
    }

    /// Lets devices work, for the first time or after [`Self::pause`]. Before a vCPU runs.
    pub(super) fn resume(&self) {
        if let Some(pci) = &self.pci {
            pci.resume();
        }
    }

    /// State of all devices, which are paused.
    pub(super) fn save(&self) -> Result<Vec<DeviceRecord>, MachineError> {
        let serial = lock(&self.com1).save();
        let mut records = vec![encode(SERIAL_KIND, SERIAL_VERSION, &serial)?];
        if let Some(pci) = &self.pci {
            records.extend(pci.save()?);
        }
        if let Some(slots) = &self.modules {
            records.push(encode(MODULES_KIND, MODULES_VERSION, &slots.save())?);
        }
        if let Some(id) = &self.generation {
            records.push(encode(GENERATION_KIND, GENERATION_VERSION, &id.0)?);
        }
        Ok(records)
    }

    /// What is at ports.
    pub(super) fn pio(&self) -> Arc<PioBus> {
        Arc::clone(&self.pio)
    }

    /// What is at memory addresses.
    pub(super) fn mmio(&self) -> Arc<MmioBus> {
        Arc::clone(&self.mmio)
    }

    /// The terminal to open, when COM1 goes to a new pseudo-terminal.
    pub(super) fn pty_path(&self) -> Option<&Path> {
        self.console.pty_path()
    }
}

/// Writes who a machine is into tables that its guest has.
pub(super) fn write_uuid(ram: &GuestRam, uuid: Uuid) -> Result<(), MachineError> {
    smbios::write_uuid(ram, uuid).map_err(|e| device_error("smbios", e))
}

/// The slots of a machine that has any, with the modules that it is made with. Memory that the guest can only
/// read is none that it could use.
fn slots_of(spec: &MachineSpec, saved: &ModulesState) -> Option<Arc<ModuleSlots>> {
    let is_rom = |dimm: &&Dimm| spec.backends()[dimm.backend()].is_rom();
    let dimms = spec.dimms().iter().filter(|dimm| !is_rom(dimm));
    let modules = dimms.map(|dimm| {
        let module = SlotModule {
            guest_address: dimm.guest_address(),
            bytes: dimm.bytes(),
            node: dimm.node(),
        };
        (dimm.slot(), module)
    });
    (spec.slots() > 0).then(|| Arc::new(ModuleSlots::new(modules.collect(), saved)))
}

/// The generation ID of a machine that has one: `given`, or a new one.
fn generation_of(
    spec: &MachineSpec,
    given: Option<GenerationId>,
) -> Result<Option<GenerationId>, MachineError> {
    if !spec.has_generation_id() {
        return Ok(None);
    }
    let id = given.map_or_else(GenerationId::random, Ok);
    id.map(Some).map_err(|e| device_error(GENERATION_KIND, e))
}

fn ports(com1: &Arc<Mutex<Serial>>, timer: &TimerSlot) -> Result<PioBus, BusError> {
    let mut pio = PioBus::new();
    let com1: Arc<Mutex<Serial>> = Arc::clone(com1);
    pio.insert(COM1_PORTS, com1)?;
    pio.insert(I8042_DATA_PORTS, Arc::new(Mutex::new(I8042::data())))?;
    pio.insert(I8042_COMMAND_PORTS, Arc::new(Mutex::new(I8042::command())))?;
    pio.insert(
        TIMER_PORTS,
        Arc::new(Mutex::new(TimerPorts::registers(timer))),
    )?;
    pio.insert(
        SPEAKER_PORTS,
        Arc::new(Mutex::new(TimerPorts::speaker(timer))),
    )?;
    pio.insert(POWER_PORTS, Arc::new(Mutex::new(Power::new())))?;
    Ok(pio)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device_error(
    kind: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> MachineError {
    MachineError::Device {
        kind,
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendSpec, CpuCount};

    fn record(kind: &str, version: u32, body: Vec<u8>) -> DeviceRecord {
        DeviceRecord {
            kind: kind.to_owned(),
            version,
            body,
        }
    }

    fn refused(records: &[DeviceRecord]) -> String {
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        Devices::from_records(&spec, SerialTarget::Null.into(), records)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn records_that_are_not_ours_are_refused_by_name() {
        let good = encode(SERIAL_KIND, SERIAL_VERSION, &SerialState::default()).unwrap();
        assert!(refused(&[]).contains("lacks the device \"serial\""));
        assert!(refused(&[record("rtc", 1, vec![])]).contains("device \"rtc\" that this machine"));
        let other = record(SERIAL_KIND, SERIAL_VERSION + 1, good.body.clone());
        assert!(refused(&[other]).contains("has version 2, this build reads 1"));
        assert!(refused(&[good.clone(), good.clone()]).contains("there twice"));
        let mut long = good.clone();
        long.body.push(0);
        assert!(refused(&[long]).contains("1 bytes too many"));
        for length in 0..good.body.len() {
            let mut short = good.clone();
            short.body.truncate(length);
            assert!(refused(&[short]).contains("damaged"), "{length}");
        }
    }
}
