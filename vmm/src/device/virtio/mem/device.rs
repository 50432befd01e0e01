#![forbid(unsafe_code)]
//! The device.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bitmap::Blocks;
use super::request::{ANSWER_BYTES, Answer, BlockState, Request, Run};
use super::state::MemState;
use crate::device::virtio::device::{DeviceType, MemoryFigures, VirtioDevice, VirtioStateError};
use crate::device::virtio::queue::Chain;
use crate::memory::discard::DiscardSource;
use crate::memory::guest::GuestRam;
use crate::spec::MemParts;

/// Nodes are known by the tables (`VIRTIO_MEM_F_ACPI_PXM`).
const FEATURE_ACPI_PXM: u64 = 1 << 0;
/// What is unplugged is not to be touched (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).
const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// How much more than is requested a guest may use, so that it finds whole blocks of its own.
const USABLE_EXTENT_BYTES: u64 = 256 << 20;
/// Bytes of the registers.
const CONFIG_BYTES: usize = 56;

static TYPE: DeviceType = DeviceType {
    // VIRTIO_ID_MEM
    number: 24,
    kind: "virtio-mem",
    version: 1,
    // No class fits (PCI code and id assignment, base class 0).
    pci_class: 0x00_ff00,
    queues: &[128],
};

/// A guest has more or less than it had. There is one of a device at a time: the next is given when this one
/// is dropped, so that a guest cannot make more of them than are taken in.
#[derive(Debug)]
pub struct SizeNotice(Arc<AtomicBool>);

impl SizeNotice {
    /// One, if there is none.
    fn new(is_out: &Arc<AtomicBool>) -> Option<Self> {
        let was_out = is_out.swap(true, Ordering::SeqCst);
        (!was_out).then(|| Self(Arc::clone(is_out)))
    }
}

impl PartialEq for SizeNotice {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for SizeNotice {}

impl Drop for SizeNotice {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Who hears that a guest has more or less: from the device's thread, so it must not block.
pub type SizeListener = Arc<dyn Fn(SizeNotice) + Send + Sync>;

/// Memory that grows and shrinks.
pub struct Mem {
    parts: MemParts,
    guest_address: u64,
    requested_bytes: u64,
    usable_bytes: u64,
    blocks: Blocks,
    config: [u8; CONFIG_BYTES],
    generation: u8,
    is_notice_out: Arc<AtomicBool>,
    listener: Option<SizeListener>,
}

impl fmt::Debug for Mem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mem")
            .field("parts", &self.parts)
            .field("plugged_bytes", &self.plugged_bytes())
            .finish_non_exhaustive()
    }
}

impl Mem {
    /// A region of which nothing is plugged.
    pub fn new(parts: &MemParts, listener: Option<SizeListener>) -> Self {
        let blocks = usize::try_from(parts.bytes / parts.block()).unwrap_or(usize::MAX);
        let mut device = Self {
            guest_address: parts.guest_address.unwrap_or_default(),
            parts: parts.clone(),
            requested_bytes: 0,
            usable_bytes: 0,
            blocks: Blocks::new(blocks),
            config: [0; CONFIG_BYTES],
            generation: 0,
            is_notice_out: Arc::default(),
            listener,
        };
        device.request(parts.requested_bytes);
        device
    }

    fn plugged_bytes(&self) -> u64 {
        self.blocks.count() as u64 * self.parts.block()
    }

    /// How much of the region may be used, to have what is requested.
    fn extent(&self) -> u64 {
        match self.requested_bytes {
            0 => 0,
            requested => self
                .parts
                .bytes
                .min(requested.saturating_add(USABLE_EXTENT_BYTES)),
        }
    }

    fn request(&mut self, bytes: u64) {
        self.requested_bytes = bytes;
        // It shrinks when all is given back, and not under a guest that uses it.
        self.usable_bytes = self.usable_bytes.max(self.extent());
        self.write_config();
    }

    fn write_config(&mut self) {
        let parts = &self.parts;
        let node = u16::try_from(parts.node).unwrap_or(u16::MAX);
        let words = [
            parts.block(),
            node.into(),
            self.guest_address,
            parts.bytes,
            self.usable_bytes,
            self.plugged_bytes(),
            self.requested_bytes,
        ];
        let mut config = [0; CONFIG_BYTES];
        for (place, word) in config.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        if config != self.config {
            self.config = config;
            self.generation = self.generation.wrapping_add(1);
        }
    }

    /// The blocks of a run; `None` where it is not all in what may be used.
    fn range(&self, run: Run) -> Option<Range<usize>> {
        let block = self.parts.block();
        let offset = run.guest_address.checked_sub(self.guest_address)?;
        let bytes = u64::from(run.blocks) * block;
        let end = offset.checked_add(bytes)?;
        if bytes == 0 || !offset.is_multiple_of(block) || end > self.usable_bytes {
            return None;
        }
        let number = |bytes: u64| usize::try_from(bytes / block).ok();
        Some(number(offset)?..number(end)?)
    }

    fn place(&self, range: &Range<usize>) -> (u64, u64) {
        let block = self.parts.block();
        let first = self.guest_address + range.start as u64 * block;
        (first, range.len() as u64 * block)
    }

    /// Gives blocks back to the host.
    fn discard(&self, range: &Range<usize>, ram: &GuestRam) -> bool {
        let (first, bytes) = self.place(range);
        match ram.discard(DiscardSource::VirtioMem, first, bytes) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("unplugged memory stays with the host: {error}");
                false
            }
        }
    }

    fn answer(&mut self, request: Option<Request>, ram: &GuestRam) -> Answer {
        match request {
            None => Answer::Error,
            Some(Request::UnplugAll) => self.unplug_all(ram),
            Some(Request::Plug(run)) => self.range(run).map_or(Answer::Error, |range| {
                if !self.blocks.all(&range, false) {
                    return Answer::Error;
                }
                let (first, bytes) = self.place(&range);
                if self.plugged_bytes() + bytes > self.requested_bytes {
                    return Answer::Nack;
                }
                // What was touched while it was unplugged is not there when it comes.
                let is_clean = self.discard(&range, ram);
                let is_there = !self.parts.prealloc || ram.populate(first, bytes).is_ok();
                if !is_clean || !is_there {
                    // What of it is there already is no more the guest's than the rest.
                    self.discard(&range, ram);
                    return Answer::Busy;
                }
                self.blocks.set(&range, true);
                Answer::Ack
            }),
            Some(Request::Unplug(run)) => self.range(run).map_or(Answer::Error, |range| {
                if !self.blocks.all(&range, true) {
                    return Answer::Error;
                }
                if !self.discard(&range, ram) {
                    return Answer::Busy;
                }
                self.blocks.set(&range, false);
                Answer::Ack
            }),
            Some(Request::State(run)) => self.range(run).map_or(Answer::Error, |range| {
                Answer::State(if self.blocks.all(&range, true) {
                    BlockState::Plugged
                } else if self.blocks.all(&range, false) {
                    BlockState::Unplugged
                } else {
                    BlockState::Mixed
                })
            }),
        }
    }

    fn unplug_all(&mut self, ram: &GuestRam) -> Answer {
        for run in self.blocks.runs() {
            if !self.discard(&run, ram) {
                return Answer::Busy;
            }
            self.blocks.set(&run, false);
        }
        self.usable_bytes = self.extent();
        Answer::Ack
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }

    fn features(&self) -> u64 {
        FEATURE_ACPI_PXM | FEATURE_UNPLUGGED_INACCESSIBLE
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn generation(&self) -> u8 {
        self.generation
    }

    fn process(&mut self, _queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        let before = self.blocks.count();
        let answer = self.answer(Request::read(request, ram), ram);
        self.write_config();
        if self.blocks.count() != before
            && let Some(listener) = &self.listener
            && let Some(notice) = SizeNotice::new(&self.is_notice_out)
        {
            listener(notice);
        }
        let fits = request.writable_bytes() >= ANSWER_BYTES as u64;
        let written = fits && request.write(ram, 0, &answer.bytes()).is_ok();
        let bytes = u32::try_from(ANSWER_BYTES).unwrap_or(0);
        if written { bytes } else { 0 }
    }

    fn memory(&self) -> Option<MemoryFigures> {
        Some(MemoryFigures {
            guest_address: self.guest_address,
            requested_bytes: self.requested_bytes,
            plugged_bytes: self.plugged_bytes(),
        })
    }

    fn request_memory(&mut self, bytes: u64) {
        if self.parts.check_requested(bytes).is_ok() {
            self.request(bytes);
        }
    }

    fn save(&self) -> Vec<u8> {
        let state = MemState {
            guest_address: self.guest_address,
            bytes: self.parts.bytes,
            block_bytes: self.parts.block(),
            node: self.parts.node,
            requested_bytes: self.requested_bytes,
            usable_bytes: self.usable_bytes,
            plugged: self.blocks.save(),
        };
        // Integers and bytes: nothing that could not be written.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let state: MemState = postcard::from_bytes(state)
            .map_err(|error| VirtioStateError::new(error.to_string()))?;
        let parts = &self.parts;
        for (name, there, here) in [
            ("memaddr", state.guest_address, self.guest_address),
            ("size", state.bytes, parts.bytes),
            ("block-size", state.block_bytes, parts.block()),
            ("node", state.node.into(), parts.node.into()),
        ] {
            if there != here {
                return Err(VirtioStateError::new(format!(
                    "Property '{name}' changed from {there:#x} to {here:#x}"
                )));
            }
        }
        let count = usize::try_from(parts.bytes / parts.block()).unwrap_or(usize::MAX);
        let blocks = Blocks::restore(count, &state.plugged);
        let is_possible = parts.check_requested(state.requested_bytes).is_ok()
            && state.usable_bytes <= parts.bytes;
        let Some(blocks) = blocks.filter(|_| is_possible) else {
            return Err(VirtioStateError::new(
                "its blocks are not those of its region",
            ));
        };
        self.blocks = blocks;
        self.requested_bytes = state.requested_bytes;
        self.usable_bytes = state.usable_bytes;
        self.write_config();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::guest::RamBacking;
    use crate::memory::layout::{Placed, RamLayout};

    const BLOCK: u64 = 2 << 20;
    const BASE: u64 = 4 << 30;

    fn device() -> (Mem, GuestRam) {
        let parts = MemParts {
            requested_bytes: 4 * BLOCK,
            guest_address: Some(BASE),
            bytes: 16 * BLOCK,
            ..MemParts::default()
        };
        let placed = Placed {
            guest_address: BASE,
            bytes: 16 * BLOCK,
        };
        let layout = RamLayout::new(&[BLOCK]).unwrap().with_modules(&[placed]);
        let backings = [BLOCK, 16 * BLOCK].map(|bytes| RamBacking::anonymous(bytes).unwrap());
        let ram = GuestRam::new(layout.unwrap(), backings.into()).unwrap();
        (Mem::new(&parts, None), ram)
    }

    fn run(block: u64, blocks: u16) -> Run {
        Run {
            guest_address: BASE + block * BLOCK,
            blocks,
        }
    }

    #[test]
    fn requests_are_checked_and_what_is_unplugged_is_gone() {
        let (mut mem, ram) = device();
        let mut ask = |request| mem.answer(Some(request), &ram);
        assert_eq!(ask(Request::Plug(run(1, 2))), Answer::Ack);
        assert_eq!(
            ask(Request::Plug(run(2, 1))),
            Answer::Error,
            "it is plugged"
        );
        assert_eq!(
            ask(Request::Plug(run(5, 3))),
            Answer::Nack,
            "more than requested"
        );
        assert_eq!(ask(Request::Plug(run(15, 2))), Answer::Error, "outside");
        assert_eq!(ask(Request::Plug(run(3, 0))), Answer::Error, "nothing");
        for guest_address in [BASE + 4096, BASE - BLOCK, 0, u64::MAX - 4095] {
            let wrong = Run {
                guest_address,
                blocks: u16::MAX,
            };
            assert_eq!(ask(Request::Plug(wrong)), Answer::Error);
            assert_eq!(ask(Request::State(wrong)), Answer::Error);
        }
        let state = |request| Answer::State(request);
        assert_eq!(ask(Request::State(run(0, 2))), state(BlockState::Mixed));
        assert_eq!(ask(Request::State(run(1, 2))), state(BlockState::Plugged));
        assert_eq!(ask(Request::State(run(3, 9))), state(BlockState::Unplugged));
        ram.write(BASE + BLOCK, b"leaf").unwrap();
        assert_eq!(ask(Request::Unplug(run(0, 2))), Answer::Error);
        assert_eq!(ask(Request::Unplug(run(1, 1))), Answer::Ack);
        let mut back = [1; 4];
        ram.read(BASE + BLOCK, &mut back).unwrap();
        assert_eq!(back, [0; 4]);
        assert_eq!(mem.plugged_bytes(), BLOCK);
        assert_eq!(mem.answer(Some(Request::UnplugAll), &ram), Answer::Ack);
        assert_eq!(mem.plugged_bytes(), 0);
        assert_eq!(mem.answer(None, &ram), Answer::Error);
    }

    #[test]
    fn what_is_requested_is_told_and_all_is_saved() {
        let (mut mem, ram) = device();
        let before = mem.generation();
        mem.request_memory(8 * BLOCK);
        assert_ne!(mem.generation(), before);
        assert_eq!(mem.config()[48..56], (8 * BLOCK).to_le_bytes());
        mem.request_memory(3);
        mem.request_memory(17 * BLOCK);
        assert_eq!(mem.memory().unwrap().requested_bytes, 8 * BLOCK, "checked");
        assert_eq!(
            mem.answer(Some(Request::Plug(run(3, 7))), &ram),
            Answer::Ack
        );
        mem.write_config();
        let (mut other, _) = device();
        other.restore(&mem.save()).unwrap();
        assert_eq!(
            (other.memory(), other.config()),
            (mem.memory(), mem.config())
        );
        assert_eq!(other.save(), mem.save());
        other.guest_address += BLOCK;
        let error = other.restore(&mem.save()).unwrap_err();
        assert!(error.reason.contains("'memaddr' changed"), "{error}");
        for length in 0..mem.save().len() {
            assert!(device().0.restore(&mem.save()[..length]).is_err());
        }
    }
}
