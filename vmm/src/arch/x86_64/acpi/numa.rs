#![forbid(unsafe_code)]
//! Which CPUs and which memory are of which node (SRAT), and how far nodes are apart (SLIT).
//!
//! `acpi_tables` has the structure for memory and none for local APICs, and its SLIT knows no distance
//! that differs by direction: both tables are put together here.

use std::ops::Range;

use acpi_tables::sdt::Sdt;
use acpi_tables::srat::MemoryAffinity;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, TABLE_HEADER_BYTES, bytes_of};
use crate::memory::layout::RamSegment;
use crate::spec::MachineSpec;

/// SRAT revision of ACPI 6.5: node numbers have 32 bits.
const SRAT_REVISION: u8 = 3;
/// SLIT revision of ACPI 6.5.
const SLIT_REVISION: u8 = 1;
/// Header, then a word that is 1 for ever and two that are 0 (ACPI 6.5, 5.2.16).
const SRAT_HEADER_BYTES: u32 = TABLE_HEADER_BYTES + 12;
/// Processor Local APIC/SAPIC Affinity Structure (ACPI 6.5, 5.2.16.1).
const LOCAL_APIC_AFFINITY: u8 = 0;
/// Its length.
const LOCAL_APIC_AFFINITY_BYTES: u8 = 16;
/// Its flag: it counts.
const ENABLED: u32 = 1;

/// The SRAT of a machine with nodes: every CPU, all RAM, and every module as memory that could have
/// been plugged later. Read-only modules are no memory to allocate from and left out.
pub(super) fn srat(spec: &MachineSpec) -> Vec<u8> {
    let mut srat = table(*b"SRAT", SRAT_HEADER_BYTES, SRAT_REVISION);
    let header = usize::try_from(TABLE_HEADER_BYTES).unwrap_or_default();
    srat.write_u32(header, 1);
    for cpu in 0..spec.cpus().get() {
        srat.append_slice(&local_apic(cpu, spec.numa().node_of(cpu)));
    }
    let layout = spec.layout();
    let memory = |segment: &RamSegment| {
        let node = spec.node_of_backend(segment.backend);
        MemoryAffinity::new(node, segment.guest_address, segment.bytes).enabled()
    };
    for segment in layout.ram_segments() {
        srat.append_slice(&bytes_of(&memory(segment)));
    }
    let is_rom = |segment: &&RamSegment| spec.backends()[segment.backend].is_rom();
    for segment in layout.module_segments().filter(|s| !is_rom(s)) {
        srat.append_slice(&bytes_of(&memory(segment).hotpluggable()));
    }
    // Where modules may come: of the last node, as with QEMU, until one of another node does.
    let last = u32::try_from(spec.numa().nodes().len().saturating_sub(1)).unwrap_or_default();
    for Range { start, end } in free_of_modules(spec) {
        let room = MemoryAffinity::new(last, start, end - start);
        srat.append_slice(&bytes_of(&room.enabled().hotpluggable()));
    }
    srat.as_slice().to_vec()
}

/// What the room for modules has beside those that are there.
fn free_of_modules(spec: &MachineSpec) -> Vec<Range<u64>> {
    let Range { mut start, end } = spec.module_area();
    let mut free = Vec::new();
    for module in spec.layout().module_segments() {
        if start < module.guest_address {
            free.push(start..module.guest_address);
        }
        start = start.max(module.guest_address + module.bytes);
    }
    if start < end {
        free.push(start..end);
    }
    free
}

/// The SLIT: one byte for each pair of nodes, row by row.
pub(super) fn slit(spec: &MachineSpec) -> Vec<u8> {
    let mut slit = table(*b"SLIT", TABLE_HEADER_BYTES, SLIT_REVISION);
    let count = spec.numa().nodes().len();
    slit.append_slice(&(count as u64).to_le_bytes());
    let distances: Vec<u8> = (0..count)
        .flat_map(|from| (0..count).map(move |to| spec.numa().distance(from, to)))
        .collect();
    slit.append_slice(&distances);
    slit.as_slice().to_vec()
}

fn table(signature: [u8; 4], bytes: u32, revision: u8) -> Sdt {
    Sdt::new(
        signature,
        bytes,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    )
}

/// The local APIC id of CPU `n` is `n`; the node's number is cut in two, its low byte first.
fn local_apic(cpu: u8, node: u32) -> Vec<u8> {
    let [low, high @ ..] = node.to_le_bytes();
    let mut bytes = vec![LOCAL_APIC_AFFINITY, LOCAL_APIC_AFFINITY_BYTES, low, cpu];
    bytes.extend(ENABLED.to_le_bytes());
    // No SAPIC, and no clock domain of its own.
    bytes.push(0);
    bytes.extend(high);
    bytes.extend([0; 4]);
    bytes
}
