#![forbid(unsafe_code)]
//! The parts of the image that are data: descriptor tables, page tables, the command table.
//!
//! Accessed and dirty bits are set beforehand, so that no processor writes to these pages.

use super::code::Program;
use super::layout::{
    CODE, CODE_END, COMMAND_TABLE, GDT, GDT_POINTER, HEX_DIGITS, IDT, IDT_POINTER, IDT_VECTORS,
    MAPPED_GIB, PAGE_TABLES, offset,
};
use crate::memory::layout::PAGE_BYTES;

/// Selector of the code segment in our GDT.
const CODE_SELECTOR: u64 = 8;
/// Present, writable, accessed, dirty.
const TABLE_ENTRY: u64 = 0x63;
/// The same, and a 2 MiB page.
const LARGE_PAGE: u64 = TABLE_ENTRY | 0x80;
/// Entries of one page table.
const ENTRIES: u64 = 512;

/// Fills `segment`, which begins at [`BASE`](super::layout::BASE).
pub(super) fn write(segment: &mut [u8], program: &Program) {
    let mut image = Image(segment);
    image.bytes(CODE, &program.code, CODE_END);
    image.bytes(HEX_DIGITS, b"0123456789abcdef", CODE);
    image.descriptors(program);
    for (letter, command) in program.commands.iter().enumerate() {
        if let Some(command) = command {
            let word = command.address | u64::from(command.parameters) << 32;
            image.word(COMMAND_TABLE + letter as u64 * 8, word);
        }
    }
    image.page_tables();
}

struct Image<'a>(&'a mut [u8]);

impl Image<'_> {
    fn bytes(&mut self, address: u64, bytes: &[u8], end: u64) {
        assert!(
            address + bytes.len() as u64 <= end,
            "{} bytes at {address:#x} reach past {end:#x}",
            bytes.len()
        );
        let offset = offset(address);
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, address: u64, word: u64) {
        self.bytes(address, &word.to_le_bytes(), address + 8);
    }

    /// GDT and IDT, and the pointers that `lgdt` and `lidt` load (SDM volume 3, 3.5.1 and 6.14.1).
    fn descriptors(&mut self, program: &Program) {
        self.word(GDT + 8, 0x00af_9b00_0000_ffff);
        self.word(GDT + 16, 0x00cf_9300_0000_ffff);
        for (pointer, base, bytes) in [(GDT_POINTER, GDT, 24), (IDT_POINTER, IDT, IDT_VECTORS * 16)]
        {
            self.word(pointer, (bytes - 1) | base << 16);
            self.word(pointer + 8, base >> 48);
        }
        let handlers = program
            .exceptions
            .iter()
            .chain(std::iter::repeat(&program.interrupt));
        for (vector, &handler) in (0..IDT_VECTORS).zip(handlers) {
            // Present 64-bit interrupt gate: the handler starts with interrupts off.
            let gate = handler & 0xffff
                | CODE_SELECTOR << 16
                | 0x8e00 << 32
                | (handler >> 16 & 0xffff) << 48;
            self.word(IDT + vector * 16, gate);
            self.word(IDT + vector * 16 + 8, handler >> 32);
        }
    }

    /// An identity map of the first [`MAPPED_GIB`] GiB in 2 MiB pages.
    fn page_tables(&mut self) {
        let pointers = PAGE_TABLES + PAGE_BYTES;
        self.word(PAGE_TABLES, pointers | TABLE_ENTRY);
        for gib in 0..MAPPED_GIB {
            let directory = pointers + (1 + gib) * PAGE_BYTES;
            self.word(pointers + gib * 8, directory | TABLE_ENTRY);
            for entry in 0..ENTRIES {
                let address = (gib * ENTRIES + entry) << 21;
                self.word(directory + entry * 8, address | LARGE_PAGE);
            }
        }
    }
}
