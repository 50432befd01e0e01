#![forbid(unsafe_code)]
//! The common registers of a modern device on PCI (virtio 1.2, 4.1.4.3), and what setting one up means.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

use crate::device::pci::msix::Msix;
use crate::device::virtio::device::Interrupt;
use crate::device::virtio::queue::{Ring, VirtQueue};
use crate::device::virtio::worker::Worker;

/// Length of the registers.
pub const COMMON_BYTES: usize = 56;
/// The vector that stands for none.
pub const NO_VECTOR: u16 = 0xffff;
/// Interrupt status: a queue has answers.
const STATUS_QUEUE: u8 = 1;
/// Interrupt status: the configuration changed.
const STATUS_CONFIG: u8 = 2;

const DRIVER_OK: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER_OK);
const FEATURES_OK: u8 = status_bit(VIRTIO_CONFIG_S_FEATURES_OK);
const NEEDS_RESET: u8 = status_bit(VIRTIO_CONFIG_S_NEEDS_RESET);
const FAILED: u8 = status_bit(VIRTIO_CONFIG_S_FAILED);

const fn status_bit(bit: u32) -> u8 {
    assert!(bit <= 0x80, "a bit of one byte");
    bit.to_le_bytes()[0]
}

/// Interrupts of a device: which vector is for what.
#[derive(Debug)]
pub struct Interrupts {
    /// Table and pending bits.
    pub msix: Mutex<Msix>,
    /// Interrupt status register.
    pub status: AtomicU8,
    /// Vector of the configuration.
    pub config: AtomicU16,
    /// Vector of each queue.
    pub queues: Vec<AtomicU16>,
}

impl Interrupts {
    /// Interrupts of a device with this many queues: one vector for each and one for the configuration.
    pub fn new(queues: usize) -> Self {
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        Self {
            msix: Mutex::new(Msix::new(vectors)),
            status: AtomicU8::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// Does something with the table.
    pub fn with_msix<T>(&self, act: impl FnOnce(&mut Msix) -> T) -> T {
        act(&mut self.msix.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The vector to set: none where the table does not have it.
    fn known(&self, vector: u16) -> u16 {
        let has = self.with_msix(|msix| msix.has(vector));
        if has { vector } else { NO_VECTOR }
    }

    fn raise(&self, vector: u16, status: u8) {
        self.status.fetch_or(status, Ordering::SeqCst);
        if vector != NO_VECTOR {
            self.with_msix(|msix| msix.raise(vector));
        }
    }

    fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, queue: usize) {
        if let Some(vector) = self.queues.get(queue) {
            self.raise(vector.load(Ordering::SeqCst), STATUS_QUEUE);
        }
    }

    fn config(&self) {
        self.raise(self.config.load(Ordering::SeqCst), STATUS_CONFIG);
    }
}

/// The registers that are not a queue's or an interrupt's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommonRegisters {
    /// Which half of the device's features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is shown.
    pub driver_feature_select: u32,
    /// Features that the driver takes.
    pub driver_features: u64,
    /// Status.
    pub status: u8,
    /// Which queue is shown.
    pub queue_select: u16,
}

/// A device as its common registers show it.
#[derive(Debug)]
pub struct Common<'a> {
    /// The registers.
    pub registers: &'a mut CommonRegisters,
    /// The device.
    pub worker: &'a Worker,
    /// Its interrupts.
    pub interrupts: &'a Arc<Interrupts>,
}

impl Common<'_> {
    /// Fills `data` from the registers from `offset` on.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let image = self.image();
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// All registers.
    fn image(&self) -> [u8; COMMON_BYTES] {
        let registers = &*self.registers;
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = image.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        let offered = half(self.offered(), registers.device_feature_select);
        let taken = half(registers.driver_features, registers.driver_feature_select);
        let broken = if self.worker.is_broken() {
            NEEDS_RESET
        } else {
            0
        };
        let selected = usize::from(registers.queue_select);
        let vector = self.interrupts.queues.get(selected);
        let vector = vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst));
        let queues = u16::try_from(self.interrupts.queues.len()).unwrap_or(u16::MAX);
        put(0, &registers.device_feature_select.to_le_bytes());
        put(4, &offered.to_le_bytes());
        put(8, &registers.driver_feature_select.to_le_bytes());
        put(12, &taken.to_le_bytes());
        put(
            16,
            &self.interrupts.config.load(Ordering::SeqCst).to_le_bytes(),
        );
        put(18, &queues.to_le_bytes());
        let generation = self.worker.with_core(|core| core.device.generation());
        put(20, &[registers.status | broken, generation]);
        put(22, &registers.queue_select.to_le_bytes());
        self.worker.with_core(|core| {
            let Some(queue) = core.queues.get(selected) else {
                return;
            };
            put(24, &queue.size().to_le_bytes());
            put(26, &vector.to_le_bytes());
            put(28, &u16::from(queue.is_ready()).to_le_bytes());
            put(30, &registers.queue_select.to_le_bytes());
            put(32, &queue.ring(Ring::Descriptors).to_le_bytes());
            put(40, &queue.ring(Ring::Driver).to_le_bytes());
            put(48, &queue.ring(Ring::Device).to_le_bytes());
        });
        image
    }

    fn offered(&self) -> u64 {
        self.worker.with_core(|core| core.device.offered())
    }

    /// Takes `data` into the register at `offset`. An access that is not one whole register, or half
    /// of one of eight bytes, is none.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let value = data
            .iter()
            .rev()
            .fold(0, |value: u64, &byte| value << 8 | u64::from(byte));
        let [a, b, c, d, ..] = value.to_le_bytes();
        let (short, word) = (u16::from_le_bytes([a, b]), u32::from_le_bytes([a, b, c, d]));
        match (offset, data.len()) {
            (0, 4) => self.registers.device_feature_select = word,
            (8, 4) => self.registers.driver_feature_select = word,
            (12, 4) => self.take_features(word),
            (16, 2) => {
                let vector = self.interrupts.known(short);
                self.interrupts.config.store(vector, Ordering::SeqCst);
            }
            (20, 1) => self.set_status(a),
            (22, 2) => self.registers.queue_select = short,
            (24, 2) => self.with_new_queue(|queue| queue.set_size(short)),
            (26, 2) => {
                let selected = usize::from(self.registers.queue_select);
                if let Some(vector) = self.interrupts.queues.get(selected) {
                    vector.store(self.interrupts.known(short), Ordering::SeqCst);
                }
            }
            (28, 2) if short == 1 => self.with_new_queue(VirtQueue::set_ready),
            (32..56, 4 | 8) => self.set_ring(offset, data.len(), value),
            _ => (),
        }
    }

    fn take_features(&mut self, word: u32) {
        let registers = &mut self.registers;
        if registers.status & FEATURES_OK != 0 {
            return;
        }
        let word = u64::from(word);
        match registers.driver_feature_select {
            0 => registers.driver_features = registers.driver_features >> 32 << 32 | word,
            1 => {
                registers.driver_features = registers.driver_features & 0xffff_ffff | word << 32;
            }
            _ => (),
        }
    }

    /// The status only grows, until it is set to 0: a reset.
    fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.worker.reset();
            self.interrupts.reset();
            *self.registers = CommonRegisters::default();
            return;
        }
        let old = self.registers.status;
        let mut new = old | status & !NEEDS_RESET;
        let features = self.registers.driver_features;
        let is_modern = features >> VIRTIO_F_VERSION_1 & 1 != 0;
        if new & FEATURES_OK != 0
            && old & FEATURES_OK == 0
            && (features & !self.offered() != 0 || !is_modern)
        {
            // The guest reads that it was not taken.
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 || new & FAILED != 0 {
            new &= !DRIVER_OK | old;
        }
        self.registers.status = new;
        if new & DRIVER_OK != 0 && old & DRIVER_OK == 0 {
            self.worker.activate(features);
        }
    }

    /// Does something with the selected queue, as long as the guest has not said that it is complete.
    fn with_new_queue(&self, act: impl FnOnce(&mut VirtQueue)) {
        let selected = usize::from(self.registers.queue_select);
        let has_begun = self.registers.status & DRIVER_OK != 0;
        self.worker.with_core(|core| {
            let queue = core.queues.get_mut(selected);
            if let Some(queue) = queue.filter(|queue| !queue.is_ready() && !has_begun) {
                act(queue);
            }
        });
    }

    fn set_ring(&self, offset: usize, bytes: usize, value: u64) {
        let ring = match offset {
            32..40 => Ring::Descriptors,
            40..48 => Ring::Driver,
            _ => Ring::Device,
        };
        self.with_new_queue(|queue| {
            let old = queue.ring(ring);
            let address = match (offset % 8, bytes) {
                (0, 8) => value,
                (0, 4) => old >> 32 << 32 | value,
                (4, 4) => old & 0xffff_ffff | value << 32,
                _ => return,
            };
            queue.set_ring(ring, address);
        });
    }
}

/// The low or the high half of features; no other has any.
fn half(features: u64, select: u32) -> u32 {
    let bytes = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    let [a, b, c, d, ..] = bytes.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Whether a status says that the driver is complete.
pub fn is_driver_ok(status: u8) -> bool {
    status & DRIVER_OK != 0
}
