#![forbid(unsafe_code)]
//! The device: discards what the guest gives away, as far as the gate lets it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::backend::BalloonPort;
use super::request::{self, Run};
use super::state::BalloonState;
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::inbound::{Inbound, Want};
use crate::device::virtio::queue::Chain;
use crate::memory::discard::{DiscardError, DiscardSource};
use crate::memory::guest::GuestRam;
use crate::spec::BalloonParts;

/// Statistics have a queue.
const STATS_QUEUE: u64 = 1 << 1;
/// The guest takes memory back before it ends programs for want of it.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest says what it fills free pages with.
const PAGE_POISON: u64 = 1 << 4;
/// The guest reports free pages.
const REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;

/// Registers: pages wanted, pages given, a command that is not offered, what free pages are filled with.
const CONFIG_BYTES: usize = 16;
const TARGET_AT: usize = 0;
const ACTUAL_AT: usize = 4;
const POISON_AT: usize = 12;

/// A queue is where it is because those before it are offered.
static PLAIN: DeviceType = device_type(&[128; 3]);
static WITH_REPORTING: DeviceType = device_type(&[128, 128, 128, 32]);

const fn device_type(queues: &'static [u16]) -> DeviceType {
    DeviceType {
        number: VIRTIO_ID_BALLOON.to_le_bytes()[0] as u16,
        kind: "virtio-balloon",
        version: 1,
        // Memory controller of no kind, as QEMU has it.
        pci_class: 0x00_ff00,
        queues,
    }
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    port: BalloonPort,
    parts: BalloonParts,
    config: [u8; CONFIG_BYTES],
    generation: u8,
    /// What the guest took of the features.
    features: u64,
    /// The guest's request for statistics was read and waits in its queue.
    is_held: bool,
    /// The guest is to be asked for statistics.
    wants_stats: bool,
    /// It was saved before the guest had done what was wanted, and perhaps before it had heard of that.
    is_behind: bool,
    /// Something that the guest gave away is no RAM: said once.
    has_told_outside: bool,
}

impl Balloon {
    /// A balloon of no size.
    pub fn new(parts: BalloonParts, port: BalloonPort) -> Self {
        Self {
            port,
            parts,
            config: [0; CONFIG_BYTES],
            generation: 0,
            features: 0,
            is_held: false,
            wants_stats: false,
            is_behind: false,
            has_told_outside: false,
        }
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self
            .config
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    }

    fn set_word(&mut self, at: usize, word: u32) {
        if let Some(bytes) = self.config.get_mut(at..at + 4) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Takes in what the host wants; whether the guest is to hear of it.
    fn take_wishes(&mut self) -> bool {
        let (target, is_time) = self.port.look();
        // A guest that has not yet answered the last question is not asked another.
        self.wants_stats |= is_time && self.is_held;
        let Some(target) = target.filter(|&target| target != self.word(TARGET_AT)) else {
            return false;
        };
        self.set_word(TARGET_AT, target);
        self.generation = self.generation.wrapping_add(1);
        true
    }

    fn discard(&mut self, source: DiscardSource, run: Run, ram: &GuestRam) {
        match ram.discard(source, run.guest_address, run.bytes()) {
            // A refusal was counted and told by the gate: the guest has given the memory away all the same.
            Ok(()) | Err(DiscardError::Refused(_)) => (),
            Err(error) => {
                if !std::mem::replace(&mut self.has_told_outside, true) {
                    tracing::warn!(
                        "memory that the guest gives away is not freed: {}",
                        crate::report::one_line(&error)
                    );
                }
            }
        }
    }

    /// A request of the queue of free pages.
    fn report(&mut self, request: &Chain, ram: &GuestRam) {
        if self.features & PAGE_POISON != 0 && self.word(POISON_AT) != 0 {
            // The guest wants to find there what it wrote.
            return;
        }
        for run in request::free(request) {
            self.discard(DiscardSource::FreePageReporting, run, ram);
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> &'static DeviceType {
        if self.parts.free_page_reporting {
            &WITH_REPORTING
        } else {
            &PLAIN
        }
    }

    fn features(&self) -> u64 {
        let mut features = STATS_QUEUE;
        if self.parts.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if self.parts.free_page_reporting {
            features |= REPORTING | PAGE_POISON;
        }
        features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            // The target is the host's.
            let is_guests =
                (ACTUAL_AT..ACTUAL_AT + 4).contains(&at) || (POISON_AT..CONFIG_BYTES).contains(&at);
            if let Some(register) = self.config.get_mut(at).filter(|_| is_guests) {
                *register = *byte;
            }
        }
        let actual = self.word(ACTUAL_AT);
        if actual != self.port.actual_pages() {
            self.port.changed(actual);
        }
    }

    fn copies(&self, queue: usize) -> bool {
        queue <= STATS
    }

    fn generation(&self) -> u8 {
        self.generation
    }

    fn process(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        // What it keeps for later is asked for again by `attempt`.
        self.attempt(queue, request, ram).unwrap_or(0)
    }

    fn attempt(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> Option<u32> {
        match queue {
            INFLATE => {
                for run in request::pages(request, ram) {
                    self.discard(DiscardSource::Balloon, run, ram);
                }
            }
            // The guest finds zeros there, or what it left.
            DEFLATE => (),
            STATS if self.is_held => {
                (self.is_held, self.wants_stats) = (false, false);
            }
            STATS => {
                if let Some(stats) = request::stats(request, ram) {
                    self.port.said(stats);
                }
                // It goes back when there is something to ask.
                self.is_held = true;
                return None;
            }
            _ => self.report(request, ram),
        }
        Some(0)
    }

    fn is_ready(&self, queue: usize) -> bool {
        queue != STATS || !self.is_held || self.wants_stats
    }

    fn activate(&mut self, features: u64) -> Result<(), VirtioStateError> {
        self.features = features;
        (self.is_held, self.wants_stats) = (false, false);
        Ok(())
    }

    fn reset(&mut self) {
        (self.is_held, self.wants_stats, self.features) = (false, false, 0);
        self.set_word(POISON_AT, 0);
    }

    fn begin(&mut self) -> Result<bool, VirtioStateError> {
        let is_behind = std::mem::take(&mut self.is_behind);
        Ok(self.take_wishes() || is_behind)
    }

    fn inbound(&mut self) -> Option<&mut dyn Inbound> {
        Some(self)
    }

    fn save(&self) -> Vec<u8> {
        let state = BalloonState {
            // What was wanted while the machine stood still is taken in when it goes on.
            target_pages: (self.port.next_target_pages()).unwrap_or_else(|| self.word(TARGET_AT)),
            actual_pages: self.word(ACTUAL_AT),
            poison: self.word(POISON_AT),
            features: self.features(),
        };
        // Numbers into memory: there is no way to fail.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let (state, rest): (BalloonState, _) = postcard::take_from_bytes(state)
            .map_err(|error| VirtioStateError::new(error.to_string()))?;
        if !rest.is_empty() {
            let bytes = rest.len();
            return Err(VirtioStateError::new(format!("{bytes} bytes too many")));
        }
        if state.features != self.features() {
            return Err(VirtioStateError::new(
                "it was saved with another choice of deflate-on-oom and free-page-reporting",
            ));
        }
        self.set_word(TARGET_AT, state.target_pages);
        self.set_word(ACTUAL_AT, state.actual_pages);
        self.set_word(POISON_AT, state.poison);
        self.is_behind = state.target_pages != state.actual_pages;
        self.port.restored(state.actual_pages, state.target_pages);
        Ok(())
    }
}

impl Inbound for Balloon {
    /// Nothing is put into its queues.
    fn queues(&self) -> u64 {
        0
    }

    fn source(&self) -> Option<Arc<OwnedFd>> {
        self.port.source()
    }

    fn look(&mut self) {
        self.take_wishes();
    }

    fn wants(&mut self, _queue: usize) -> Want {
        Want::Nothing
    }

    fn fill(&mut self, _queue: usize, _request: &Chain, _ram: &GuestRam) -> u32 {
        0
    }
}
