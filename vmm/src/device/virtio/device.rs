#![forbid(unsafe_code)]
//! What a virtio device is to its transport and its queues.

use std::fmt;

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::delegate::Delegate;
use super::inbound::Inbound;
use super::limit::Limiter;
use super::queue::Chain;
use crate::memory::guest::GuestRam;

/// Features of every device: what queues can do, and that it is a modern one.
pub const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceType {
    /// Its virtio number.
    pub number: u16,
    /// Kind of its saved records.
    pub kind: &'static str,
    /// Version of its saved records.
    pub version: u32,
    /// PCI class.
    pub pci_class: u32,
    /// Size of each queue.
    pub queues: &'static [u16],
}

/// Most requests of a device that are under way at once.
pub const MAX_UNDER_WAY: usize = 32;

/// What became of a request that was begun.
#[derive(Debug)]
pub enum Begun {
    /// It is done, and so many bytes of its memory were written.
    Done(Chain, u32),
    /// [`VirtioDevice::finish`] gives it back.
    UnderWay,
    /// Nothing: it stays in its queue, as with [`VirtioDevice::attempt`].
    NotNow,
}

/// A device: what its requests mean. It is called from one thread at a time.
///
/// Requests are the guest's: a device checks everything in them, must not panic, and must return in
/// bounded time.
pub trait VirtioDevice: Send + fmt::Debug {
    /// What it is.
    fn device_type(&self) -> &'static DeviceType;

    /// Features beside [`COMMON_FEATURES`].
    fn features(&self) -> u64;

    /// All features that the guest can take.
    fn offered(&self) -> u64 {
        self.features() | COMMON_FEATURES
    }

    /// What the guest reads in the device's own registers.
    fn config(&self) -> &[u8];

    /// The guest writes to the device's own registers; bytes that are not for writing stay.
    fn write_config(&mut self, _offset: usize, _bytes: &[u8]) {}

    /// Whether requests of a queue have their memory copied. Of those that only name memory one may name any
    /// amount.
    fn copies(&self, _queue: usize) -> bool {
        true
    }

    /// Does what a request asks for and returns how many bytes of its memory were written.
    fn process(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32;

    /// As [`Self::process`], of a device that may be unable to do all of a request now. `None` leaves it in its
    /// queue: it comes again, whole, when the device [`Self::is_ready`], or has been set up anew. What the
    /// guest makes of its memory meanwhile is not the device's business.
    fn attempt(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> Option<u32> {
        Some(self.process(queue, request, ram))
    }

    /// Begins what a request asks for, where others wait behind it or are under way: several are done at once.
    /// No more than [`MAX_UNDER_WAY`] are begun before [`Self::finish`].
    fn start(&mut self, queue: usize, request: Chain, ram: &GuestRam) -> Begun {
        match self.attempt(queue, &request, ram) {
            Some(bytes) => Begun::Done(request, bytes),
            None => Begun::NotNow,
        }
    }

    /// Waits for one of the requests that are under way, in any order; `None` where none is.
    fn finish(&mut self, _ram: &GuestRam) -> Option<(Chain, u32)> {
        None
    }

    /// Whether it can take a request of a queue now. One that cannot is asked again when it has given
    /// something to the guest.
    fn is_ready(&self, _queue: usize) -> bool {
        true
    }

    /// What limits requests of a queue, where something does, and how many bytes of this one count there. Of
    /// the sizes alone, which the guest cannot change any more: it must not say one thing here and another to
    /// [`Self::process`].
    fn limit(&mut self, _queue: usize, _request: &Chain) -> Option<(&mut Limiter, u64)> {
        None
    }

    /// How often [`Self::config`] changed.
    fn generation(&self) -> u8 {
        0
    }

    /// The guest has set the device up and takes these features; or it had when it was saved. Comes
    /// after [`Self::restore`].
    fn activate(&mut self, _features: u64) -> Result<(), VirtioStateError> {
        Ok(())
    }

    /// The machine stands still, and all that its guest has asked for is done: makes durable what will be
    /// taken for that, as a state of the machine may be kept from now on.
    fn settle(&mut self) {}

    /// The guest has reset the device, or has broken it. What is under way is over when this returns.
    fn reset(&mut self) {}

    /// The machine is about to run: takes what it was connected to meanwhile. Whether the guest is to
    /// be told that the registers changed.
    fn begin(&mut self) -> Result<bool, VirtioStateError> {
        Ok(false)
    }

    /// What there is of a device that is memory.
    fn memory(&self) -> Option<MemoryFigures> {
        None
    }

    /// So much memory is requested of a device that is memory; the guest is told of what changes.
    fn request_memory(&mut self, _bytes: u64) {}

    /// What comes from outside, where the device has such a side.
    fn inbound(&mut self) -> Option<&mut dyn Inbound> {
        None
    }

    /// Who works on the rings, where that is somebody else: then no request comes here.
    fn delegate(&mut self) -> Option<&mut dyn Delegate> {
        None
    }

    /// State of its own, beside registers and queues.
    fn save(&self) -> Vec<u8>;

    /// Goes on where `state` was saved.
    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError>;
}

/// What there is of memory that grows and shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFigures {
    /// First guest physical address.
    pub guest_address: u64,
    /// How much the guest is to have, in bytes.
    pub requested_bytes: u64,
    /// How much it has.
    pub plugged_bytes: u64,
}

/// How a device makes itself heard.
pub trait Interrupt: Send + Sync {
    /// A queue has answers.
    fn queue(&self, queue: usize);
    /// The device's registers, or its status, changed.
    fn config(&self);
}

/// Why saved state cannot be this device's.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{reason}")]
pub struct VirtioStateError {
    /// What is wrong with it.
    pub reason: String,
}

impl VirtioStateError {
    /// Says what is wrong.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
        }
    }
}
