#![forbid(unsafe_code)]
//! A queue: requests out of guest memory, answers into it, on `virtio-queue`.
//!
//! The descriptors of a request are read once, all of them, before anything is done: what the guest
//! changes afterwards changes nothing. The memory that they name is reached by copies, each checked.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::Bytes;

use super::state::SavedQueue;
use crate::memory::guest::{GuestMemoryError, GuestRam};

/// Most descriptors of a request: a guest's table may have more than a queue has entries.
pub const MAX_DESCRIPTORS: usize = 1024;
/// Most bytes of a request, both ways.
pub const MAX_REQUEST_BYTES: u64 = 32 << 20;

/// Why a queue can go no further until the device is reset.
#[derive(Debug, Error)]
#[error("the guest broke queue {queue}: {reason}")]
pub struct QueueError {
    /// Its number.
    pub queue: usize,
    /// What is wrong.
    pub reason: String,
}

/// A piece of guest memory that belongs to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    address: u64,
    bytes: u32,
}

/// A request: what the device reads, and behind it where it writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    readable_bytes: u64,
    writable_bytes: u64,
    is_malformed: bool,
}

impl Chain {
    /// Whether it is no request: too long, or something to read behind something to write.
    pub fn is_malformed(&self) -> bool {
        self.is_malformed
    }

    /// How many bytes the device may read.
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// How many bytes the device may write.
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// Fills `buffer` from what the device may read, from `offset` on.
    pub fn read(
        &self,
        ram: &GuestRam,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for (address, bytes) in parts(&self.readable, offset, buffer.len()) {
            let part = buffer.get_mut(done..done + bytes).unwrap_or_default();
            ram.read(address, part)?;
            done += bytes;
        }
        Ok(())
    }

    /// Writes `bytes` to where the device may write, from `offset` on; what does not fit is left out.
    pub fn write(&self, ram: &GuestRam, offset: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for (address, length) in parts(&self.writable, offset, bytes.len()) {
            ram.write(address, bytes.get(done..done + length).unwrap_or_default())?;
            done += length;
        }
        Ok(())
    }

    /// Address and length of each piece of memory that the device may write, as the guest named them.
    pub fn writable(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.writable
            .iter()
            .map(|piece| (piece.address, piece.bytes))
    }

    /// Takes in one descriptor, of a request of `most` bytes; `false` ends the request.
    fn add(&mut self, address: u64, bytes: u32, is_writable: bool, most: u64) -> bool {
        let all = self.readable.len() + self.writable.len();
        let total = self.readable_bytes + self.writable_bytes + u64::from(bytes);
        let is_late = !is_writable && !self.writable.is_empty();
        if all >= MAX_DESCRIPTORS || total > most || is_late {
            self.is_malformed = true;
            return false;
        }
        let (pieces, sum) = if is_writable {
            (&mut self.writable, &mut self.writable_bytes)
        } else {
            (&mut self.readable, &mut self.readable_bytes)
        };
        pieces.push(Piece { address, bytes });
        *sum += u64::from(bytes);
        true
    }
}

/// Guest addresses and lengths of `length` bytes from `offset` on.
fn parts(pieces: &[Piece], offset: u64, length: usize) -> impl Iterator<Item = (u64, usize)> + '_ {
    let (mut skip, mut left) = (offset, length);
    pieces.iter().filter_map(move |piece| {
        let bytes = u64::from(piece.bytes);
        if skip >= bytes {
            skip -= bytes;
            return None;
        }
        let room = usize::try_from(bytes - skip).unwrap_or(usize::MAX);
        let take = room.min(left);
        // An address at the end of all is outside RAM, and found there.
        let address = piece.address.saturating_add(skip);
        (skip, left) = (0, left - take);
        (take > 0).then_some((address, take))
    })
}

/// What the transport says of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// The descriptors.
    Descriptors,
    /// What the driver makes available.
    Driver,
    /// What the device has used.
    Device,
}

/// One queue.
#[derive(Debug)]
pub struct VirtQueue {
    number: usize,
    queue: Queue,
    /// How many requests were given back since the guest's wish for interrupts was read.
    added: u16,
    /// The index of what the guest makes available, when it was watched.
    watched: u16,
    /// Most bytes of a request.
    max_bytes: u64,
}

impl VirtQueue {
    /// A queue of at most `size` entries, a power of two; `None` where that is no size.
    pub fn new(number: usize, size: u16) -> Option<Self> {
        let queue = Queue::new(size).ok()?;
        Some(Self {
            number,
            queue,
            added: 0,
            watched: 0,
            max_bytes: MAX_REQUEST_BYTES,
        })
    }

    /// The same, for requests that name memory and do not have it copied: of any length.
    pub fn of_any_length(self) -> Self {
        Self {
            max_bytes: u64::MAX,
            ..self
        }
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.added = 0;
    }

    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the guest has set it up.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Sets the number of entries, if it can be that.
    pub fn set_size(&mut self, size: u16) {
        // The guest reads back what it is.
        let _ = self.queue.try_set_size(size);
    }

    /// The guest has set it up.
    pub fn set_ready(&mut self) {
        self.queue.set_ready(true);
    }

    /// Whether both sides say exactly when they want to hear of something.
    pub fn set_event_index(&mut self, is_on: bool) {
        self.queue.set_event_idx(is_on);
    }

    /// The address of a ring.
    pub fn ring(&self, ring: Ring) -> u64 {
        match ring {
            Ring::Descriptors => self.queue.desc_table(),
            Ring::Driver => self.queue.avail_ring(),
            Ring::Device => self.queue.used_ring(),
        }
    }

    /// Sets the address of a ring, if it is aligned as it must be.
    pub fn set_ring(&mut self, ring: Ring, address: u64) {
        let address = vm_memory::GuestAddress(address);
        // The guest reads back what it is.
        let _ = match ring {
            Ring::Descriptors => self.queue.try_set_desc_table_address(address),
            Ring::Driver => self.queue.try_set_avail_ring_address(address),
            Ring::Device => self.queue.try_set_used_ring_address(address),
        };
    }

    /// Whether all of its rings are in RAM.
    pub fn is_valid(&self, ram: &GuestRam) -> bool {
        self.queue.is_valid(&*ram.as_vm_memory())
    }

    /// The next request; `None` where there is none.
    pub fn pop(&mut self, ram: &GuestRam) -> Result<Option<Chain>, QueueError> {
        let number = self.number;
        let mut iter = (self.queue.iter(ram.as_vm_memory())).map_err(broken(number))?;
        let Some(descriptors) = iter.next() else {
            return Ok(None);
        };
        let mut chain = Chain {
            head: descriptors.head_index(),
            ..Chain::default()
        };
        for descriptor in descriptors {
            let address = descriptor.addr().0;
            let is_writable = descriptor.is_write_only();
            if !chain.add(address, descriptor.len(), is_writable, self.max_bytes) {
                break;
            }
        }
        Ok(Some(chain))
    }

    /// Whether the guest has made another request available.
    pub fn has_next(&self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.available(ram)? != self.queue.next_avail())
    }

    /// Gives a request back, with the number of bytes that were written to its memory.
    pub fn push(&mut self, ram: &GuestRam, chain: &Chain, bytes: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(&*ram.as_vm_memory(), chain.head, bytes)
            .map_err(broken(self.number))?;
        self.added = self.added.saturating_add(1);
        Ok(())
    }

    /// Gives several requests back at once: the guest sees all of them, or none.
    pub fn push_all<'a>(
        &mut self,
        ram: &GuestRam,
        used: impl ExactSizeIterator<Item = (&'a Chain, u32)>,
    ) -> Result<(), QueueError> {
        let first = self.queue.next_used();
        let last = used.len().saturating_sub(1);
        for (number, (chain, bytes)) in used.enumerate() {
            // Each goes to its place; the index that shows it is written with the last.
            let place = first.wrapping_add(u16::try_from(number).unwrap_or(u16::MAX));
            self.queue.set_next_used(place);
            if number == last {
                self.push(ram, chain, bytes)?;
            } else {
                self.write_used(ram, place, chain.head, bytes)?;
            }
        }
        self.added = self
            .added
            .saturating_add(u16::try_from(last).unwrap_or(u16::MAX));
        Ok(())
    }

    /// Writes an element of the device's ring, which is not shown yet.
    fn write_used(
        &self,
        ram: &GuestRam,
        place: u16,
        head: u16,
        bytes: u32,
    ) -> Result<(), QueueError> {
        if head >= self.queue.size() {
            return Err(broken(self.number)(
                virtio_queue::Error::InvalidDescriptorIndex,
            ));
        }
        let slot = u64::from(place % self.queue.size().max(1));
        let address = self.queue.used_ring().saturating_add(4 + slot * 8);
        let mut element = [0; 8];
        element[..2].copy_from_slice(&head.to_le_bytes());
        element[4..].copy_from_slice(&bytes.to_le_bytes());
        ram.write(address, &element).map_err(|error| QueueError {
            queue: self.number,
            reason: error.to_string(),
        })
    }

    /// Makes the last `requests` that were taken available again.
    pub fn put_back(&mut self, requests: usize) {
        let requests = u16::try_from(requests).unwrap_or(0);
        let next = self.queue.next_avail();
        self.queue.set_next_avail(next.wrapping_sub(requests));
    }

    /// Asks the guest not to notify of more.
    pub fn hush(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&*ram.as_vm_memory())
            .map_err(broken(self.number))
    }

    /// Asks the guest to notify of more; whether there is more already.
    pub fn listen(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&*ram.as_vm_memory())
            .map_err(broken(self.number))
    }

    /// Asks the guest to notify of the next request that it makes available, whatever waits already;
    /// [`Self::has_grown`] tells from now on.
    pub fn watch(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        self.watched = self.available(ram)?;
        self.listen(ram)?;
        if self.queue.event_idx_enabled() {
            // Behind the device's ring: the index of which to notify.
            let behind = 4 + u64::from(self.queue.size()) * 8;
            let address = self.queue.used_ring().saturating_add(behind);
            ram.write(address, &self.watched.to_le_bytes())
                .map_err(|error| QueueError {
                    queue: self.number,
                    reason: error.to_string(),
                })?;
            // The guest sees it before anything is given back.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Whether the guest has made more available since [`Self::watch`].
    pub fn has_grown(&self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.available(ram)? != self.watched)
    }

    /// The index of what the guest makes available.
    fn available(&self, ram: &GuestRam) -> Result<u16, QueueError> {
        let index = self
            .queue
            .avail_idx(&*ram.as_vm_memory(), Ordering::Acquire);
        index.map(|index| index.0).map_err(broken(self.number))
    }

    /// The next request to take.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// How many requests guest memory shows as answered, for a ring that somebody else works on; `None` where
    /// there is no such memory.
    pub fn used_index(&self, ram: &GuestRam) -> Option<u16> {
        let index = self.queue.used_idx(&*ram.as_vm_memory(), Ordering::Acquire);
        index.ok().map(|index| index.0)
    }

    /// All requests up to this index were taken and answered, by somebody else.
    pub fn set_progress(&mut self, index: u16) {
        self.queue.set_next_avail(index);
        self.queue.set_next_used(index);
    }

    /// Whether the guest wants to hear of what was given back since this was asked last.
    pub fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        let added = std::mem::take(&mut self.added);
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // What was given back is seen before the guest's wish is read.
        fence(Ordering::SeqCst);
        let wish = u64::from(self.queue.size()) * 2 + 4;
        let address = self.queue.avail_ring().saturating_add(wish);
        let memory = ram.as_vm_memory();
        let event: u16 = memory
            .load(vm_memory::GuestAddress(address), Ordering::Relaxed)
            .map_err(|error| QueueError {
                queue: self.number,
                reason: error.to_string(),
            })?;
        // Whether the guest waits for one of these (virtio 1.2, 2.7.10).
        let behind = self.queue.next_used().wrapping_sub(u16::from_le(event));
        Ok((1..=added).contains(&behind))
    }

    /// Everything that [`Self::restore`] needs.
    pub fn save(&self) -> SavedQueue {
        let QueueState {
            max_size: _,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = self.queue.state();
        SavedQueue {
            size,
            is_ready: ready,
            has_event_index: event_idx_enabled,
            descriptors: desc_table,
            driver_ring: avail_ring,
            device_ring: used_ring,
            next_available: next_avail,
            next_used,
            vector: 0,
        }
    }

    /// Goes on where a queue was saved; `false` where that cannot be this one.
    pub fn restore(&mut self, state: &SavedQueue) -> bool {
        let restored = Queue::try_from(QueueState {
            max_size: self.queue.max_size(),
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: state.has_event_index,
            size: state.size,
            ready: state.is_ready,
            desc_table: state.descriptors,
            avail_ring: state.driver_ring,
            used_ring: state.device_ring,
        });
        match restored {
            Ok(queue) => {
                self.queue = queue;
                true
            }
            Err(_) => false,
        }
    }
}

fn broken(queue: usize) -> impl Fn(virtio_queue::Error) -> QueueError {
    move |error| QueueError {
        queue,
        reason: error.to_string(),
    }
}
