#![forbid(unsafe_code)]
//! Waiting for input, and reading a command line as it comes in.
//!
//! State of a half-read line: `r15` the command letter (0: none yet), `rbp` how many parameters
//! are complete, `rbx` the value of the one being read, `r13` its digits, `r14` whether the line
//! is bad.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::layout::{COMMAND_TABLE, MAX_PARAMETERS, PARAMETERS, STACK_TOP};
use super::super::protocol::COM1_PORT;
use super::{ANY_PARAMETERS, Shared, immediate};

/// A parameter has at most this many digits.
const MAX_DIGITS: u32 = 16;

/// Makes ready for the first character of a line.
pub(super) fn clear(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for register in [r15d, ebp, ebx, r13d, r14d] {
        a.xor(register, register)?;
    }
    Ok(())
}

pub(super) fn emit(a: &mut CodeAssembler, shared: &mut Shared) -> Result<(), IcedError> {
    let mut receive = a.create_label();
    let mut idle = a.create_label();
    let mut letter = a.create_label();
    let mut space = a.create_label();
    let mut control = a.create_label();
    let mut digit = a.create_label();
    let mut bad = a.create_label();
    let mut line_end = a.create_label();
    let mut keep = a.create_label();

    a.set_label(&mut shared.main)?;
    a.mov(esp, immediate(STACK_TOP))?;
    a.mov(edx, u32::from(COM1_PORT))?;
    a.set_label(&mut receive)?;
    // An empty receive register reads as zero: asking the line status first would double the exits.
    a.in_(al, dx)?;
    a.test(al, al)?;
    a.jz(idle)?;
    a.cmp(al, i32::from(b' '))?;
    a.je(space)?;
    a.jb(control)?;
    a.test(r15d, r15d)?;
    a.jz(letter)?;
    a.movzx(ecx, al)?;
    a.sub(ecx, i32::from(b'0'))?;
    a.cmp(ecx, 9)?;
    a.jbe(digit)?;
    a.sub(ecx, i32::from(b'a' - b'0'))?;
    a.cmp(ecx, 5)?;
    a.ja(bad)?;
    a.add(ecx, 10)?;
    a.set_label(&mut digit)?;
    a.inc(r13d)?;
    a.shl(rbx, 4)?;
    a.or(rbx, rcx)?;
    a.jmp(receive)?;

    a.set_label(&mut letter)?;
    a.movzx(r15d, al)?;
    a.jmp(receive)?;

    a.set_label(&mut idle)?;
    // A character that came since the read above has its interrupt pending: it ends the halt.
    a.sti()?;
    a.hlt()?;
    a.cli()?;
    a.jmp(shared.main)?;

    a.set_label(&mut space)?;
    a.call(keep)?;
    a.jmp(receive)?;
    a.set_label(&mut control)?;
    a.cmp(al, i32::from(b'\n'))?;
    a.je(line_end)?;
    a.cmp(al, i32::from(b'\r'))?;
    a.je(receive)?;
    a.set_label(&mut bad)?;
    a.mov(r14d, 1)?;
    a.jmp(receive)?;

    a.set_label(&mut line_end)?;
    a.call(keep)?;
    dispatch(a, shared)?;

    a.set_label(&mut keep)?;
    keep_parameter(a)
}

/// Subroutine: a space or the end of the line completes the parameter being read, if there is one.
fn keep_parameter(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut done = a.create_label();
    let mut bad = a.create_label();
    a.test(r13d, r13d)?;
    a.jz(done)?;
    a.cmp(r13d, MAX_DIGITS)?;
    a.ja(bad)?;
    a.cmp(ebp, immediate(MAX_PARAMETERS))?;
    a.jae(bad)?;
    a.mov(qword_ptr(rbp * 8 + PARAMETERS), rbx)?;
    a.inc(ebp)?;
    a.xor(ebx, ebx)?;
    a.xor(r13d, r13d)?;
    a.set_label(&mut done)?;
    a.ret()?;
    a.set_label(&mut bad)?;
    a.mov(r14d, 1)?;
    a.ret()
}

/// Goes to the command that the line names, if its parameters are as many as it takes.
fn dispatch(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    let mut go = a.create_label();
    let mut not_empty = a.create_label();
    a.mov(eax, r15d)?;
    a.or(eax, r14d)?;
    a.jnz(not_empty)?;
    a.jmp(shared.main)?;
    a.set_label(&mut not_empty)?;
    a.lea(ecx, dword_ptr(r15 - i32::from(b'a')))?;
    a.cmp(ecx, 25)?;
    a.ja(shared.unknown)?;
    a.mov(rax, qword_ptr(rcx * 8 + COMMAND_TABLE))?;
    a.mov(ecx, eax)?;
    a.test(ecx, ecx)?;
    a.jz(shared.unknown)?;
    a.test(r14d, r14d)?;
    a.jnz(shared.bad_parameters)?;
    a.shr(rax, 32)?;
    a.cmp(eax, ebp)?;
    a.je(go)?;
    a.cmp(eax, immediate(ANY_PARAMETERS.into()))?;
    a.jne(shared.bad_parameters)?;
    a.set_label(&mut go)?;
    a.jmp(rcx)
}
