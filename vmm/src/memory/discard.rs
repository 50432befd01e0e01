#![forbid(unsafe_code)]
//! The discard gate: the one place that is asked before any guest RAM is discarded.
//!
//! As with QEMU three things are told apart: a *backend* whose RAM cannot be discarded (it is a template's:
//! what would be read afterwards are the template's bytes), a *device* that cannot do without discarding
//! ([`DiscardGate::require`]: virtio-mem, which is refused before the machine is made), and devices that ask
//! each time and go on when they are refused (balloon, free page reporting). A refusal is an error each time:
//! each is counted, and told at most once a second.
//!
//! QEMU also tells *coordinated* discards from others (`ram_block_coordinated_discard_require`): a virtio-mem device
//! announces which blocks are plugged, so that somebody who pins guest memory can go along, while a balloon's
//! discards come unannounced. Nobody pins guest memory here: another process of vhost-user maps the file, in which
//! a discard is a hole for it as well, and a pager shares the map of what was discarded. So both kinds are let
//! through alike; who requires discards of which kind is shown.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::guest::GuestRam;
use super::layout::PAGE_BYTES;
use crate::observe::metrics::{DISCARD_SOURCES, count_discard_refused};
use crate::spec::{BackendSpec, DeviceSpec, FileAccess, FileSource, MachineSpec, MemParts};

/// How often refusals are told at most; they are counted all the same.
const TELL_EACH: Duration = Duration::from_secs(1);

/// On whose behalf RAM is to be discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiscardSource {
    /// A balloon that is inflated.
    Balloon,
    /// Pages that the guest reports free, or that it hints at.
    FreePageReporting,
    /// Memory that a virtio-mem device has not plugged.
    VirtioMem,
    /// A migration that lets go of what it has sent (`release-ram`).
    ReleaseRam,
    /// A migration whose RAM comes later.
    Postcopy,
}

impl DiscardSource {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Balloon,
        Self::FreePageReporting,
        Self::VirtioMem,
        Self::ReleaseRam,
        Self::Postcopy,
    ];

    /// The source as metrics have it.
    pub const fn word(self) -> &'static str {
        DISCARD_SOURCES[self as usize]
    }
}

impl DiscardSource {
    /// Whether what is discarded is announced to whoever else has the memory.
    pub const fn is_coordinated(self) -> bool {
        matches!(self, Self::VirtioMem)
    }

    /// Whether it is a guest who asks, in the course of its work, and there is nobody to answer.
    const fn is_guests(self) -> bool {
        matches!(self, Self::Balloon | Self::FreePageReporting)
    }
}

impl fmt::Display for DiscardSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What becomes of RAM of a backend that is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discards {
    /// It goes back to the host and reads as zero.
    Allowed,
    /// The same, of a clone whose owner asked for it: whoever brings its pages remembers which were
    /// discarded and never brings the template's again.
    Zero,
    /// It cannot be discarded: it is a template's.
    Refused,
}

impl Discards {
    /// What monitors and errors say of it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Allowed => "on",
            Self::Zero => "zero",
            Self::Refused => "off",
        }
    }
}

/// A discard that is refused. It says what QEMU says, and who wanted what of which memory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "discard by {who}: ram_block_discard_range: Discarding RAM with readonly files is not supported: memory backend \
     {backend} is a template's; give it discard=zero, or memory of its own, to have memory discarded"
)]
pub struct DiscardRefusal {
    /// Who asked.
    pub who: &'static str,
    /// Id of the memory backend.
    pub backend: String,
}

/// Why RAM was not discarded.
#[derive(Debug, Error)]
pub enum DiscardError {
    /// It may not be.
    #[error(transparent)]
    Refused(#[from] DiscardRefusal),
    /// It is no RAM, or not whole pages of it.
    #[error("{bytes} bytes at {guest_address:#x} are not whole pages of RAM: nothing is discarded")]
    Outside {
        /// First guest physical address.
        guest_address: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// The system could not.
    #[error("{bytes} bytes of RAM at {guest_address:#x} cannot be discarded")]
    System {
        /// First guest physical address.
        guest_address: u64,
        /// How many bytes.
        bytes: u64,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// A device that cannot do without discarding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscardHolder {
    /// What it is called.
    pub device: String,
    /// On whose behalf it discards.
    pub source: DiscardSource,
    /// Position of its backend in the machine.
    pub backend: usize,
}

/// What is known of a backend here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendDiscards {
    /// Its id.
    pub id: String,
    /// What becomes of a discard.
    pub discards: Discards,
}

impl BackendDiscards {
    /// What becomes of discards of a backend's memory.
    pub fn of(backend: &BackendSpec) -> Self {
        let access = backend.file().map(FileSource::access);
        let discards = match access {
            None | Some(FileAccess::Template) => Discards::Allowed,
            // QEMU, which has it open for writing, punches holes into other clones' template.
            Some(FileAccess::Private | FileAccess::Clone) if backend.discards_to_zero() => {
                Discards::Zero
            }
            Some(_) => Discards::Refused,
        };
        Self {
            id: backend.id().to_owned(),
            discards,
        }
    }
}

/// The gate of one machine.
#[derive(Debug, Default)]
pub struct DiscardGate {
    backends: RwLock<Vec<BackendDiscards>>,
    holders: Mutex<Vec<DiscardHolder>>,
    refused: [Refused; DiscardSource::ALL.len()],
}

/// Refusals of one source.
#[derive(Debug, Default)]
struct Refused {
    total: AtomicU64,
    told: Mutex<Option<Instant>>,
}

impl DiscardGate {
    /// A gate for these backends, in the machine's order.
    pub fn new(backends: Vec<BackendDiscards>) -> Self {
        Self {
            backends: RwLock::new(backends),
            ..Self::default()
        }
    }

    /// A gate for the backends of a machine.
    pub fn of(spec: &MachineSpec) -> Self {
        let backends = spec.backends().iter();
        Self::new(backends.map(BackendDiscards::of).collect())
    }

    /// A gate for a clone of a machine, all of whose memory is the template's.
    pub fn of_clone(spec: &MachineSpec, discards: Discards) -> Self {
        let of_template = |backend: &BackendSpec| BackendDiscards {
            id: backend.id().to_owned(),
            discards,
        };
        Self::new(spec.backends().iter().map(of_template).collect())
    }

    /// What becomes of discards, backend by backend.
    pub fn backends(&self) -> Vec<BackendDiscards> {
        self.known().clone()
    }

    fn known(&self) -> RwLockReadGuard<'_, Vec<BackendDiscards>> {
        self.backends.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backend came; those from `position` on are counted one higher.
    pub(crate) fn insert(&self, position: usize, backend: BackendDiscards) {
        let all = self.backends.write();
        let mut all = all.unwrap_or_else(PoisonError::into_inner);
        let position = position.min(all.len());
        all.insert(position, backend);
        drop(all);
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        for holder in holders
            .iter_mut()
            .filter(|holder| holder.backend >= position)
        {
            holder.backend += 1;
        }
    }

    /// A backend went; those behind it are counted one lower.
    pub(crate) fn remove(&self, position: usize) {
        let all = self.backends.write();
        let mut all = all.unwrap_or_else(PoisonError::into_inner);
        if position < all.len() {
            all.remove(position);
        }
        drop(all);
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.retain(|holder| holder.backend != position);
        for holder in holders
            .iter_mut()
            .filter(|holder| holder.backend > position)
        {
            holder.backend -= 1;
        }
    }

    /// Asks for `attempts` discards of one backend's memory. A refusal is counted and told.
    pub fn ask(
        &self,
        source: DiscardSource,
        backend: usize,
        attempts: u64,
    ) -> Result<Discards, DiscardRefusal> {
        match self.refusal(source, backend) {
            None => Ok(self.discards(backend)),
            Some(refusal) => {
                self.count(source, attempts, &refusal);
                Err(refusal)
            }
        }
    }

    /// A device says that it cannot do without discarding memory of a backend.
    pub fn require(&self, holder: DiscardHolder) -> Result<(), DiscardRefusal> {
        if let Some(refusal) = self.refusal(holder.source, holder.backend) {
            self.count(holder.source, 1, &refusal);
            return Err(refusal);
        }
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.retain(|other| other.device != holder.device);
        holders.push(holder);
        Ok(())
    }

    /// As [`Self::require`], for a device that is one of those, if it is. Memory that has no name here is not looked
    /// at: whoever made it has none of them.
    pub fn require_for(&self, device: &DeviceSpec) -> Result<(), DiscardRefusal> {
        let named =
            |mem: &MemParts| (self.known().iter()).position(|known| known.id == mem.backend);
        match device.memory().and_then(named) {
            Some(backend) => self.require(DiscardHolder {
                device: device.id().to_owned(),
                source: DiscardSource::VirtioMem,
                backend,
            }),
            None => Ok(()),
        }
    }

    /// The devices that cannot do without discarding memory of the backend of this id.
    pub fn holders_of(&self, id: &str) -> Vec<DiscardHolder> {
        let backend = self.known().iter().position(|backend| backend.id == id);
        backend.map_or_else(Vec::new, |backend| self.holders(backend))
    }

    /// Counts a refusal for which nobody had to ask: it was known from the machine's description.
    pub fn count_known(&self, source: DiscardSource) {
        self.add(source, 1);
    }

    /// Counts refusals; how many there are now.
    fn add(&self, source: DiscardSource, attempts: u64) -> u64 {
        count_discard_refused(source.word(), attempts);
        let total = &self.refused[source as usize].total;
        total.fetch_add(attempts, Ordering::Relaxed) + attempts
    }

    /// Devices that cannot do without discarding memory of a backend.
    pub fn holders(&self, backend: usize) -> Vec<DiscardHolder> {
        let holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        let of_backend = holders.iter().filter(|holder| holder.backend == backend);
        of_backend.cloned().collect()
    }

    /// How many discards of a source were refused.
    pub fn refused(&self, source: DiscardSource) -> u64 {
        self.refused[source as usize].total.load(Ordering::Relaxed)
    }

    fn discards(&self, backend: usize) -> Discards {
        // What is not known is not discarded.
        let known = self.known();
        known
            .get(backend)
            .map_or(Discards::Refused, |backend| backend.discards)
    }

    fn refusal(&self, source: DiscardSource, backend: usize) -> Option<DiscardRefusal> {
        if self.discards(backend) != Discards::Refused {
            return None;
        }
        let known = self.known();
        let number = || format!("number {backend}");
        Some(DiscardRefusal {
            who: source.word(),
            backend: known
                .get(backend)
                .map_or_else(number, |backend| backend.id.clone()),
        })
    }

    fn count(&self, source: DiscardSource, attempts: u64, refusal: &DiscardRefusal) {
        let total = self.add(source, attempts);
        if !source.is_guests() {
            // Whoever asked is told.
            return;
        }
        let now = Instant::now();
        let told = &self.refused[source as usize].told;
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| now.saturating_duration_since(told) >= TELL_EACH) {
            *told = Some(now);
            tracing::error!(refused = total, "{refusal}");
        }
    }
}

impl GuestRam {
    /// Discards whole pages of RAM: they go back to the host, and read as zero from then on. Memory of a backend
    /// that refuses, or that the system keeps, stays, and is told of when the rest was done. Of a balloon each page is an attempt, of others
    /// each run.
    pub fn discard(
        &self,
        source: DiscardSource,
        guest_address: u64,
        bytes: u64,
    ) -> Result<(), DiscardError> {
        let outside = DiscardError::Outside {
            guest_address,
            bytes,
        };
        let is_whole = guest_address.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        let end = guest_address
            .checked_add(bytes)
            .filter(|_| is_whole && bytes > 0);
        let Some(end) = end else {
            return Err(outside);
        };
        let view = self.view();
        let mut at = guest_address;
        let mut outcome = Ok(());
        while at < end {
            let mut slots = view.slots().iter();
            let slot = slots
                .find(|slot| (slot.guest_address..slot.guest_address + slot.bytes).contains(&at));
            let Some((slot, backing)) =
                slot.and_then(|slot| Some((slot, view.backings().get(slot.backend)?)))
            else {
                return Err(outside);
            };
            let bytes = end.min(slot.guest_address + slot.bytes) - at;
            let attempts = match source {
                DiscardSource::Balloon => bytes / PAGE_BYTES,
                _ => 1,
            };
            if let Err(refusal) = self.gate().ask(source, slot.backend, attempts) {
                outcome = outcome.and(Err(refusal.into()));
                at += bytes;
                continue;
            }
            let offset_bytes = slot.first_page * PAGE_BYTES + (at - slot.guest_address);
            let done = backing.discard(offset_bytes, bytes);
            outcome = outcome.and(done.map_err(|source| DiscardError::System {
                guest_address: at,
                bytes,
                source,
            }));
            at += bytes;
        }
        outcome
    }
}

#[cfg(test)]
mod tests;
