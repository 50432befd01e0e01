#![forbid(unsafe_code)]
//! Where guest addresses and pages of an image meet: one KVM memory slot per RAM segment.
//!
//! The pager speaks pages of an image, the rest of the VMM speaks guest addresses; nothing but
//! this file converts between the two.

use super::layout::{PAGE_BYTES, RamLayout};

/// One KVM memory slot: a run of guest addresses, the host memory behind it, and the pages of the
/// backend's image that it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// KVM's slot number.
    pub number: u32,
    /// First guest physical address.
    pub guest_address: u64,
    /// First address in this process.
    pub host_address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Which backend, in the machine's order.
    pub backend: usize,
    /// First page of that backend's image.
    pub first_page: u64,
    /// Whether the guest can only read it.
    pub is_rom: bool,
}

/// The memory of one backend in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// First address.
    pub address: u64,
    /// Whether the guest can only read it.
    pub is_rom: bool,
}

/// All slots of a machine, in ascending guest address order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    slots: Vec<Slot>,
}

impl Slots {
    /// Pairs each segment of `layout` with host memory; `hosts` has each backend, in the machine's
    /// order.
    ///
    /// Returns `None` when a backend has no host address or there are more segments than slots.
    pub fn new(layout: &RamLayout, hosts: &[HostMemory]) -> Option<Self> {
        let slots = layout
            .segments()
            .iter()
            .enumerate()
            .map(|(number, segment)| {
                let host = hosts.get(segment.backend)?;
                Some(Slot {
                    number: u32::try_from(number).ok()?,
                    guest_address: segment.guest_address,
                    host_address: host.address.checked_add(segment.backend_offset_bytes)?,
                    is_rom: host.is_rom,
                    bytes: segment.bytes,
                    backend: segment.backend,
                    first_page: segment.backend_offset_bytes / PAGE_BYTES,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        Some(Self { slots })
    }

    /// The same slots, where each that was there `before` keeps its number and any other takes the least
    /// that is free.
    #[must_use]
    pub fn numbered_after(mut self, before: &Self) -> Self {
        let place = |slot: &Slot| (slot.guest_address, slot.host_address, slot.bytes);
        let old = |slot: &Slot| {
            let mut all = before.slots.iter();
            all.find(|other| place(other) == place(slot))
                .map(|other| other.number)
        };
        let mut taken: Vec<u32> = before.slots.iter().map(|slot| slot.number).collect();
        for slot in &mut self.slots {
            slot.number = old(slot).unwrap_or_else(|| {
                let free = (0..u32::MAX).find(|number| !taken.contains(number));
                let number = free.unwrap_or(u32::MAX);
                taken.push(number);
                number
            });
        }
        self
    }

    /// The slots of one backend.
    pub fn of_backend(&self, backend: usize) -> impl Iterator<Item = &Slot> {
        self.slots
            .iter()
            .filter(move |slot| slot.backend == backend)
    }

    /// All slots, lowest guest address first.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    /// The backend and the page of its image that a guest address shows; `None` outside RAM.
    pub fn page_at(&self, guest_address: u64) -> Option<(usize, u64)> {
        self.slots
            .iter()
            .find(|slot| {
                (slot.guest_address..slot.guest_address + slot.bytes).contains(&guest_address)
            })
            .map(|slot| {
                (
                    slot.backend,
                    slot.first_page + (guest_address - slot.guest_address) / PAGE_BYTES,
                )
            })
    }

    /// Whether a guest address is of memory that the guest can only read.
    pub fn is_rom_at(&self, guest_address: u64) -> bool {
        self.slots.iter().any(|slot| {
            slot.is_rom
                && (slot.guest_address..slot.guest_address + slot.bytes).contains(&guest_address)
        })
    }

    /// The guest address at which a page of a backend's image is seen; `None` past its end.
    pub fn guest_address_of(&self, backend: usize, page: u64) -> Option<u64> {
        self.slots
            .iter()
            .find(|slot| {
                slot.backend == backend
                    && (slot.first_page..slot.first_page + slot.bytes / PAGE_BYTES).contains(&page)
            })
            .map(|slot| slot.guest_address + (page - slot.first_page) * PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{HIGH_RAM_START, Placed};

    fn host(address: u64) -> HostMemory {
        HostMemory {
            address,
            is_rom: false,
        }
    }

    #[test]
    fn pages_and_addresses_convert_both_ways_around_the_gap() {
        let layout = RamLayout::new(&[5 << 30]).unwrap();
        let slots = Slots::new(&layout, &[host(0x7f00_0000_0000)]).unwrap();
        let above_gap = HIGH_RAM_START + 3 * PAGE_BYTES + 5;
        let (backend, page) = slots.page_at(above_gap).unwrap();
        assert_eq!((backend, page), (0, (3 << 30) / PAGE_BYTES + 3));
        assert_eq!(slots.guest_address_of(0, page), Some(above_gap - 5));
        assert_eq!(slots.page_at(0xd000_0000), None, "the gap is not RAM");
        assert_eq!(slots.guest_address_of(0, (5 << 30) / PAGE_BYTES), None);
        assert_eq!(slots.guest_address_of(1, 0), None);
    }

    #[test]
    fn a_backend_without_memory_gives_no_slots() {
        let layout = RamLayout::new(&[1 << 20, 1 << 20]).unwrap();
        assert_eq!(Slots::new(&layout, &[host(0x1000)]), None);
    }

    #[test]
    fn slots_that_stay_keep_their_numbers() {
        let at = |guest_address| Placed {
            guest_address,
            bytes: PAGE_BYTES,
        };
        let ram = RamLayout::new(&[1 << 20]).unwrap();
        let both = [at(HIGH_RAM_START), at(HIGH_RAM_START + (1 << 30))];
        let hosts = [host(0x10_0000), host(0x20_0000), host(0x30_0000)];
        let full = ram.clone().with_modules(&both).unwrap();
        let full = Slots::new(&full, &hosts).unwrap();
        let numbers = |slots: &Slots| slots.iter().map(|slot| slot.number).collect::<Vec<_>>();
        assert_eq!(numbers(&full), [0, 1, 2]);
        let later = ram.clone().with_modules(&both[1..]).unwrap();
        let later = Slots::new(&later, &[hosts[0], hosts[2]]).unwrap();
        let later = later.numbered_after(&full);
        assert_eq!(numbers(&later), [0, 2], "the first module went");
        let again = ram.with_modules(&both).unwrap();
        let again = Slots::new(&again, &[hosts[0], host(0x40_0000), hosts[2]]).unwrap();
        assert_eq!(numbers(&again.numbered_after(&later)), [0, 1, 2]);
    }

    #[test]
    fn read_only_memory_is_known_by_its_addresses() {
        let module = Placed {
            guest_address: HIGH_RAM_START,
            bytes: PAGE_BYTES,
        };
        let layout = RamLayout::new(&[1 << 20]).unwrap();
        let layout = layout.with_modules(&[module]).unwrap();
        let rom = HostMemory {
            address: 0x20_0000,
            is_rom: true,
        };
        let slots = Slots::new(&layout, &[host(0x10_0000), rom]).unwrap();
        assert!(slots.is_rom_at(HIGH_RAM_START + 4095));
        assert!(!slots.is_rom_at(0) && !slots.is_rom_at(HIGH_RAM_START + 4096));
        assert_eq!(slots.page_at(HIGH_RAM_START), Some((1, 0)));
    }
}
