// UNSAFETY: guest RAM is host memory that this process, the guest and the pager share. This file
// turns backings into `vm-memory` regions by raw address and keeps each backing alive for as long
// as the region; it is the only code of this crate that does so. All access goes through
// `vm-memory`'s volatile copies: no reference or slice to guest memory exists anywhere.
#![expect(
    unsafe_code,
    reason = "maps backings into vm-memory regions by raw address"
)]
//! Guest RAM as this process sees it: backings joined to the guest's address map.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use pando_pager::{ByteOffset, CloneMemory, PageCount, PageIndex, PageRange};
use rustix::mm::Advice;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::discard::{BackendDiscards, DiscardGate, Discards};
use super::layout::{PAGE_BYTES, RamLayout, RamSegment};
use super::slots::{HostMemory, Slots};

/// Why guest memory could not be made or touched.
#[derive(Debug, Error)]
pub enum GuestMemoryError {
    /// The kernel refused a mapping.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// Size of the mapping.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The backings do not match the layout.
    #[error("memory backend {backend} has {actual} bytes where the machine needs {expected}")]
    BackingSize {
        /// Position of the backend in the machine.
        backend: usize,
        /// What the layout asks for.
        expected: u64,
        /// What the backing has.
        actual: u64,
    },
    /// A region could not be built; addresses overlap or overflow.
    #[error("guest memory at {guest_address:#x} cannot be placed: {reason}")]
    Place {
        /// First guest physical address.
        guest_address: u64,
        /// What `vm-memory` said.
        reason: String,
    },
    /// An access outside RAM.
    #[error("guest memory access of {bytes} bytes at {guest_address:#x} is outside RAM")]
    Access {
        /// First guest physical address.
        guest_address: u64,
        /// Length of the access.
        bytes: usize,
        /// What `vm-memory` said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Host memory of one backend. What it is decides what can happen to it: only `Shared` can write
/// a file.
#[derive(Debug)]
pub enum RamBacking {
    /// A template being made: the file, mapped shared; guest writes go to the file.
    Shared(SharedMapping),
    /// Memory that the guest can only read: a private mapping of a file that is open read-only.
    Rom(MmapMut),
    /// Engine `kernel`: a private mapping of a file that is open read-only.
    Private(MmapMut),
    /// Anonymous memory of a VM that is no clone.
    Anonymous(MmapRaw),
    /// Engine `copy`: anonymous memory that the pager fills.
    Paged(CloneMemory),
}

/// A file that is the memory, and where in it that begins: other processes can map it too.
#[derive(Debug)]
pub struct SharedMapping {
    mapping: MmapRaw,
    file: FileOffset,
}

impl RamBacking {
    /// Maps the first `bytes` of a template's RAM file shared and writable.
    pub fn shared(file: &File, bytes: u64) -> Result<Self, GuestMemoryError> {
        Self::shared_from(file, 0, bytes)
    }

    /// Maps `bytes` of a file shared and writable, from `offset_bytes` on.
    pub fn shared_from(
        file: &File,
        offset_bytes: u64,
        bytes: u64,
    ) -> Result<Self, GuestMemoryError> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        let map = || {
            let mut options = MmapOptions::new();
            let mapping = options.len(length).offset(offset_bytes).map_raw(file)?;
            let file = FileOffset::new(file.try_clone()?, offset_bytes);
            Ok(Self::Shared(SharedMapping { mapping, file }))
        };
        map().map_err(|source| GuestMemoryError::Map { bytes, source })
    }

    /// Maps the first `bytes` of `file`, which may be open read-only, privately: writes stay here.
    pub fn private(file: &File, bytes: u64) -> Result<Self, GuestMemoryError> {
        private_mapping(file, 0, bytes).map(Self::Private)
    }

    /// Maps `bytes` of `file`, which may be open read-only, from `offset_bytes` on, as memory that the
    /// guest can only read. The mapping itself is private: whatever went wrong, the file stays as it is.
    pub fn rom(file: &File, offset_bytes: u64, bytes: u64) -> Result<Self, GuestMemoryError> {
        private_mapping(file, offset_bytes, bytes).map(Self::Rom)
    }

    /// Fresh zeroed memory.
    pub fn anonymous(bytes: u64) -> Result<Self, GuestMemoryError> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        MmapOptions::new()
            .len(length)
            .no_reserve_swap()
            .map_anon()
            .map(|mapping| Self::Anonymous(mapping.into()))
            .map_err(|source| GuestMemoryError::Map { bytes, source })
    }

    /// Lets the kernel merge equal pages of this memory, or leaves it out of core dumps, or brings and
    /// makes writable every page now; the pager must serve already where there is one.
    pub fn advise(&self, advice: MemoryAdvice) -> io::Result<()> {
        let length = usize::try_from(self.bytes()).unwrap_or(usize::MAX);
        let advice = match advice {
            MemoryAdvice::Merge => Advice::LinuxMergeable,
            MemoryAdvice::LeaveOutOfDumps => Advice::LinuxDontDump,
            MemoryAdvice::Populate => Advice::LinuxPopulateWrite,
        };
        // SAFETY: the range is all of this backing's mapping, and none of these changes what the
        // memory holds.
        unsafe { rustix::mm::madvise(self.host_address().cast(), length, advice) }?;
        Ok(())
    }

    /// What a discard makes of this memory, where nobody says more: what is a template's stays.
    pub(crate) fn discards(&self) -> Discards {
        match self {
            Self::Shared(_) | Self::Anonymous(_) => Discards::Allowed,
            Self::Paged(memory) if memory.discards_to_zero() => Discards::Zero,
            Self::Rom(_) | Self::Private(_) | Self::Paged(_) => Discards::Refused,
        }
    }

    /// Gives pages of memory that is nobody's template, or a clone's that may, back to the host: they read as zero. Of a file that
    /// is the memory they become a hole. `offset_bytes` and `bytes` are whole pages inside.
    pub(super) fn discard(&self, offset_bytes: u64, bytes: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let advice = match self {
            Self::Shared(_) => Advice::LinuxRemove,
            Self::Anonymous(_) => Advice::LinuxDontNeed,
            Self::Paged(memory) => {
                let first = PageIndex::containing(ByteOffset::new(offset_bytes));
                let count = PageCount::from_bytes(bytes).ok_or_else(invalid)?;
                return memory.discard_to_zero(PageRange::new(first, count));
            }
            Self::Rom(_) | Self::Private(_) => return Err(invalid()),
        };
        let end = offset_bytes.checked_add(bytes);
        end.filter(|&end| end <= self.bytes()).ok_or_else(invalid)?;
        let offset = usize::try_from(offset_bytes).map_err(|_| invalid())?;
        let length = usize::try_from(bytes).map_err(|_| invalid())?;
        let start = self.host_address().wrapping_add(offset);
        // SAFETY: the range lies in this backing's mapping, as was just checked, and no reference into it
        // exists: all access is by volatile copy, which finds zeros from now on.
        unsafe { rustix::mm::madvise(start.cast(), length, advice) }?;
        Ok(())
    }

    /// The memory that a pager fills, if it is that.
    pub(super) fn served(&mut self) -> Option<&mut CloneMemory> {
        match self {
            Self::Paged(memory) => Some(memory),
            _ => None,
        }
    }

    /// Takes pages from the host now. `offset_bytes` and `bytes` are whole pages.
    fn populate(&self, offset_bytes: u64, bytes: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = offset_bytes.checked_add(bytes);
        end.filter(|&end| end <= self.bytes()).ok_or_else(invalid)?;
        let offset = usize::try_from(offset_bytes).map_err(|_| invalid())?;
        let length = usize::try_from(bytes).map_err(|_| invalid())?;
        let start = self.host_address().wrapping_add(offset);
        // SAFETY: the range lies in this backing's mapping, as was just checked, and stays as it is.
        unsafe { rustix::mm::madvise(start.cast(), length, Advice::LinuxPopulateWrite) }?;
        Ok(())
    }

    /// Whether the guest can only read it.
    pub fn is_rom(&self) -> bool {
        matches!(self, Self::Rom(_))
    }

    fn host_address(&self) -> *mut u8 {
        match self {
            Self::Shared(shared) => shared.mapping.as_mut_ptr(),
            Self::Anonymous(mapping) => mapping.as_mut_ptr(),
            Self::Private(mapping) | Self::Rom(mapping) => mapping.as_ptr().cast_mut(),
            Self::Paged(memory) => memory.host_address(),
        }
    }

    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Shared(shared) => shared.mapping.len() as u64,
            Self::Anonymous(mapping) => mapping.len() as u64,
            Self::Private(mapping) | Self::Rom(mapping) => mapping.len() as u64,
            Self::Paged(memory) => memory.bytes(),
        }
    }

    /// The file that is this memory from `offset_bytes` of it on, where another process can map it.
    fn shared_file(&self, offset_bytes: u64) -> Option<FileOffset> {
        let Self::Shared(shared) = self else {
            return None;
        };
        let start = shared.file.start().checked_add(offset_bytes)?;
        Some(FileOffset::from_arc(Arc::clone(shared.file.arc()), start))
    }
}

/// What the kernel can be told of a backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryAdvice {
    /// Equal pages may become one (KSM).
    Merge,
    /// A core dump does not have it.
    LeaveOutOfDumps,
    /// Every page is there before anybody asks.
    Populate,
}

fn private_mapping(
    file: &File,
    offset_bytes: u64,
    bytes: u64,
) -> Result<MmapMut, GuestMemoryError> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    // SAFETY: the mapping is never turned into a reference: only its address is used, and all access
    // is by volatile copy. A file that changes underneath is a refused template.
    unsafe {
        MmapOptions::new()
            .len(length)
            .offset(offset_bytes)
            .no_reserve_swap()
            .map_copy(file)
    }
    .map_err(|source| GuestMemoryError::Map { bytes, source })
}

/// RAM as it is at one moment. Whoever holds it keeps its memory mapped.
#[derive(Debug)]
pub struct View {
    // Before `backings`: regions are dropped while the memory that they point to is still mapped.
    regions: GuestMemoryMmap<()>,
    slots: Slots,
    layout: RamLayout,
    backings: Vec<Arc<RamBacking>>,
}

impl View {
    /// Joins one backing per backend to the address map. Slots that were there `before` keep their numbers.
    pub(crate) fn new(
        layout: RamLayout,
        backings: Vec<Arc<RamBacking>>,
        before: Option<&Slots>,
    ) -> Result<Self, GuestMemoryError> {
        for (backend, &expected) in layout.backend_bytes().iter().enumerate() {
            let actual = backings.get(backend).map_or(0, |backing| backing.bytes());
            if actual != expected {
                return Err(GuestMemoryError::BackingSize {
                    backend,
                    expected,
                    actual,
                });
            }
        }
        let hosts: Vec<HostMemory> = backings
            .iter()
            .map(|backing| HostMemory {
                address: backing.host_address() as u64,
                is_rom: backing.is_rom(),
            })
            .collect();
        let slots = Slots::new(&layout, &hosts).ok_or(GuestMemoryError::BackingSize {
            backend: backings.len(),
            expected: layout.total_bytes(),
            actual: backings.iter().map(|backing| backing.bytes()).sum(),
        })?;
        let mut regions = Vec::new();
        for segment in layout.segments() {
            regions.push(region(segment, &backings[segment.backend])?);
        }
        let regions =
            GuestMemoryMmap::from_regions(regions).map_err(|e| GuestMemoryError::Place {
                guest_address: 0,
                reason: e.to_string(),
            })?;
        Ok(Self {
            regions,
            slots: match before {
                Some(before) => slots.numbered_after(before),
                None => slots,
            },
            layout,
            backings,
        })
    }

    /// The KVM memory slots of this RAM.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Where the RAM lies in the guest.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The backings, in the machine's order.
    pub fn backings(&self) -> &[Arc<RamBacking>] {
        &self.backings
    }
}

/// One run of guest addresses as `vm-memory` has it.
fn region(
    segment: &RamSegment,
    backing: &RamBacking,
) -> Result<GuestRegionMmap<()>, GuestMemoryError> {
    let place = |reason: String| GuestMemoryError::Place {
        guest_address: segment.guest_address,
        reason,
    };
    let bytes = usize::try_from(segment.bytes).map_err(|e| place(e.to_string()))?;
    let offset = usize::try_from(segment.backend_offset_bytes).map_err(|e| place(e.to_string()))?;
    let base = backing.host_address().wrapping_add(offset);
    let mut builder = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE);
    if let Some(file) = backing.shared_file(segment.backend_offset_bytes) {
        // Nothing is mapped by it: a device in another process is given it.
        builder = builder.with_file_offset(file);
    }
    // SAFETY: `base..base + bytes` lies inside the backing, whose size `View::new` has checked and which
    // the view keeps mapped for longer than its regions live.
    let region = unsafe { builder.with_raw_mmap_pointer(base) }
        .build()
        .map_err(|e| place(e.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(segment.guest_address))
        .ok_or_else(|| place("address overflow".to_owned()))
}

/// A view for code written against `vm-memory` (loaders, virtqueues).
#[derive(Debug, Clone)]
pub struct VmMemory(Arc<View>);

impl Deref for VmMemory {
    type Target = GuestMemoryMmap<()>;

    fn deref(&self) -> &Self::Target {
        &self.0.regions
    }
}

/// All RAM of one machine: the backings, where the guest sees them, and copies in and out.
///
/// Memory modules come and go while others read and write: each access is to the [`View`] of its moment,
/// and memory that went is unmapped when the last view with it is dropped.
#[derive(Debug)]
pub struct GuestRam {
    view: ArcSwap<View>,
    /// What it began with.
    first: Vec<Weak<RamBacking>>,
    gate: DiscardGate,
}

impl GuestRam {
    /// Joins one backing per backend to the address map.
    pub fn new(layout: RamLayout, backings: Vec<RamBacking>) -> Result<Self, GuestMemoryError> {
        let named = (0..)
            .zip(&backings)
            .map(|(number, backing)| BackendDiscards {
                id: format!("number {number}"),
                discards: backing.discards(),
            });
        let gate = DiscardGate::new(named.collect());
        let backings: Vec<_> = backings.into_iter().map(Arc::new).collect();
        Ok(Self {
            first: backings.iter().map(Arc::downgrade).collect(),
            view: ArcSwap::from_pointee(View::new(layout, backings, None)?),
            gate,
        })
    }

    /// The same, with a gate that knows backends by their names and what is to become of discards.
    pub fn with_gate(self, gate: DiscardGate) -> Self {
        Self { gate, ..self }
    }

    /// Who is asked before any of it is discarded.
    pub fn gate(&self) -> &DiscardGate {
        &self.gate
    }

    /// RAM as it is now.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// From now on RAM is this. Those that hold an older view go on with that.
    pub(crate) fn show(&self, view: Arc<View>) {
        self.view.store(view);
    }

    /// Where the RAM lies in the guest now.
    pub fn layout(&self) -> RamLayout {
        self.view.load().layout.clone()
    }

    /// The same RAM for code written against `vm-memory` (loaders, virtqueues).
    pub fn as_vm_memory(&self) -> VmMemory {
        VmMemory(self.view())
    }

    /// Copies `bytes` into RAM; may fault pages in. Read-only memory stays as it is, as for the guest.
    pub fn write(&self, guest_address: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        let view = self.view.load();
        if view.slots.is_rom_at(guest_address) {
            return Ok(());
        }
        view.regions
            .write_slice(bytes, GuestAddress(guest_address))
            .map_err(|source| GuestMemoryError::Access {
                guest_address,
                bytes: bytes.len(),
                source,
            })
    }

    /// Takes memory of one module from the host now.
    pub fn populate(&self, guest_address: u64, bytes: u64) -> io::Result<()> {
        let view = self.view();
        let mut slots = view.slots.iter();
        let found = slots.find(|slot| {
            (slot.guest_address..slot.guest_address + slot.bytes).contains(&guest_address)
        });
        let slot = found.ok_or(io::ErrorKind::InvalidInput)?;
        let backing = view.backings.get(slot.backend);
        let backing = backing.ok_or(io::ErrorKind::InvalidInput)?;
        let first = slot.first_page * PAGE_BYTES;
        backing.populate(first + (guest_address - slot.guest_address), bytes)
    }

    /// Fills `buffer` from RAM; may fault pages in.
    pub fn read(&self, guest_address: u64, buffer: &mut [u8]) -> Result<(), GuestMemoryError> {
        let length = buffer.len();
        self.view
            .load()
            .regions
            .read_slice(buffer, GuestAddress(guest_address))
            .map_err(|source| GuestMemoryError::Access {
                guest_address,
                bytes: length,
                source,
            })
    }
}

mod first;
mod holes;
pub use first::place;
#[cfg(test)]
mod tests;
