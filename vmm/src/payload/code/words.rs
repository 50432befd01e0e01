#![forbid(unsafe_code)]
//! Commands that look at every byte of a range: checksum, and the search for pages that are not
//! zero.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::layout::PARAMETERS;
use super::super::model::{CHECKSUM_BLOCK_WORDS, CHECKSUM_MULTIPLIER};
use super::super::protocol::letter;
use super::{Emitted, Shared, immediate};
use crate::memory::layout::PAGE_BYTES;

pub(super) fn emit(a: &mut CodeAssembler, shared: &mut Shared) -> Result<Vec<Emitted>, IcedError> {
    let mut checksum_label = a.create_label();
    a.set_label(&mut checksum_label)?;
    checksum(a, shared)?;
    let mut scan_label = a.create_label();
    a.set_label(&mut scan_label)?;
    scan(a, shared)?;
    Ok(vec![
        Emitted {
            letter: letter::CHECKSUM,
            parameters: 2,
            label: checksum_label,
        },
        Emitted {
            letter: letter::SCAN,
            parameters: 2,
            label: scan_label,
        },
    ])
}

/// Loads and checks the range: `r14` its first page, `r13` its pages.
fn load_range(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    a.mov(r14, qword_ptr(PARAMETERS))?;
    a.mov(r13, qword_ptr(PARAMETERS + 8))?;
    a.call(shared.check_pages)?;
    a.call(shared.start_clock)
}

/// See [`checksum`](super::super::model::Checksum) for what is computed.
fn checksum(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    let block_bytes = CHECKSUM_BLOCK_WORDS as u64 * 8;
    let mut block = a.create_label();
    load_range(a, shared)?;
    a.mov(rsi, r14)?;
    a.shl(rsi, 12)?;
    a.imul_3(rcx, r13, immediate(PAGE_BYTES / block_bytes))?;
    a.xor(ebx, ebx)?;
    a.set_label(&mut block)?;
    a.imul_3(rbx, rbx, CHECKSUM_MULTIPLIER)?;
    for word in 0..CHECKSUM_BLOCK_WORDS {
        a.add(rbx, qword_ptr(rsi + 8 * word))?;
    }
    a.add(rsi, immediate(block_bytes))?;
    a.loop_(block)?;
    a.call(shared.begin_reply)?;
    a.mov(rax, rbx)?;
    a.call(shared.put_hex)?;
    a.jmp(shared.finish_timed)
}

/// Counts in `rbx` the pages that are not all zero; the first of them is kept in `r12`.
fn scan(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    let mut page = a.create_label();
    let mut zero = a.create_label();
    load_range(a, shared)?;
    a.xor(ebx, ebx)?;
    a.xor(r12d, r12d)?;
    a.set_label(&mut page)?;
    a.mov(rdi, r14)?;
    a.shl(rdi, 12)?;
    a.xor(eax, eax)?;
    a.mov(ecx, immediate(PAGE_BYTES / 8))?;
    a.repe().scasq()?;
    a.je(zero)?;
    a.inc(rbx)?;
    a.test(r12, r12)?;
    a.cmovz(r12, r14)?;
    a.set_label(&mut zero)?;
    a.inc(r14)?;
    a.dec(r13)?;
    a.jnz(page)?;
    a.call(shared.begin_reply)?;
    a.mov(rax, rbx)?;
    a.call(shared.put_hex)?;
    a.mov(rax, r12)?;
    a.call(shared.put_hex)?;
    a.jmp(shared.finish_timed)
}
