#![forbid(unsafe_code)]
//! The map of physical memory that a guest is told (e820, PVH memory map).

use std::ops::Range;

use crate::arch::x86_64::layout::{HIGH_MEMORY_ADDRESS, LOW_RAM_USABLE_END};
use crate::memory::layout::{
    HIGH_RAM_START, KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS, PAGE_BYTES, RamLayout,
};

/// Pages that KVM takes at [`KVM_TSS_ADDRESS`].
const KVM_TSS_PAGES: u64 = 3;

/// What a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// The guest may use it.
    Ram,
    /// The guest keeps off.
    Reserved,
}

impl MapKind {
    /// The number that stands for it, the same in e820 and PVH.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The map of a machine with this memory, lowest address first: conventional memory, what a PC's
/// firmware keeps (the ACPI tables), RAM up to the gap, what is `reserved` in it, KVM's own pages, RAM above 4 GiB, and modules,
/// which are RAM too unless `is_rom` says of their backend that it cannot be written.
#[must_use]
pub fn memory_map(
    layout: &RamLayout,
    is_rom: &dyn Fn(usize) -> bool,
    reserved: &[Range<u64>],
) -> Vec<MapEntry> {
    let low_end = layout.low_ram_end();
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MapEntry {
                start,
                bytes: end - start,
                kind,
            });
        }
    };
    add(0, low_end.min(LOW_RAM_USABLE_END), MapKind::Ram);
    add(LOW_RAM_USABLE_END, HIGH_MEMORY_ADDRESS, MapKind::Reserved);
    add(HIGH_MEMORY_ADDRESS, low_end, MapKind::Ram);
    for range in reserved {
        add(range.start, range.end, MapKind::Reserved);
    }
    add(
        KVM_IDENTITY_MAP_ADDRESS,
        KVM_TSS_ADDRESS + KVM_TSS_PAGES * PAGE_BYTES,
        MapKind::Reserved,
    );
    if let Some(high_end) = layout.high_ram_end() {
        add(HIGH_RAM_START, high_end, MapKind::Ram);
    }
    for module in layout.module_segments() {
        let kind = if is_rom(module.backend) {
            MapKind::Reserved
        } else {
            MapKind::Ram
        };
        let start = module.guest_address;
        add(start, start + module.bytes, kind);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{MMIO_GAP_START, PCI_CONFIG_MEMORY, Placed};
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn ram(map: &[MapEntry]) -> Vec<(u64, u64)> {
        map.iter()
            .filter(|entry| entry.kind == MapKind::Ram)
            .map(|entry| (entry.start, entry.bytes))
            .collect()
    }

    #[test]
    fn small_machines_have_all_ram_but_the_firmware_area() {
        let map = memory_map(&RamLayout::new(&[256 * MIB]).unwrap(), &|_| false, &[]);
        assert_eq!(ram(&map), [(0, 0x9_fc00), (MIB, 255 * MIB)]);
    }

    #[test]
    fn ram_above_the_gap_is_told() {
        let map = memory_map(&RamLayout::new(&[5 << 30]).unwrap(), &|_| false, &[]);
        assert_eq!(
            ram(&map),
            [
                (0, 0x9_fc00),
                (MIB, MMIO_GAP_START - MIB),
                (HIGH_RAM_START, (5 << 30) - MMIO_GAP_START)
            ]
        );
    }

    #[test]
    fn modules_are_ranges_of_their_own() {
        let module = |guest_address| Placed {
            guest_address,
            bytes: MIB,
        };
        let layout = RamLayout::new(&[64 * MIB]).unwrap();
        let layout = layout.with_modules(&[module(4 << 30), module(5 << 30)]);
        let map = memory_map(&layout.unwrap(), &|backend| backend == 2, &[]);
        assert_eq!(ram(&map)[2..], [(4 << 30, MIB)]);
        let last = map.last().unwrap();
        assert_eq!((last.start, last.kind), (5 << 30, MapKind::Reserved));
    }

    #[test]
    fn several_backends_are_one_range() {
        let layout = RamLayout::new(&[64 * MIB, 64 * MIB, 3 << 30, MIB]).unwrap();
        let map = memory_map(&layout, &|_| false, &[PCI_CONFIG_MEMORY]);
        assert_eq!(ram(&map).len(), 3);
    }

    proptest! {
        #[test]
        fn entries_ascend_do_not_overlap_and_never_claim_more_than_there_is(
            pages in proptest::collection::vec(1_u64..3_000_000, 1..5),
        ) {
            let bytes: Vec<u64> = pages.iter().map(|p| p * PAGE_BYTES).collect();
            let layout = RamLayout::new(&bytes).unwrap();
            let map = memory_map(&layout, &|_| false, &[PCI_CONFIG_MEMORY]);
            let mut end = 0;
            for entry in &map {
                prop_assert!(entry.start >= end && entry.bytes > 0);
                end = entry.start + entry.bytes;
            }
            let claimed: u64 = ram(&map).iter().map(|&(_, bytes)| bytes).sum();
            prop_assert!(claimed <= layout.total_bytes());
            prop_assert!(claimed + MIB >= layout.total_bytes());
        }
    }
}
