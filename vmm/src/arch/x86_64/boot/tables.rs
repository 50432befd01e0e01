#![forbid(unsafe_code)]
//! Page tables and descriptor table of the first instruction.

use crate::arch::x86_64::layout::PAGE_TABLES_ADDRESS;
use crate::arch::x86_64::regs::InitialRegisters;
use crate::memory::guest::{GuestMemoryError, GuestRam};
use crate::memory::layout::PAGE_BYTES;

/// Entries of one table.
const ENTRIES: usize = 512;
/// One page directory maps a GiB; four cover everything that 32 bits reach.
const DIRECTORIES: usize = 4;
/// Present, writable.
const TABLE_FLAGS: u64 = 0b11;
/// Present, writable, a page of 2 MiB.
const LARGE_PAGE_FLAGS: u64 = 0b1000_0011;
/// Large pages are understood by every CPU and emulator, unlike those of 1 GiB.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Maps the first 4 GiB one to one: one page map, one pointer table, four directories.
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let pointers = PAGE_TABLES_ADDRESS + PAGE_BYTES;
    let directories = pointers + PAGE_BYTES;
    let mut entries = table([pointers | TABLE_FLAGS]);
    entries.extend(table(
        (0..)
            .take(DIRECTORIES)
            .map(|number| (directories + number * PAGE_BYTES) | TABLE_FLAGS),
    ));
    entries.extend(
        (0..)
            .take(DIRECTORIES * ENTRIES)
            .map(|number| (number * LARGE_PAGE_BYTES) | LARGE_PAGE_FLAGS),
    );
    ram.write(PAGE_TABLES_ADDRESS, &to_bytes(&entries))
}

/// Writes the descriptors of the segments that `registers` has loaded.
pub(super) fn write_descriptor_table(
    ram: &GuestRam,
    registers: &InitialRegisters,
) -> Result<(), GuestMemoryError> {
    ram.write(
        registers.system.gdt.base,
        &to_bytes(&registers.descriptor_table()),
    )
}

/// One table: the given entries, the rest not present.
fn table(used: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut entries: Vec<u64> = used.into_iter().collect();
    entries.resize(ENTRIES, 0);
    entries
}

fn to_bytes(entries: &[u64]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}
