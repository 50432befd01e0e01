#![forbid(unsafe_code)]
//! From the entry to the ready line.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::layout::{
    GDT_POINTER, HIGH_RAM_END, IDT_POINTER, LAYOUT, LOW_RAM_END, PAGE_TABLES, STACK_TOP,
};
use super::super::protocol::{COM1_PORT, READY_LINE};
use super::{Shared, immediate, line};
use crate::memory::layout::{HIGH_RAM_START, MMIO_GAP_START, PAGE_BYTES};

/// Offsets in `boot_params` (Linux, Documentation/arch/x86/zero-page.rst).
const E820_COUNT: i32 = 0x1e8;
const HEADER_MAGIC: i32 = 0x202;
const E820_TABLE: i32 = 0x2d0;
/// Bytes of one memory map entry: address, length, kind.
const E820_ENTRY: i32 = 20;
/// Kind of an entry that is RAM.
const E820_RAM: i32 = 1;
/// "HdrS" where `boot_params` has a set-up header.
const MAGIC: u32 = 0x5372_6448;

/// Port writes that make the interrupt controllers deliver IRQ 4 as vector 0x24 and nothing else,
/// without acknowledgement (8259A datasheet: ICW1 to ICW4 with automatic EOI, then the masks).
const PIC_SET_UP: [(u16, u8); 10] = [
    (0x20, 0x11),
    (0xa0, 0x11),
    (0x21, 0x20),
    (0xa1, 0x28),
    (0x21, 0x04),
    (0xa1, 0x02),
    (0x21, 0x03),
    (0xa1, 0x03),
    (0x21, !(1 << 4)),
    (0xa1, 0xff),
];
/// Register writes that make COM1 raise IRQ 4 for input (16550 datasheet: LCR 8 bits, FIFO on and
/// cleared, modem control with OUT2 that lets the interrupt through, interrupt on data).
const COM1_SET_UP: [(u16, u8); 4] = [(3, 0x03), (2, 0x07), (4, 0x0b), (1, 0x01)];

pub(super) fn emit(a: &mut CodeAssembler, shared: &mut Shared) -> Result<(), IcedError> {
    a.cli()?;
    a.cld()?;
    a.mov(esp, immediate(STACK_TOP))?;
    memory_map(a)?;
    a.lgdt(xmmword_ptr(GDT_POINTER))?;
    a.lidt(xmmword_ptr(IDT_POINTER))?;
    a.mov(eax, immediate(PAGE_TABLES))?;
    a.mov(cr3, rax)?;
    for (port, value) in PIC_SET_UP {
        a.mov(eax, u32::from(value))?;
        a.out(u32::from(port), al)?;
    }
    for (register, value) in COM1_SET_UP {
        a.mov(edx, u32::from(COM1_PORT + register))?;
        a.mov(eax, u32::from(value))?;
        a.out(dx, al)?;
    }
    let mut ready = a.create_label();
    a.lea(rsi, ptr(ready))?;
    a.mov(ecx, immediate(READY_LINE.len() as u64))?;
    a.mov(edx, u32::from(COM1_PORT))?;
    a.rep().outsb()?;
    line::clear(a)?;
    a.jmp(shared.main)?;
    a.set_label(&mut ready)?;
    a.db(READY_LINE.as_bytes())
}

/// Learns where RAM ends, below the MMIO gap and above it, from `boot_params` at `rsi`. Without
/// it, all that could be RAM is taken for RAM.
fn memory_map(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let low_limit = immediate(MMIO_GAP_START / PAGE_BYTES);
    let mut entry = a.create_label();
    let mut above_gap = a.create_label();
    let mut next = a.create_label();
    let mut store = a.create_label();
    a.mov(r8d, low_limit)?;
    a.mov(r9d, immediate(LAYOUT.mapped_end_page))?;
    a.test(rsi, rsi)?;
    a.jz(store)?;
    a.cmp(dword_ptr(rsi + HEADER_MAGIC), MAGIC)?;
    a.jne(store)?;
    a.movzx(ecx, byte_ptr(rsi + E820_COUNT))?;
    a.test(ecx, ecx)?;
    a.jz(store)?;
    a.xor(r8d, r8d)?;
    a.xor(r9d, r9d)?;

    a.set_label(&mut entry)?;
    a.cmp(dword_ptr(rsi + (E820_TABLE + 16)), E820_RAM)?;
    a.jne(next)?;
    a.mov(rax, qword_ptr(rsi + E820_TABLE))?;
    a.add(rax, qword_ptr(rsi + (E820_TABLE + 8)))?;
    a.shr(rax, 12)?;
    a.cmp(rax, immediate(HIGH_RAM_START / PAGE_BYTES))?;
    a.ja(above_gap)?;
    a.cmp(rax, r8)?;
    a.cmova(r8, rax)?;
    a.jmp(next)?;
    a.set_label(&mut above_gap)?;
    a.cmp(rax, r9)?;
    a.cmova(r9, rax)?;
    a.set_label(&mut next)?;
    a.add(rsi, E820_ENTRY)?;
    a.loop_(entry)?;
    // What the page tables do not map is no RAM to us.
    a.mov(eax, immediate(LAYOUT.mapped_end_page))?;
    a.cmp(r9, rax)?;
    a.cmova(r9, rax)?;

    a.set_label(&mut store)?;
    a.mov(qword_ptr(LOW_RAM_END), r8)?;
    a.mov(qword_ptr(HIGH_RAM_END), r9)
}
