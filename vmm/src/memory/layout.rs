#![forbid(unsafe_code)]
//! The guest physical address map: RAM below and above the MMIO gap, and what lies in the gap.

use std::ops::Range;

use thiserror::Error;

/// RAM below 4 GiB ends here at the latest; the gap up to 4 GiB belongs to devices.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// Where functions of the PCI bus have their memory: the first part of the gap. Wide enough for 32
/// functions of 16 MiB, and below 4 GiB, so that a guest of few address bits finds it too.
pub const PCI_WINDOW: Range<u64> = MMIO_GAP_START..0xe000_0000;
/// Registers of the functions of PCI bus 0, 4 KiB each (ECAM).
pub const PCI_CONFIG_MEMORY: Range<u64> = 0xe000_0000..0xe010_0000;
/// RAM that does not fit below [`MMIO_GAP_START`] continues here.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// Base of the in-kernel I/O APIC (fixed by KVM).
pub const IO_APIC_BASE: u64 = 0xfec0_0000;
/// Base of the in-kernel local APICs (fixed by the architecture).
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel for real mode (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS_ADDRESS: u64 = 0xfffb_d000;
/// One page that KVM needs on Intel for real mode (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Memory modules begin at the first multiple of this behind RAM.
const MODULE_AREA_ALIGN_BYTES: u64 = 1 << 30;
/// Size of a guest page in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Why backends cannot be placed in the guest.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// A machine has at least one backend.
    #[error("the machine has no memory backend: give it at least one")]
    NoBackend,
    /// A backend of no or of partial pages.
    #[error(
        "memory backend {backend} is {bytes} bytes: sizes must be a positive multiple of {PAGE_BYTES}"
    )]
    BadSize {
        /// Position of the backend in the machine.
        backend: usize,
        /// Its size.
        bytes: u64,
    },
    /// The sum of all backends does not fit into 64 bits.
    #[error("memory backends add up to more than 2^64 bytes")]
    TooLarge,
    /// A module at an address of other memory, or of none.
    #[error("memory module at {guest_address:#x} lies in other memory or outside 2^64 bytes")]
    Module {
        /// Where it was to be.
        guest_address: u64,
    },
}

/// Where a memory module is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// First guest physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A run of guest physical addresses that one backend provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSegment {
    /// First guest physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Which backend, in the machine's order.
    pub backend: usize,
    /// Where the segment begins inside that backend, in bytes.
    pub backend_offset_bytes: u64,
}

/// Where all RAM lies; segments are in ascending guest address order and never overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    segments: Vec<RamSegment>,
    backends: Vec<u64>,
    /// How many of the last backends are modules.
    modules: usize,
}

impl RamLayout {
    /// Places backends of the given sizes one after the other, the first at address 0, leaving out
    /// the MMIO gap.
    pub fn new(backend_bytes: &[u64]) -> Result<Self, LayoutError> {
        if backend_bytes.is_empty() {
            return Err(LayoutError::NoBackend);
        }
        let mut segments = Vec::new();
        let mut next = 0_u64;
        for (backend, &bytes) in backend_bytes.iter().enumerate() {
            if bytes == 0 || bytes % PAGE_BYTES != 0 {
                return Err(LayoutError::BadSize { backend, bytes });
            }
            let mut placed = 0;
            while placed < bytes {
                if next == MMIO_GAP_START {
                    next = HIGH_RAM_START;
                }
                let room = if next < MMIO_GAP_START {
                    MMIO_GAP_START - next
                } else {
                    u64::MAX - next
                };
                let length = (bytes - placed).min(room);
                if length == 0 {
                    return Err(LayoutError::TooLarge);
                }
                segments.push(RamSegment {
                    guest_address: next,
                    bytes: length,
                    backend,
                    backend_offset_bytes: placed,
                });
                next += length;
                placed += length;
            }
        }
        Ok(Self {
            segments,
            backends: backend_bytes.to_vec(),
            modules: 0,
        })
    }

    /// Adds memory modules, each of them a backend behind those that there are.
    pub fn with_modules(mut self, modules: &[Placed]) -> Result<Self, LayoutError> {
        for &Placed {
            guest_address,
            bytes,
        } in modules
        {
            let backend = self.backends.len();
            if bytes == 0 || bytes % PAGE_BYTES != 0 {
                return Err(LayoutError::BadSize { backend, bytes });
            }
            let fault = LayoutError::Module { guest_address };
            let Some(end) = guest_address.checked_add(bytes) else {
                return Err(fault);
            };
            let meets = |other: &RamSegment| {
                guest_address < other.guest_address + other.bytes && other.guest_address < end
            };
            if guest_address < HIGH_RAM_START
                || guest_address % PAGE_BYTES != 0
                || self.segments.iter().any(meets)
            {
                return Err(fault);
            }
            self.segments.push(RamSegment {
                guest_address,
                bytes,
                backend,
                backend_offset_bytes: 0,
            });
            self.backends.push(bytes);
            self.modules += 1;
        }
        self.segments.sort_by_key(|segment| segment.guest_address);
        Ok(self)
    }

    /// The same with one module more, which becomes backend `position`: those from there on are counted one
    /// higher. It is behind all RAM.
    pub fn with_module(mut self, position: usize, module: Placed) -> Result<Self, LayoutError> {
        let last = self.backends.len();
        let first = last - self.modules;
        self = self.with_modules(&[module])?;
        let position = position.clamp(first, last);
        for segment in &mut self.segments {
            segment.backend = match segment.backend {
                backend if backend == last => position,
                backend if backend >= position => backend + 1,
                backend => backend,
            };
        }
        self.backends.insert(position, module.bytes);
        self.backends.truncate(last + 1);
        Ok(self)
    }

    /// The same without the module that is backend `position`; those behind it are counted one lower. RAM
    /// stays.
    #[must_use]
    pub fn without_module(mut self, position: usize) -> Self {
        let last = self.backends.len();
        if !(last - self.modules..last).contains(&position) {
            return self;
        }
        self.segments.retain(|segment| segment.backend != position);
        for segment in &mut self.segments {
            segment.backend -= usize::from(segment.backend > position);
        }
        self.backends.remove(position);
        self.modules -= 1;
        self
    }

    /// Where memory modules may begin: behind all RAM, above 4 GiB.
    pub fn module_area_start(&self) -> u64 {
        let end = self.ram_segments().map(|s| s.guest_address + s.bytes).max();
        let end = end.unwrap_or(0).max(HIGH_RAM_START);
        end.checked_next_multiple_of(MODULE_AREA_ALIGN_BYTES)
            .unwrap_or(u64::MAX)
    }

    /// Segments of RAM without modules, lowest guest address first.
    pub fn ram_segments(&self) -> impl Iterator<Item = &RamSegment> {
        let modules = self.backends.len() - self.modules;
        let is_ram = move |segment: &&RamSegment| segment.backend < modules;
        self.segments.iter().filter(is_ram)
    }

    /// Segments of memory modules, lowest guest address first.
    pub fn module_segments(&self) -> impl Iterator<Item = &RamSegment> {
        let modules = self.backends.len() - self.modules;
        let is_module = move |segment: &&RamSegment| segment.backend >= modules;
        self.segments.iter().filter(is_module)
    }

    /// All segments, lowest guest address first.
    pub fn segments(&self) -> &[RamSegment] {
        &self.segments
    }

    /// Size of each backend in bytes, in the machine's order.
    pub fn backend_bytes(&self) -> &[u64] {
        &self.backends
    }

    /// Where the guest sees the byte at this offset of a backend.
    pub fn guest_address(&self, backend: usize, offset_bytes: u64) -> Option<u64> {
        self.segments
            .iter()
            .filter(|segment| segment.backend == backend)
            .find_map(|segment| {
                let within = offset_bytes.checked_sub(segment.backend_offset_bytes)?;
                (within < segment.bytes).then(|| segment.guest_address + within)
            })
    }

    /// All RAM in bytes, modules included.
    pub fn total_bytes(&self) -> u64 {
        self.backends.iter().sum()
    }

    /// First address behind the RAM below the gap.
    pub fn low_ram_end(&self) -> u64 {
        self.segments
            .iter()
            .filter(|segment| segment.guest_address < MMIO_GAP_START)
            .map(|segment| segment.guest_address + segment.bytes)
            .max()
            .unwrap_or(0)
    }

    /// First address behind the RAM above the gap, if there is any; modules do not count.
    pub fn high_ram_end(&self) -> Option<u64> {
        self.ram_segments()
            .filter(|segment| segment.guest_address >= HIGH_RAM_START)
            .map(|segment| segment.guest_address + segment.bytes)
            .max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn small_ram_is_one_segment_at_zero() {
        let layout = RamLayout::new(&[64 << 20]).unwrap();
        assert_eq!(layout.segments().len(), 1);
        assert_eq!(layout.low_ram_end(), 64 << 20);
        assert_eq!(layout.high_ram_end(), None);
    }

    #[test]
    fn five_gib_are_split_around_the_gap() {
        let layout = RamLayout::new(&[5 * GIB]).unwrap();
        let [low, high] = layout.segments() else {
            panic!("two segments")
        };
        assert_eq!((low.guest_address, low.bytes), (0, MMIO_GAP_START));
        assert_eq!(
            (high.guest_address, high.bytes),
            (HIGH_RAM_START, 5 * GIB - MMIO_GAP_START)
        );
        assert_eq!(high.backend_offset_bytes, MMIO_GAP_START);
    }

    #[test]
    fn sizes_that_are_no_pages_are_refused() {
        assert_eq!(RamLayout::new(&[]), Err(LayoutError::NoBackend));
        assert_eq!(
            RamLayout::new(&[GIB, 4097]),
            Err(LayoutError::BadSize {
                backend: 1,
                bytes: 4097
            })
        );
        assert_eq!(
            RamLayout::new(&[0]),
            Err(LayoutError::BadSize {
                backend: 0,
                bytes: 0
            })
        );
    }

    #[test]
    fn modules_lie_behind_ram_and_never_in_it() {
        let layout = RamLayout::new(&[5 * GIB]).unwrap();
        assert_eq!(layout.module_area_start(), 6 * GIB);
        assert_eq!(layout.high_ram_end(), Some(6 * GIB));
        let small = RamLayout::new(&[64 << 20]).unwrap();
        assert_eq!(small.module_area_start(), 4 * GIB);
        let at = |guest_address, bytes| Placed {
            guest_address,
            bytes,
        };
        let both = [at(7 * GIB, GIB), at(4 * GIB, GIB)];
        let layout = small.clone().with_modules(&both).unwrap();
        assert_eq!(layout.backend_bytes(), [64 << 20, GIB, GIB]);
        let addresses: Vec<u64> = layout.segments().iter().map(|s| s.guest_address).collect();
        assert_eq!(addresses, [0, 4 * GIB, 7 * GIB]);
        assert_eq!(layout.ram_segments().count(), 1);
        assert_eq!(layout.module_segments().count(), 2);
        assert_eq!(layout.high_ram_end(), None);
        assert_eq!(layout.guest_address(2, 4096), Some(4 * GIB + 4096));
        for wrong in [
            [at(4 * GIB, GIB), at(5 * GIB - 4096, 8192)],
            [at(0, 4096), at(4 * GIB, 4096)],
            [at(4 * GIB, 4096), at(u64::MAX - 4095, 8192)],
        ] {
            assert!(small.clone().with_modules(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn modules_come_and_go_in_any_order() {
        let at = |gib, bytes| Placed {
            guest_address: gib * GIB,
            bytes,
        };
        let ram = RamLayout::new(&[64 << 20, 64 << 20]).unwrap();
        let (a, b, c) = (at(5, 4096), at(4, 8192), at(6, 12288));
        let all = ram.clone().with_modules(&[a, b, c]).unwrap();
        let two = ram.clone().with_modules(&[a, c]).unwrap();
        assert_eq!(two.clone().with_module(3, b).unwrap(), all);
        assert_eq!(all.clone().without_module(3), two);
        assert_eq!(two.clone().without_module(2).without_module(2), ram);
        assert_eq!(two.clone().without_module(1), two, "RAM stays");
        two.with_module(3, a).unwrap_err();
    }

    proptest! {
        #[test]
        fn every_byte_is_placed_once_and_outside_the_gap(
            pages in proptest::collection::vec(1_u64..3_000_000, 1..5),
        ) {
            let bytes: Vec<u64> = pages.iter().map(|p| p * PAGE_BYTES).collect();
            let layout = RamLayout::new(&bytes).unwrap();
            let mut end = 0;
            let mut placed = vec![0; bytes.len()];
            for s in layout.segments() {
                prop_assert!(s.guest_address >= end);
                end = s.guest_address + s.bytes;
                prop_assert!(end <= MMIO_GAP_START || s.guest_address >= HIGH_RAM_START);
                prop_assert_eq!(placed[s.backend], s.backend_offset_bytes);
                placed[s.backend] += s.bytes;
            }
            prop_assert_eq!(placed, bytes);
        }
    }
}
