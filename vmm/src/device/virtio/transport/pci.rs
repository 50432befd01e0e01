#![forbid(unsafe_code)]
//! A modern virtio device as a PCI function (virtio 1.2, 4.1): one memory region that holds all its
//! register blocks, found through capabilities.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::common::{COMMON_BYTES, Common, CommonRegisters, Interrupts, is_driver_ok};
use crate::device::bus::DeviceEvent;
use crate::device::pci::bus::PciFunction;
use crate::device::pci::config::{Bar, ConfigSpace, Identity};
use crate::device::pci::msix::{ENTRY_BYTES, MessageSink};
use crate::device::pci::state::FunctionState;
use crate::device::virtio::device::{VirtioDevice, VirtioStateError};
use crate::device::virtio::state::VirtioState;
use crate::device::virtio::worker::Worker;
use crate::memory::guest::GuestRam;

/// Length of a function's memory.
pub const BAR_BYTES: u64 = 0x8000;
/// Vendor of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device numbers of modern devices begin here.
const FIRST_DEVICE: u16 = 0x1040;
/// Subsystem device: any that is not a legacy device's.
const SUBSYSTEM: u16 = 0x1100;
/// Revision of modern devices.
const REVISION: u8 = 1;
/// Id of a capability that is the vendor's own.
const VENDOR_CAPABILITY: u8 = 0x09;

/// A block of registers: its number in capabilities, where it begins, how long it is.
#[derive(Debug, Clone, Copy)]
struct Block {
    kind: u8,
    offset: u64,
    bytes: u64,
}

const COMMON: Block = Block {
    kind: 1,
    offset: 0,
    bytes: COMMON_BYTES as u64,
};
const NOTIFY: Block = Block {
    kind: 2,
    offset: 0x3000,
    bytes: 0x1000,
};
const STATUS: Block = Block {
    kind: 3,
    offset: 0x1000,
    bytes: 1,
};
const DEVICE: Block = Block {
    kind: 4,
    offset: 0x2000,
    bytes: 0x1000,
};
/// Access to the others through the registers of the function.
const ACCESS: u8 = 5;
/// Where the table of messages begins.
const TABLE: u32 = 0x4000;
/// Where the pending bits begin.
const PENDING: u32 = 0x6000;
/// Notifications of queue `n` are at `n` times this.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Length of a capability of a block, without the two bytes of its head.
const BLOCK_BODY_BYTES: usize = 14;

/// A device on the bus.
pub struct VirtioPci {
    id: String,
    slot: u8,
    config: ConfigSpace,
    registers: CommonRegisters,
    interrupts: Arc<Interrupts>,
    worker: Worker,
    /// Offset of the message control.
    message_control: usize,
    /// Offset of the capability that gives access to the blocks.
    access: usize,
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci")
            .field("id", &self.id)
            .field("slot", &self.slot)
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// A device as after power-on, with its memory at `address`.
    pub fn new(id: &str, slot: u8, address: u64, device: Box<dyn VirtioDevice>) -> Self {
        let kind = device.device_type();
        let identity = Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE.saturating_add(kind.number),
            class: kind.pci_class,
            revision: REVISION,
            subsystem: (VENDOR, SUBSYSTEM),
        };
        let bar = Bar {
            address,
            bytes: BAR_BYTES,
        };
        let mut config = ConfigSpace::new(identity, Some(bar));
        let interrupts = Interrupts::new(kind.queues.len());
        let message_control =
            interrupts.with_msix(|msix| msix.add_capability(&mut config, TABLE, PENDING));
        for block in [COMMON, STATUS, DEVICE] {
            config.add_capability(VENDOR_CAPABILITY, &body(block, 0), &[]);
        }
        let mut notify = body(NOTIFY, 4).to_vec();
        notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
        // Region, offset and length are the guest's, and the data behind them.
        let access = Block {
            kind: ACCESS,
            offset: 0,
            bytes: 0,
        };
        let mut access = body(access, 4).to_vec();
        access.extend([0; 4]);
        let mut writable = [0xff; BLOCK_BODY_BYTES + 4];
        // Length and kind of the capability, its id and padding.
        for fixed in [0, 1, 3, 4, 5] {
            writable[fixed] = 0;
        }
        let access = config.add_capability(VENDOR_CAPABILITY, &access, &writable);
        Self {
            id: id.to_owned(),
            slot,
            config,
            registers: CommonRegisters::default(),
            interrupts: Arc::new(interrupts),
            worker: Worker::new(id, device),
            // All of it fits, as a test shows.
            message_control: message_control.unwrap_or_default(),
            access: access.unwrap_or_default(),
        }
    }

    /// What the device is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its place on the bus.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The device with its queues.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Gives the device guest memory and whoever delivers its messages. Before the guest runs.
    pub fn connect(&self, ram: Arc<GuestRam>, sink: Arc<dyn MessageSink>) {
        self.worker.connect(ram, Arc::clone(&self.interrupts) as _);
        self.interrupts.with_msix(|msix| msix.connect(sink));
    }

    /// Everything that [`Self::restore`] needs. The worker must be paused.
    pub fn save(&self) -> VirtioState {
        let (mut queues, device) = self.worker.with_core(|core| {
            let queues: Vec<_> = core.queues.iter().map(|queue| queue.save()).collect();
            (queues, core.device.save())
        });
        for (queue, vector) in queues.iter_mut().zip(&self.interrupts.queues) {
            queue.vector = vector.load(Ordering::SeqCst);
        }
        VirtioState {
            id: self.id.clone(),
            function: FunctionState {
                slot: self.slot,
                config: self.config.save(),
                msix: self.interrupts.with_msix(|msix| msix.save()),
            },
            status: self.registers.status,
            device_feature_select: self.registers.device_feature_select,
            driver_feature_select: self.registers.driver_feature_select,
            driver_features: self.registers.driver_features,
            queue_select: self.registers.queue_select,
            interrupt_status: self.interrupts.status.load(Ordering::SeqCst),
            config_vector: self.interrupts.config.load(Ordering::SeqCst),
            is_broken: self.worker.is_broken(),
            queues,
            device,
        }
    }

    /// Goes on where `state` was saved. Before the guest runs.
    pub fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioStateError> {
        let wrong = VirtioStateError::new;
        if state.function.slot != self.slot {
            let (theirs, ours) = (state.function.slot, self.slot);
            return Err(wrong(format!(
                "it was in PCI slot {theirs}, the machine has it in {ours}"
            )));
        }
        if let Some(at) = self.config.first_difference(&state.function.config) {
            return Err(wrong(format!(
                "its PCI register {at:#x} is of another device"
            )));
        }
        let is_active = is_driver_ok(state.status);
        self.worker.with_core(|core| {
            let offered = core.device.offered();
            if is_active && state.driver_features & !offered != 0 {
                let missing = state.driver_features & !offered;
                return Err(wrong(format!(
                    "its guest uses features {missing:#x}, which the device does not have here"
                )));
            }
            if state.queues.len() != core.queues.len() {
                let (theirs, ours) = (state.queues.len(), core.queues.len());
                return Err(wrong(format!("it has {theirs} queues instead of {ours}")));
            }
            for (number, (queue, saved)) in core.queues.iter_mut().zip(&state.queues).enumerate() {
                if !queue.restore(saved) {
                    return Err(wrong(format!("queue {number} cannot be like that")));
                }
            }
            core.device.restore(&state.device)
        })?;
        self.config.restore(&state.function.config);
        let control = self.config.u16_at(self.message_control);
        let is_table = self
            .interrupts
            .with_msix(|msix| msix.restore(&state.function.msix, control));
        if !is_table {
            return Err(wrong(
                "its table of interrupt messages has another size".to_owned(),
            ));
        }
        self.registers = CommonRegisters {
            device_feature_select: state.device_feature_select,
            driver_feature_select: state.driver_feature_select,
            driver_features: state.driver_features,
            status: state.status,
            queue_select: state.queue_select,
        };
        let interrupts = &self.interrupts;
        interrupts
            .status
            .store(state.interrupt_status, Ordering::SeqCst);
        interrupts
            .config
            .store(state.config_vector, Ordering::SeqCst);
        for (vector, saved) in interrupts.queues.iter().zip(&state.queues) {
            vector.store(saved.vector, Ordering::SeqCst);
        }
        let features = is_active.then_some(state.driver_features);
        self.worker.restore_phase(features, state.is_broken)
    }

    fn common(&mut self) -> Common<'_> {
        Common {
            registers: &mut self.registers,
            worker: &self.worker,
            interrupts: &self.interrupts,
        }
    }

    /// The access that the registers describe: offset and length, where it is one of this memory.
    fn described_access(&self) -> Option<(u64, usize)> {
        let region = self.config.u32_at(self.access + 4).to_le_bytes()[0];
        let offset = u64::from(self.config.u32_at(self.access + 8));
        let bytes = self.config.u32_at(self.access + 12);
        let is_access = matches!(bytes, 1 | 2 | 4)
            && region == 0
            && offset.is_multiple_of(bytes.into())
            && offset + u64::from(bytes) <= BAR_BYTES;
        is_access.then_some((offset, usize::try_from(bytes).unwrap_or(4)))
    }

    /// Whether an access to the registers touches the data of the described access.
    fn is_data(&self, offset: usize, bytes: usize) -> bool {
        let data = self.access + 16;
        offset < data + 4 && data < offset + bytes
    }
}

/// A capability of a block of region 0, with `more` bytes behind it.
fn body(block: Block, more: u8) -> [u8; BLOCK_BODY_BYTES] {
    let low = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    let mut body = [0; BLOCK_BODY_BYTES];
    body[0] = 16 + more;
    body[1] = block.kind;
    body[6..10].copy_from_slice(&low(block.offset));
    body[10..14].copy_from_slice(&low(block.bytes));
    body
}

/// The offset inside a block of an access to the memory.
fn within(offset: u64, block: Block) -> Option<usize> {
    let inside = offset.checked_sub(block.offset)?;
    (inside < block.bytes)
        .then(|| usize::try_from(inside).ok())
        .flatten()
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if self.is_data(offset, data.len())
            && let Some((at, bytes)) = self.described_access()
        {
            let mut value = [0; 4];
            self.read_memory(at, &mut value[..bytes]);
            self.config.write(self.access + 16, &value);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        if self.is_data(offset, data.len())
            && let Some((at, bytes)) = self.described_access()
        {
            let value = self.config.u32_at(self.access + 16).to_le_bytes();
            // None of its registers asks anything of the machine.
            let DeviceEvent::None = self.write_memory(at, &value[..bytes]) else {
                return;
            };
        }
        let control = self.config.u16_at(self.message_control);
        self.interrupts.with_msix(|msix| msix.set_control(control));
    }

    fn memory_offset(&self, address: u64) -> Option<u64> {
        self.config.bar_offset(address)
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = within(offset, COMMON) {
            self.common().read(at, data);
        } else if within(offset, STATUS).is_some() {
            // Reading takes it back.
            let status = self.interrupts.status.swap(0, Ordering::SeqCst);
            if let Some(first) = data.first_mut() {
                *first = status;
            }
        } else if let Some(at) = within(offset, DEVICE) {
            self.worker.with_core(|core| {
                let registers = core.device.config();
                for (at, byte) in (at..).zip(data) {
                    *byte = registers.get(at).copied().unwrap_or(0);
                }
            });
        } else if let Some(at) = within(offset, self.table()) {
            self.interrupts
                .with_msix(|msix| msix.read_table(at as u64, data));
        } else if let Some(at) = offset.checked_sub(PENDING.into()) {
            self.interrupts
                .with_msix(|msix| msix.read_pending(at, data));
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) -> DeviceEvent {
        if let Some(at) = within(offset, COMMON) {
            self.common().write(at, data);
        } else if let Some(at) = within(offset, NOTIFY) {
            let queue = at / usize::try_from(NOTIFY_MULTIPLIER).unwrap_or(1);
            self.worker.kick(u16::try_from(queue).unwrap_or(u16::MAX));
        } else if let Some(at) = within(offset, DEVICE) {
            self.worker
                .with_core(|core| core.device.write_config(at, data));
        } else if let Some(at) = within(offset, self.table()) {
            self.interrupts
                .with_msix(|msix| msix.write_table(at as u64, data));
        }
        DeviceEvent::None
    }

    fn detach(&mut self) {
        self.worker.detach();
        self.interrupts.with_msix(|msix| msix.disconnect());
    }
}

impl VirtioPci {
    fn table(&self) -> Block {
        Block {
            kind: 0,
            offset: TABLE.into(),
            bytes: (self.interrupts.queues.len() as u64 + 1) * ENTRY_BYTES,
        }
    }
}
