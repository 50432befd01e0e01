#![forbid(unsafe_code)]
//! Memory modules (`pc-dimm`): which slot, which node, which address.

use std::ops::Range;

use super::MachineSpec;
use super::backend::{BackendKind, BackendSpec};
use super::error::{DimmFault, SpecError};
use super::mem::{MemFault, MemParts};
use super::parts::DimmParts;
use crate::memory::layout::PAGE_BYTES;

/// Memory without a file begins at multiples of a large page.
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// Room behind the modules for what alignment takes, for each slot.
const SLOT_ROOM_BYTES: u64 = 1 << 30;

/// One memory module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dimm {
    pub(super) id: String,
    pub(super) backend: usize,
    pub(super) node: u32,
    pub(super) slot: u32,
    pub(super) guest_address: u64,
    pub(super) bytes: u64,
}

impl Dimm {
    /// What it is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its memory, as a position among the machine's backends.
    pub fn backend(&self) -> usize {
        self.backend
    }

    /// The node that it belongs to.
    pub fn node(&self) -> u32 {
        self.node
    }

    /// Its slot.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Its first guest physical address.
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn end(&self) -> u64 {
        self.guest_address.saturating_add(self.bytes)
    }
}

/// The room that a machine has for modules.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// How many slots.
    pub(super) slots: u32,
    /// Bytes of all modules together.
    pub(super) bytes: u64,
    /// First guest physical address.
    pub(super) start: u64,
    /// How many nodes the machine has.
    pub(super) nodes: usize,
}

impl Room {
    pub(super) fn end(&self) -> u64 {
        let spare = u64::from(self.slots).saturating_mul(SLOT_ROOM_BYTES);
        self.start.saturating_add(self.bytes).saturating_add(spare)
    }

    /// Finds slot and address of the next module. `backend` is its memory and that memory's position.
    pub(super) fn place(
        &self,
        taken: &[Dimm],
        parts: &DimmParts,
        (position, backend): (usize, &BackendSpec),
    ) -> Result<Dimm, SpecError> {
        let fault = |reason| SpecError::Dimm {
            id: parts.id.clone(),
            reason,
        };
        if taken.iter().any(|dimm| dimm.id == parts.id) {
            let id = parts.id.clone();
            return Err(fault(DimmFault::DuplicateId { id }));
        }
        if usize::try_from(parts.node).is_ok_and(|node| node >= self.nodes) {
            return Err(fault(DimmFault::Node {
                node: parts.node,
                nodes: self.nodes,
            }));
        }
        let slot = self.slot(taken, parts.slot).map_err(fault)?;
        let bytes = backend.bytes();
        let used_bytes: u64 = taken.iter().map(Dimm::bytes).sum();
        if used_bytes.saturating_add(bytes) > self.bytes {
            return Err(fault(DimmFault::NoSpace {
                used_bytes,
                room_bytes: self.bytes,
            }));
        }
        let guest_address = self
            .address(taken, parts.guest_address, bytes, align_bytes(backend))
            .map_err(fault)?;
        Ok(Dimm {
            id: parts.id.clone(),
            backend: position,
            node: parts.node,
            slot,
            guest_address,
            bytes,
        })
    }

    /// Finds the places of all modules, and of all memory that grows and shrinks: what has a place of its own
    /// comes first. `modules` are their backends, the first of which is backend `first`.
    pub(super) fn place_all(
        &self,
        first: usize,
        parts: &[DimmParts],
        mems: &mut [(String, MemParts)],
        modules: &[BackendSpec],
    ) -> Result<(Vec<Dimm>, Vec<Dimm>), SpecError> {
        let backends = || (first..).zip(modules);
        let mut regions: Vec<Option<Dimm>> = vec![None; mems.len()];
        let place = |regions: &mut [Option<Dimm>],
                     mems: &mut [(String, MemParts)],
                     dimms: &[Dimm],
                     of_asked: bool| {
            for (at, (id, mem)) in mems.iter_mut().enumerate() {
                if regions[at].is_some() || mem.guest_address.is_some() != of_asked {
                    continue;
                }
                let Some(backend) = backends().nth(parts.len() + at) else {
                    continue;
                };
                let all: Vec<Dimm> = dimms
                    .iter()
                    .chain(regions.iter().flatten())
                    .cloned()
                    .collect();
                let region = self.place_memory(&all, id, mem, backend)?;
                mem.guest_address = Some(region.guest_address);
                regions[at] = Some(region);
            }
            Ok::<_, SpecError>(())
        };
        place(&mut regions, mems, &[], true)?;
        let mut dimms: Vec<Dimm> = Vec::new();
        for (part, module) in parts.iter().zip(backends()) {
            let all: Vec<Dimm> = dimms
                .iter()
                .chain(regions.iter().flatten())
                .cloned()
                .collect();
            dimms.push(self.place(&all, part, module)?);
        }
        place(&mut regions, mems, &dimms, false)?;
        Ok((dimms, regions.into_iter().flatten().collect()))
    }

    /// Finds the address of memory that grows and shrinks.
    fn place_memory(
        &self,
        taken: &[Dimm],
        id: &str,
        mem: &mut MemParts,
        (position, backend): (usize, &BackendSpec),
    ) -> Result<Dimm, SpecError> {
        let fault = |fault| SpecError::of_memory(id, fault);
        if self.bytes == 0 {
            return Err(fault(MemFault::NoRoom));
        }
        mem.check(backend, self.nodes).map_err(fault)?;
        let bytes = backend.bytes();
        let used_bytes: u64 = taken.iter().map(Dimm::bytes).sum();
        let place = |reason| SpecError::Dimm {
            id: id.to_owned(),
            reason,
        };
        if used_bytes.saturating_add(bytes) > self.bytes {
            return Err(place(DimmFault::NoSpace {
                used_bytes,
                room_bytes: self.bytes,
            }));
        }
        let align_bytes = mem.block().max(backend.align_bytes());
        let guest_address = self
            .address(taken, mem.guest_address, bytes, align_bytes)
            .map_err(place)?;
        Ok(Dimm {
            id: id.to_owned(),
            backend: position,
            node: mem.node,
            // It has none.
            slot: u32::MAX,
            guest_address,
            bytes,
        })
    }

    fn slot(&self, taken: &[Dimm], asked: Option<u32>) -> Result<u32, DimmFault> {
        let is_free = |slot: u32| !taken.iter().any(|dimm| dimm.slot == slot);
        let last = self.slots.checked_sub(1).ok_or(DimmFault::NoSlots)?;
        match asked {
            Some(slot) if slot > last => Err(DimmFault::SlotRange { slot, last }),
            Some(slot) if !is_free(slot) => Err(DimmFault::SlotBusy { slot }),
            Some(slot) => Ok(slot),
            None => (0..self.slots)
                .find(|&slot| is_free(slot))
                .ok_or(DimmFault::NoFreeSlot),
        }
    }

    fn address(
        &self,
        taken: &[Dimm],
        asked: Option<u64>,
        bytes: u64,
        align_bytes: u64,
    ) -> Result<u64, DimmFault> {
        let conflict = |address: u64| {
            taken
                .iter()
                .find(|dimm| address < dimm.end() && dimm.guest_address < address + bytes)
        };
        let fits = |address: u64| {
            let end = address.checked_add(bytes);
            address >= self.start && end.is_some_and(|end| end <= self.end())
        };
        if !bytes.is_multiple_of(align_bytes) {
            return Err(DimmFault::Size { bytes, align_bytes });
        }
        if let Some(address) = asked {
            if address % align_bytes != 0 {
                return Err(DimmFault::Unaligned {
                    address,
                    align_bytes,
                });
            }
            if !fits(address) {
                return Err(DimmFault::OutsideRange {
                    address,
                    bytes,
                    start: self.start,
                    room_bytes: self.end() - self.start,
                });
            }
            return match conflict(address) {
                Some(other) => Err(DimmFault::Conflict {
                    other: other.id.clone(),
                }),
                None => Ok(address),
            };
        }
        // The start, or the end of another module: the first gap begins at one of them.
        let mut starts: Vec<u64> = taken.iter().map(Dimm::end).chain([self.start]).collect();
        starts.sort_unstable();
        starts
            .into_iter()
            .filter_map(|start| start.checked_next_multiple_of(align_bytes))
            .find(|&start| fits(start) && conflict(start).is_none())
            .ok_or(DimmFault::NoSpace {
                used_bytes: taken.iter().map(Dimm::bytes).sum(),
                room_bytes: self.bytes,
            })
    }
}

impl MachineSpec {
    /// Where modules may be; empty where there is no room for any.
    pub fn module_area(&self) -> Range<u64> {
        let bytes = self.max_bytes - self.ram_bytes();
        let start = self.layout.module_area_start();
        if bytes == 0 {
            return start..start;
        }
        let room = Room {
            slots: self.slots,
            bytes,
            start,
            nodes: self.numa.nodes().len(),
        };
        start..room.end()
    }

    /// The same machine with one module more, on a backend of its own.
    pub fn with_dimm(&self, backend: BackendSpec, dimm: DimmParts) -> Result<Self, SpecError> {
        let mut parts = self.to_parts();
        parts.backends.push(backend);
        parts.dimms.push(dimm);
        Self::from_parts(parts)
    }

    /// The same machine without a module and its backend.
    #[must_use]
    pub fn without_dimm(&self, id: &str) -> Self {
        let mut spec = self.clone();
        let Some(at) = spec.dimms.iter().position(|dimm| dimm.id == id) else {
            return spec;
        };
        let gone = spec.dimms.remove(at).backend;
        spec.without_module(gone)
    }

    /// The same machine without a backend behind its RAM.
    pub(super) fn without_module(mut self, gone: usize) -> Self {
        self.backends.remove(gone);
        self.layout = self.layout.without_module(gone);
        for dimm in &mut self.dimms {
            dimm.backend -= usize::from(dimm.backend > gone);
        }
        self
    }
}

/// What a module's address must be a multiple of.
fn align_bytes(backend: &BackendSpec) -> u64 {
    let own = match backend.kind() {
        BackendKind::Ram => LARGE_PAGE_BYTES,
        BackendKind::Memfd | BackendKind::File => PAGE_BYTES,
    };
    own.max(backend.align_bytes())
}
