#![forbid(unsafe_code)]
//! Commands that touch no data pages: identity, echo, spin, ports, and the ways to end.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::layout::{LAYOUT, PARAMETERS};
use super::super::protocol::{POWER_OFF, RESET, letter};
use super::{ANY_PARAMETERS, Emitted, Shared};

pub(super) fn emit(a: &mut CodeAssembler, shared: &mut Shared) -> Result<Vec<Emitted>, IcedError> {
    let mut commands = Vec::new();
    let mut begin = |a: &mut CodeAssembler, letter, parameters| -> Result<(), IcedError> {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        commands.push(Emitted {
            letter,
            parameters,
            label,
        });
        Ok(())
    };
    begin(a, letter::IDENTITY, 0)?;
    identity(a, shared)?;
    begin(a, letter::ECHO, ANY_PARAMETERS)?;
    echo(a, shared)?;
    begin(a, letter::SPIN, 1)?;
    spin(a, shared)?;
    begin(a, letter::OUT, 2)?;
    out_byte(a, shared)?;
    begin(a, letter::IN, 1)?;
    in_byte(a, shared)?;
    begin(a, letter::HALT, 0)?;
    halt(a, shared)?;
    begin(a, letter::POWER_OFF, 0)?;
    leave(a, shared, POWER_OFF)?;
    begin(a, letter::RESET, 0)?;
    leave(a, shared, RESET)?;
    Ok(commands)
}

fn identity(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    a.call(shared.begin_reply)?;
    for word in 0..3 {
        a.mov(rax, qword_ptr(LAYOUT.identity_address + 8 * word))?;
        a.call(shared.put_hex)?;
    }
    // The initial APIC id is in the high byte of ebx (SDM volume 2, CPUID leaf 1).
    a.mov(eax, 1)?;
    a.cpuid()?;
    a.mov(eax, ebx)?;
    a.shr(eax, 24)?;
    a.call(shared.put_hex)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.call(shared.put_hex)?;
    a.jmp(shared.finish)
}

fn echo(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    let mut next = a.create_label();
    let mut done = a.create_label();
    a.call(shared.begin_reply)?;
    a.xor(ebx, ebx)?;
    a.set_label(&mut next)?;
    a.cmp(ebx, ebp)?;
    a.jae(done)?;
    a.mov(rax, qword_ptr(rbx * 8 + PARAMETERS))?;
    a.call(shared.put_hex)?;
    a.inc(ebx)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    a.jmp(shared.finish)
}

fn spin(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    let mut turn = a.create_label();
    let mut done = a.create_label();
    a.call(shared.start_clock)?;
    a.mov(rcx, qword_ptr(PARAMETERS))?;
    a.jrcxz(done)?;
    a.set_label(&mut turn)?;
    a.loop_(turn)?;
    a.set_label(&mut done)?;
    a.call(shared.begin_reply)?;
    a.mov(rax, qword_ptr(PARAMETERS))?;
    a.call(shared.put_hex)?;
    a.jmp(shared.finish_timed)
}

/// The port in `rdx`, refused if there is no such port.
fn load_port(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    a.mov(rdx, qword_ptr(PARAMETERS))?;
    a.cmp(rdx, 0xffff)?;
    a.ja(shared.out_of_range)
}

fn out_byte(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    load_port(a, shared)?;
    a.mov(rax, qword_ptr(PARAMETERS + 8))?;
    a.cmp(rax, 0xff)?;
    a.ja(shared.out_of_range)?;
    a.out(dx, al)?;
    a.call(shared.begin_reply)?;
    a.jmp(shared.finish)
}

fn in_byte(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    load_port(a, shared)?;
    a.in_(al, dx)?;
    a.movzx(r8d, al)?;
    a.call(shared.begin_reply)?;
    a.mov(eax, r8d)?;
    a.call(shared.put_hex)?;
    a.jmp(shared.finish)
}

/// Halts with interrupts off: nothing but the host ends this machine.
fn halt(a: &mut CodeAssembler, shared: &Shared) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.call(shared.begin_reply)?;
    a.call(shared.send_reply)?;
    a.set_label(&mut again)?;
    a.cli()?;
    a.hlt()?;
    a.jmp(again)
}

/// Answers, then writes to the port that ends the machine.
fn leave(
    a: &mut CodeAssembler,
    shared: &Shared,
    (port, value): (u16, u8),
) -> Result<(), IcedError> {
    a.call(shared.begin_reply)?;
    a.call(shared.send_reply)?;
    a.mov(edx, u32::from(port))?;
    a.mov(eax, u32::from(value))?;
    a.out(dx, al)?;
    a.jmp(shared.still_here)
}
