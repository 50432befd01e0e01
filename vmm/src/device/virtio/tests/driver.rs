#![forbid(unsafe_code)]
//! A driver: sets a device up and puts requests into its queue, as a guest does.

use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::device::pci::bus::PciFunction;
use crate::device::pci::msix::{Message, MessageSink};
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::memory::guest::{GuestRam, RamBacking};
use crate::memory::layout::RamLayout;

pub(super) const RAM_BYTES: u64 = 1 << 20;
pub(super) const ADDRESS: u64 = 0xc000_8000;
pub(super) const QUEUE_SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const DRIVER_RING: u64 = 0x2000;
const DEVICE_RING: u64 = 0x3000;
/// Where requests have their bytes.
pub(super) const BUFFERS: u64 = 0x10000;
/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const EVENT_INDEX: u64 = 1 << 29;

pub(super) fn ram() -> Arc<GuestRam> {
    let backing = RamBacking::anonymous(RAM_BYTES).unwrap();
    let layout = RamLayout::new(&[RAM_BYTES]).unwrap();
    Arc::new(GuestRam::new(layout, vec![backing]).unwrap())
}

/// Where interrupts come out.
#[derive(Debug)]
pub(super) struct Wire(Mutex<Sender<Message>>);

impl MessageSink for Wire {
    fn send(&self, message: Message) -> io::Result<()> {
        // A test that is over listens no more.
        let _ = self.0.lock().unwrap().send(message);
        Ok(())
    }
}

/// A piece of a request: address, length, whether the device writes it.
pub(super) type Piece = (u64, u32, bool);

pub(super) struct Driver {
    pub(super) device: VirtioPci,
    pub(super) ram: Arc<GuestRam>,
    interrupts: Receiver<Message>,
    next_free: u16,
    available: u16,
    used: u16,
}

impl Driver {
    /// A device that nobody has set up.
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::of(VirtioPci::new("dev0", 1, ADDRESS, device), ram())
    }

    pub(super) fn of(device: VirtioPci, ram: Arc<GuestRam>) -> Self {
        let (sender, interrupts) = channel();
        device.connect(Arc::clone(&ram), Arc::new(Wire(Mutex::new(sender))));
        Self {
            device,
            ram,
            interrupts,
            next_free: 0,
            available: 0,
            used: 0,
        }
    }

    pub(super) fn read(&mut self, offset: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.device.read_memory(offset, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    pub(super) fn write(&mut self, offset: u64, bytes: usize, value: u64) {
        let _ = self
            .device
            .write_memory(offset, &value.to_le_bytes()[..bytes]);
    }

    pub(super) fn offered(&mut self) -> u64 {
        self.write(0, 4, 0);
        let low = self.read(4, 4);
        self.write(0, 4, 1);
        self.read(4, 4) << 32 | low
    }

    /// Goes the whole way of virtio 1.2, 3.1.1; the status at its end.
    pub(super) fn set_up(&mut self, features: u64) -> u64 {
        self.device.write_config(4, &[6, 0]);
        // Interrupts are on.
        let control = self.message_control();
        self.device.write_config(control, &0x8000_u16.to_le_bytes());
        for vector in 0..2 {
            for (word, value) in [(0, 0xfee0_0000), (8, 0x40 + vector), (12, 0)] {
                self.write(0x4000 + vector * 16 + word, 4, value);
            }
        }
        for status in [0, 1, 3] {
            self.write(20, 1, status);
        }
        for half in 0..2 {
            self.write(8, 4, half);
            self.write(12, 4, features >> (32 * half));
        }
        self.write(20, 1, 0xb);
        self.write(22, 2, 0);
        self.write(24, 2, QUEUE_SIZE.into());
        self.write(16, 2, 0);
        self.write(26, 2, 1);
        for (offset, address) in [(32, DESCRIPTORS), (40, DRIVER_RING), (48, DEVICE_RING)] {
            self.write(offset, 4, address);
            self.write(offset + 4, 4, 0);
        }
        self.write(28, 2, 1);
        self.write(20, 1, 0xf);
        (self.available, self.used, self.next_free) = (0, 0, 0);
        self.read(20, 1)
    }

    pub(super) fn message_control(&mut self) -> usize {
        let mut at = [0];
        self.device.read_config(0x34, &mut at);
        usize::from(at[0]) + 2
    }

    /// Makes a request available; returns the number of its first descriptor.
    pub(super) fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_free;
        for (number, &(address, bytes, is_writable)) in pieces.iter().enumerate() {
            let has_next = number + 1 < pieces.len();
            let at = DESCRIPTORS + u64::from(self.next_free) * 16;
            self.next_free = (self.next_free + 1) % QUEUE_SIZE;
            let flags = u16::from(has_next) | u16::from(is_writable) << 1;
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(bytes.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(self.next_free.to_le_bytes());
            self.ram.write(at, &descriptor).unwrap();
        }
        self.make_available(head);
        head
    }

    pub(super) fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available % QUEUE_SIZE);
        self.ram
            .write(DRIVER_RING + 4 + slot * 2, &head.to_le_bytes())
            .unwrap();
        self.available = self.available.wrapping_add(1);
        self.ram
            .write(DRIVER_RING + 2, &self.available.to_le_bytes())
            .unwrap();
    }

    pub(super) fn kick(&mut self) {
        self.listen();
        self.write(0x3000, 2, 0);
    }

    /// Where notifications go by index: of the next answer.
    pub(super) fn listen(&mut self) {
        let used_event = DRIVER_RING + 4 + u64::from(QUEUE_SIZE) * 2;
        self.ram
            .write(used_event, &self.used.to_le_bytes())
            .unwrap();
    }

    /// Waits for an interrupt; its data says whose.
    pub(super) fn wait(&self) -> u32 {
        self.interrupts.recv_timeout(LIMIT).unwrap().data
    }

    /// An interrupt that has come; its data says whose.
    pub(super) fn try_wait(&self) -> Result<u32, TryRecvError> {
        self.interrupts.try_recv().map(|message| message.data)
    }

    /// Whether there is no interrupt for a while.
    pub(super) fn is_quiet(&self) -> bool {
        let moment = Duration::from_millis(30);
        self.interrupts.recv_timeout(moment).is_err()
    }

    /// What was used since the last call: descriptor and length.
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut index = [0; 2];
        self.ram.read(DEVICE_RING + 2, &mut index).unwrap();
        let index = u16::from_le_bytes(index);
        let mut used = Vec::new();
        while self.used != index {
            let mut element = [0; 8];
            let slot = u64::from(self.used % QUEUE_SIZE);
            self.ram
                .read(DEVICE_RING + 4 + slot * 8, &mut element)
                .unwrap();
            let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
            used.push((word(0), word(4)));
            self.used = self.used.wrapping_add(1);
        }
        used
    }

    /// One request from beginning to end: how many bytes the device says that it wrote.
    pub(super) fn ask(&mut self, pieces: &[Piece]) -> u32 {
        let head = self.offer(pieces);
        self.kick();
        loop {
            match self.used().as_slice() {
                [] => assert_eq!(self.wait(), 0x41),
                [(first, bytes)] => {
                    assert_eq!(*first, u32::from(head));
                    return *bytes;
                }
                more => panic!("{more:?}"),
            }
        }
    }

    /// Another device that goes on with the same memory; the driver goes on as well.
    pub(super) fn continued(self, device: VirtioPci) -> Self {
        let (available, used, next_free) = (self.available, self.used, self.next_free);
        Self {
            available,
            used,
            next_free,
            ..Self::of(device, self.ram)
        }
    }
}
