#![forbid(unsafe_code)]
//! Commands that visit N pages of a range in a pattern: touch, verify, write.
//!
//! Registers of a visit: `rax` the page, `rdi` its address, `rcx` pages still to visit, `r8` the
//! salt, `r13` the pages of the range, `r14` its first page, `rbx` and `rbp` the result. One loop
//! per work and pattern keeps instructions per page few: where KVM emulates, they are the cost.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::layout::{HIGH_RAM_END, LAYOUT, LOW_RAM_END, PARAMETERS};
use super::super::model::{PAGE_MULTIPLIER, PLACE_MASK, RANDOM_INCREMENT, RANDOM_MULTIPLIER};
use super::super::protocol::{letter, pattern};
use super::{Emitted, Shared, immediate};
use crate::memory::layout::{HIGH_RAM_START, PAGE_BYTES};

/// What is done to each page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Add its first word to `rbx`.
    Touch,
    /// Compare its word with what the salt makes it; mismatches in `rbx`, the first one in `rbp`.
    Verify,
    /// Give it the word that the salt makes it.
    Write,
}

pub(super) fn emit(a: &mut CodeAssembler, shared: &mut Shared) -> Result<Vec<Emitted>, IcedError> {
    check_pages(a, shared)?;
    let mut commands = Vec::new();
    for (letter, parameters, work) in [
        (letter::TOUCH, 5, Work::Touch),
        (letter::VERIFY, 6, Work::Verify),
        (letter::WRITE, 6, Work::Write),
    ] {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        visit(a, shared, work)?;
        commands.push(Emitted {
            letter,
            parameters,
            label,
        });
    }
    Ok(commands)
}

/// See [`Shared::check_pages`]: a range is not empty, has nothing of ours, and is RAM.
fn check_pages(a: &mut CodeAssembler, shared: &mut Shared) -> Result<(), IcedError> {
    let mut above_gap = a.create_label();
    let mut fits = a.create_label();
    a.set_label(&mut shared.check_pages)?;
    a.test(r13, r13)?;
    a.jz(shared.out_of_range)?;
    a.cmp(r14, immediate(LAYOUT.first_data_page))?;
    a.jb(shared.out_of_range)?;
    a.mov(rax, r14)?;
    a.add(rax, r13)?;
    a.jc(shared.out_of_range)?;
    a.cmp(r14, immediate(HIGH_RAM_START / PAGE_BYTES))?;
    a.jae(above_gap)?;
    a.cmp(rax, qword_ptr(LOW_RAM_END))?;
    a.jbe(fits)?;
    a.jmp(shared.out_of_range)?;
    a.set_label(&mut above_gap)?;
    a.cmp(rax, qword_ptr(HIGH_RAM_END))?;
    a.ja(shared.out_of_range)?;
    a.set_label(&mut fits)?;
    a.ret()
}

/// One command: parameters, the three loops, the reply.
fn visit(a: &mut CodeAssembler, shared: &Shared, work: Work) -> Result<(), IcedError> {
    let mut strided_label = a.create_label();
    let mut random_label = a.create_label();
    let mut done = a.create_label();
    a.mov(r14, qword_ptr(PARAMETERS))?;
    a.mov(r13, qword_ptr(PARAMETERS + 8))?;
    a.mov(rcx, qword_ptr(PARAMETERS + 16))?;
    a.call(shared.check_pages)?;
    a.test(rcx, rcx)?;
    a.jz(shared.out_of_range)?;
    a.cmp(rcx, r13)?;
    a.ja(shared.out_of_range)?;
    if work != Work::Touch {
        a.mov(r8, qword_ptr(PARAMETERS + 40))?;
    }
    a.mov(r11, qword_ptr(PARAMETERS + 32))?;
    a.xor(ebx, ebx)?;
    a.xor(ebp, ebp)?;
    a.call(shared.start_clock)?;
    a.mov(rax, qword_ptr(PARAMETERS + 24))?;
    a.cmp(rax, pattern::STRIDED)?;
    a.je(strided_label)?;
    a.ja(random_label)?;

    sequential(a, work, done)?;
    a.set_label(&mut strided_label)?;
    strided(a, shared, work, done)?;
    a.set_label(&mut random_label)?;
    a.cmp(rax, pattern::RANDOM)?;
    a.ja(shared.out_of_range)?;
    random(a, work, done)?;

    a.set_label(&mut done)?;
    a.call(shared.begin_reply)?;
    a.mov(rax, qword_ptr(PARAMETERS + 16))?;
    a.call(shared.put_hex)?;
    if work != Work::Write {
        a.mov(rax, rbx)?;
        a.call(shared.put_hex)?;
    }
    if work == Work::Verify {
        a.mov(rax, rbp)?;
        a.call(shared.put_hex)?;
    }
    a.jmp(shared.finish_timed)
}

/// The work on one page, `rax` with its address in `rdi`. Returns what [`mismatch`] needs.
fn body(a: &mut CodeAssembler, work: Work) -> Result<Option<Mismatch>, IcedError> {
    if work == Work::Touch {
        a.add(rbx, qword_ptr(rdi))?;
        return Ok(None);
    }
    a.imul_3(rdx, rax, PAGE_MULTIPLIER)?;
    a.lea(rsi, qword_ptr(rdx + r8))?;
    a.and(edx, PLACE_MASK)?;
    if work == Work::Write {
        a.mov(qword_ptr(rdi + rdx), rsi)?;
        return Ok(None);
    }
    let mut labels = Mismatch {
        found: a.create_label(),
        resume: a.create_label(),
    };
    a.cmp(qword_ptr(rdi + rdx), rsi)?;
    a.jne(labels.found)?;
    a.set_label(&mut labels.resume)?;
    Ok(Some(labels))
}

/// Where a loop leaves for a page whose word is wrong, and where it goes on.
struct Mismatch {
    found: CodeLabel,
    resume: CodeLabel,
}

/// Counts a wrong page outside of the loop, so that right ones cost nothing more. Ends the loop.
fn end_loop(
    a: &mut CodeAssembler,
    mismatch: Option<Mismatch>,
    done: CodeLabel,
) -> Result<(), IcedError> {
    a.jmp(done)?;
    if let Some(mut labels) = mismatch {
        a.set_label(&mut labels.found)?;
        a.inc(rbx)?;
        a.test(rbp, rbp)?;
        a.cmovz(rbp, rax)?;
        a.jmp(labels.resume)?;
    }
    Ok(())
}

/// Page after page from the first.
fn sequential(a: &mut CodeAssembler, work: Work, done: CodeLabel) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.mov(rax, r14)?;
    a.mov(rdi, r14)?;
    a.shl(rdi, 12)?;
    a.set_label(&mut next)?;
    let mismatch = body(a, work)?;
    if work != Work::Touch {
        a.inc(eax)?;
    }
    a.add(rdi, immediate(PAGE_BYTES))?;
    a.loop_(next)?;
    end_loop(a, mismatch, done)
}

/// Every `r11`-th page; behind the end of the range, from one page further than the last time.
fn strided(
    a: &mut CodeAssembler,
    shared: &Shared,
    work: Work,
    done: CodeLabel,
) -> Result<(), IcedError> {
    let mut next = a.create_label();
    let mut inside = a.create_label();
    a.test(r11, r11)?;
    a.jz(shared.out_of_range)?;
    a.cmp(r11, r13)?;
    a.ja(shared.out_of_range)?;
    a.mov(r12, r14)?;
    a.add(r13, r14)?;
    a.mov(rax, r14)?;
    a.set_label(&mut next)?;
    a.mov(rdi, rax)?;
    a.shl(rdi, 12)?;
    let mismatch = body(a, work)?;
    a.add(rax, r11)?;
    a.cmp(rax, r13)?;
    a.jb(inside)?;
    a.inc(r12)?;
    a.mov(rax, r12)?;
    a.set_label(&mut inside)?;
    a.loop_(next)?;
    end_loop(a, mismatch, done)
}

/// A linear congruential generator of full period over the next power of two; what falls outside
/// of the range is left out, so that no page comes twice. `r11` has the seed.
fn random(a: &mut CodeAssembler, work: Work, done: CodeLabel) -> Result<(), IcedError> {
    let mut one_page = a.create_label();
    let mut next = a.create_label();
    a.mov(r9, RANDOM_MULTIPLIER)?;
    a.imul_2(r11, r9)?;
    a.mov(rax, RANDOM_INCREMENT)?;
    a.add(r11, rax)?;
    a.mov(r12, r11)?;
    a.or(r12, 1)?;
    a.mov(r10, r11)?;
    a.shr(r10, 32)?;
    // The mask, in r11: the next power of two less one.
    a.mov(rdx, rcx)?;
    a.xor(r11d, r11d)?;
    a.mov(rax, r13)?;
    a.dec(rax)?;
    a.jz(one_page)?;
    a.bsr(rcx, rax)?;
    a.mov(r11d, 2)?;
    a.shl(r11, cl)?;
    a.dec(r11)?;
    a.set_label(&mut one_page)?;
    a.mov(rcx, rdx)?;

    a.set_label(&mut next)?;
    a.imul_2(r10, r9)?;
    a.add(r10, r12)?;
    a.and(r10, r11)?;
    a.cmp(r10, r13)?;
    a.jae(next)?;
    a.lea(rax, qword_ptr(r10 + r14))?;
    a.mov(rdi, rax)?;
    a.shl(rdi, 12)?;
    let mismatch = body(a, work)?;
    a.loop_(next)?;
    end_loop(a, mismatch, done)
}
