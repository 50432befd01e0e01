#![forbid(unsafe_code)]
//! A driver of a device with several queues, in each of which it offers requests of its own.

use std::time::{Duration, Instant};

use super::driver::{Driver, Piece, QUEUE_SIZE};
use crate::device::pci::bus::PciFunction;
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::transport::pci::VirtioPci;

/// What a queue takes in memory: descriptors, then the rings.
const RING_BYTES: u64 = 0x3000;
const FIRST_RING: u64 = 0x1000;
/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, Default)]
struct Ring {
    next_free: u16,
    available: u16,
    used: u16,
}

/// A driver, and how far it has come in each queue.
pub(super) struct Rings {
    pub(super) driver: Driver,
    rings: Vec<Ring>,
}

impl Rings {
    pub(super) fn new(device: Box<dyn VirtioDevice>, queues: usize) -> Self {
        Self::of(Driver::new(device), queues)
    }

    pub(super) fn of(driver: Driver, queues: usize) -> Self {
        Self {
            driver,
            rings: vec![Ring::default(); queues],
        }
    }

    /// Another device that goes on with the same memory; the driver goes on as well.
    pub(super) fn continued(self, device: VirtioPci) -> Self {
        Self {
            driver: self.driver.continued(device),
            rings: self.rings,
        }
    }

    /// Where a queue is.
    fn base(queue: usize) -> u64 {
        FIRST_RING + RING_BYTES * queue as u64
    }

    /// Goes the whole way of virtio 1.2, 3.1.1; the status at its end.
    pub(super) fn set_up(&mut self, features: u64) -> u64 {
        let queues = self.rings.len();
        let driver = &mut self.driver;
        driver
            .ram
            .write(FIRST_RING, &vec![0; 0x3000 * queues])
            .unwrap();
        driver.device.write_config(4, &[6, 0]);
        let control = driver.message_control();
        driver
            .device
            .write_config(control, &0x8000_u16.to_le_bytes());
        for vector in 0..=queues as u64 {
            for (word, value) in [(0, 0xfee0_0000), (8, 0x40 + vector), (12, 0)] {
                driver.write(0x4000 + vector * 16 + word, 4, value);
            }
        }
        for status in [0, 1, 3] {
            driver.write(20, 1, status);
        }
        for half in 0..2 {
            driver.write(8, 4, half);
            driver.write(12, 4, features >> (32 * half));
        }
        driver.write(20, 1, 0xb);
        driver.write(16, 2, 0);
        for queue in 0..queues {
            driver.write(22, 2, queue as u64);
            driver.write(24, 2, QUEUE_SIZE.into());
            driver.write(26, 2, queue as u64 + 1);
            for (offset, place) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
                driver.write(offset, 8, Self::base(queue) + place);
            }
            driver.write(28, 2, 1);
        }
        driver.write(20, 1, 0xf);
        self.rings.fill(Ring::default());
        self.driver.read(20, 1)
    }

    /// Makes a request available.
    pub(super) fn offer(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let base = Self::base(queue);
        let (ring, ram) = (&mut self.rings[queue], &self.driver.ram);
        let head = ring.next_free;
        for (number, &(address, bytes, is_writable)) in pieces.iter().enumerate() {
            let has_next = number + 1 < pieces.len();
            let at = base + u64::from(ring.next_free) * 16;
            ring.next_free = (ring.next_free + 1) % QUEUE_SIZE;
            let flags = u16::from(has_next) | u16::from(is_writable) << 1;
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(bytes.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(ring.next_free.to_le_bytes());
            ram.write(at, &descriptor).unwrap();
        }
        let slot = u64::from(ring.available % QUEUE_SIZE);
        ram.write(base + 0x1004 + slot * 2, &head.to_le_bytes())
            .unwrap();
        ring.available = ring.available.wrapping_add(1);
        ram.write(base + 0x1002, &ring.available.to_le_bytes())
            .unwrap();
        head
    }

    /// Notifies of a queue.
    pub(super) fn kick(&mut self, queue: usize) {
        // Where notifications go by index: of the next answer.
        let wish = Self::base(queue) + 0x1004 + u64::from(QUEUE_SIZE) * 2;
        let used = self.rings[queue].used.to_le_bytes();
        self.driver.ram.write(wish, &used).unwrap();
        self.driver
            .write(0x3000 + queue as u64 * 4, 2, queue as u64);
    }

    /// The next that was used in a queue, if something was: descriptor and length.
    pub(super) fn next(&mut self, queue: usize) -> Option<(u16, u32)> {
        let base = Self::base(queue) + 0x2000;
        let (ring, ram) = (&mut self.rings[queue], &self.driver.ram);
        let mut index = [0; 2];
        ram.read(base + 2, &mut index).unwrap();
        if ring.used == u16::from_le_bytes(index) {
            return None;
        }
        let mut element = [0; 8];
        let slot = u64::from(ring.used % QUEUE_SIZE);
        ram.read(base + 4 + slot * 8, &mut element).unwrap();
        ring.used = ring.used.wrapping_add(1);
        let head = u16::from_le_bytes([element[0], element[1]]);
        Some((head, u32::from_le_bytes(element[4..].try_into().unwrap())))
    }

    /// Waits until something was used in a queue.
    pub(super) fn wait(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(used) = self.next(queue) {
                return used;
            }
            assert!(Instant::now() < deadline, "queue {queue} has no answer");
            // Interrupts are not waited for: another queue's may come first.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
