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
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use pando_pager::{ByteOffset, CloneMemory, PageCount, PageIndex, PageRange};
use rustix::mm::Advice;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::discard::{BackendDiscards, DiscardGate, Discards};
use super::layout::RamLayout;
use super::slots::{HostMemory, Slots};
use crate::observe::memory::ram::MemoryPlace;

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
    fn discards(&self) -> Discards {
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

    fn bytes(&self) -> u64 {
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

/// All RAM of one machine: the backings, where the guest sees them, and copies in and out.
#[derive(Debug)]
pub struct GuestRam {
    // Before `backings`: regions are dropped while the memory that they point to is still mapped.
    regions: GuestMemoryMmap<()>,
    slots: Slots,
    layout: RamLayout,
    backings: Vec<RamBacking>,
    gate: DiscardGate,
}

impl GuestRam {
    /// Joins one backing per backend to the address map.
    pub fn new(layout: RamLayout, backings: Vec<RamBacking>) -> Result<Self, GuestMemoryError> {
        for (backend, &expected) in layout.backend_bytes().iter().enumerate() {
            let actual = backings.get(backend).map_or(0, RamBacking::bytes);
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
            actual: backings.iter().map(RamBacking::bytes).sum(),
        })?;
        let mut regions = Vec::new();
        for segment in layout.segments() {
            let place = |reason: String| GuestMemoryError::Place {
                guest_address: segment.guest_address,
                reason,
            };
            let bytes = usize::try_from(segment.bytes).map_err(|e| place(e.to_string()))?;
            let offset =
                usize::try_from(segment.backend_offset_bytes).map_err(|e| place(e.to_string()))?;
            let base = backings[segment.backend]
                .host_address()
                .wrapping_add(offset);
            let mut builder = MmapRegionBuilder::new(bytes)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_NORESERVE);
            let offset_bytes = segment.backend_offset_bytes;
            if let Some(file) = backings[segment.backend].shared_file(offset_bytes) {
                // Nothing is mapped by it: a device in another process is given it.
                builder = builder.with_file_offset(file);
            }
            // SAFETY: `base..base + bytes` lies inside the backing, whose size was checked above
            // and which `self.backings` keeps mapped for longer than the regions live.
            let region = unsafe { builder.with_raw_mmap_pointer(base) }
                .build()
                .map_err(|e| place(e.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(segment.guest_address))
                .ok_or_else(|| place("address overflow".to_owned()))?;
            regions.push(region);
        }
        let regions =
            GuestMemoryMmap::from_regions(regions).map_err(|e| GuestMemoryError::Place {
                guest_address: 0,
                reason: e.to_string(),
            })?;
        let named = (0..)
            .zip(&backings)
            .map(|(number, backing)| BackendDiscards {
                id: format!("number {number}"),
                discards: backing.discards(),
            });
        Ok(Self {
            regions,
            slots,
            layout,
            gate: DiscardGate::new(named.collect()),
            backings,
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

    /// The KVM memory slots of this RAM.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Where the RAM lies in the guest.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The backings, in the machine's order.
    pub fn backings(&self) -> &[RamBacking] {
        &self.backings
    }

    /// Where each backend lies in this process, in the machine's order.
    pub fn places(&self) -> impl Iterator<Item = MemoryPlace> {
        self.backings.iter().map(|backing| MemoryPlace {
            address: backing.host_address() as u64,
            bytes: backing.bytes(),
        })
    }

    /// The same RAM for code written against `vm-memory` (loaders, virtqueues).
    pub fn as_vm_memory(&self) -> &GuestMemoryMmap<()> {
        &self.regions
    }

    /// Copies `bytes` into RAM; may fault pages in. What goes to read-only memory is lost, as it is for
    /// the guest.
    pub fn write(&self, guest_address: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        if self.slots.is_rom_at(guest_address) {
            return Ok(());
        }
        self.regions
            .write_slice(bytes, GuestAddress(guest_address))
            .map_err(|source| GuestMemoryError::Access {
                guest_address,
                bytes: bytes.len(),
                source,
            })
    }

    /// Fills `buffer` from RAM; may fault pages in.
    pub fn read(&self, guest_address: u64, buffer: &mut [u8]) -> Result<(), GuestMemoryError> {
        let length = buffer.len();
        self.regions
            .read_slice(buffer, GuestAddress(guest_address))
            .map_err(|source| GuestMemoryError::Access {
                guest_address,
                bytes: length,
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_give_back_what_was_written_across_a_backend_boundary() {
        let layout = RamLayout::new(&[1 << 20, 1 << 20]).unwrap();
        let backings = vec![
            RamBacking::anonymous(1 << 20).unwrap(),
            RamBacking::anonymous(1 << 20).unwrap(),
        ];
        let ram = GuestRam::new(layout, backings).unwrap();
        let address = (1 << 20) - 3;
        ram.write(address, b"aspen").unwrap();
        let mut back = [0; 5];
        ram.read(address, &mut back).unwrap();
        assert_eq!(&back, b"aspen");
        let error = ram.write((2 << 20) - 1, b"xy").unwrap_err();
        assert!(error.to_string().contains("outside RAM"), "{error}");
    }

    #[test]
    fn a_private_backing_never_writes_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let read_only = File::open(file.path()).unwrap();
        let backing = RamBacking::private(&read_only, 8192).unwrap();
        let ram = GuestRam::new(RamLayout::new(&[8192]).unwrap(), vec![backing]).unwrap();
        ram.write(4096, b"private").unwrap();
        assert!(
            std::fs::read(file.path())
                .unwrap()
                .iter()
                .all(|&byte| byte == 0)
        );
    }

    #[test]
    fn read_only_memory_is_the_file_and_takes_no_writes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [[7; 4096], [8; 4096]].concat()).unwrap();
        let read_only = File::open(file.path()).unwrap();
        let backing = RamBacking::rom(&read_only, 4096, 4096).unwrap();
        let ram = GuestRam::new(RamLayout::new(&[4096]).unwrap(), vec![backing]).unwrap();
        ram.write(0, b"lost").unwrap();
        let mut back = [0; 4];
        ram.read(0, &mut back).unwrap();
        assert_eq!(back, [8; 4]);
    }

    #[test]
    fn every_advice_is_taken() {
        let backing = RamBacking::anonymous(1 << 20).unwrap();
        for advice in [MemoryAdvice::LeaveOutOfDumps, MemoryAdvice::Populate] {
            backing.advise(advice).unwrap();
        }
        // A kernel without KSM knows no merging.
        if let Err(error) = backing.advise(MemoryAdvice::Merge) {
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn a_backing_of_the_wrong_size_is_refused_by_number() {
        let layout = RamLayout::new(&[8192]).unwrap();
        let error = GuestRam::new(layout, vec![RamBacking::anonymous(4096).unwrap()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "memory backend 0 has 4096 bytes where the machine needs 8192"
        );
    }
}
