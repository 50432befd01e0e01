#![forbid(unsafe_code)]
//! Putting reply lines together and sending them; what happens on an exception.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::layout::{HEX_DIGITS, REPLY_LINE, STACK_TOP, STARTED};
use super::super::protocol::{COM1_PORT, Reason};
use super::{EXCEPTIONS, Shared, immediate, line};

/// Exceptions that push an error code (SDM volume 3, table 6-1).
const WITH_ERROR_CODE: u64 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// Returns the handler of each exception.
pub(super) fn emit(
    a: &mut CodeAssembler,
    shared: &mut Shared,
) -> Result<Vec<CodeLabel>, IcedError> {
    a.set_label(&mut shared.begin_reply)?;
    a.mov(edi, immediate(REPLY_LINE))?;
    a.mov(eax, r15d)?;
    a.shl(eax, 24)?;
    a.or(eax, i32::from_le_bytes(*b"ok \0"))?;
    a.stosd()?;
    a.ret()?;

    put_hex(a, shared)?;

    a.set_label(&mut shared.start_clock)?;
    time_stamp(a)?;
    a.mov(qword_ptr(STARTED), rax)?;
    a.ret()?;

    a.set_label(&mut shared.finish_timed)?;
    time_stamp(a)?;
    a.sub(rax, qword_ptr(STARTED))?;
    a.call(shared.put_hex)?;
    a.set_label(&mut shared.finish)?;
    a.call(shared.send_reply)?;
    line::clear(a)?;
    a.jmp(shared.main)?;

    a.set_label(&mut shared.send_reply)?;
    a.mov(al, i32::from(b'\n'))?;
    a.stosb()?;
    a.mov(ecx, edi)?;
    a.mov(esi, immediate(REPLY_LINE))?;
    a.sub(ecx, esi)?;
    a.mov(edx, u32::from(COM1_PORT))?;
    // The transmitter of a virtual serial port takes every byte at once: nothing to wait for.
    a.rep().outsb()?;
    a.ret()?;

    let (refuse, fault_text) = refusals(a, shared)?;
    exceptions(a, shared, refuse, fault_text)
}

/// The time stamp counter in `rax`; changes `rdx`.
fn time_stamp(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

fn put_hex(a: &mut CodeAssembler, shared: &mut Shared) -> Result<(), IcedError> {
    let mut nibble = a.create_label();
    a.set_label(&mut shared.put_hex)?;
    a.mov(byte_ptr(rdi), i32::from(b' '))?;
    a.inc(edi)?;
    a.mov(rcx, rax)?;
    a.or(rcx, 1)?;
    a.bsr(rcx, rcx)?;
    a.and(ecx, 0x3c)?;
    a.set_label(&mut nibble)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, cl)?;
    a.and(edx, 15)?;
    a.movzx(edx, byte_ptr(rdx + HEX_DIGITS))?;
    a.mov(byte_ptr(rdi), dl)?;
    a.inc(edi)?;
    a.sub(ecx, 4)?;
    a.jns(nibble)?;
    a.ret()
}

/// The refusals. Returns the code that begins a line `err <command> <rsi, rcx bytes>`, a
/// subroutine, and the text for an exception.
fn refusals(
    a: &mut CodeAssembler,
    shared: &mut Shared,
) -> Result<(CodeLabel, CodeLabel), IcedError> {
    let mut refuse = a.create_label();
    let mut refuse_and_finish = a.create_label();
    for (entry, reason) in [
        (&mut shared.unknown, Reason::Unknown),
        (&mut shared.bad_parameters, Reason::Parameters),
        (&mut shared.out_of_range, Reason::Range),
        (&mut shared.still_here, Reason::Alive),
    ] {
        let mut text = a.create_label();
        a.set_label(entry)?;
        a.lea(rsi, ptr(text))?;
        a.mov(ecx, immediate(reason.as_str().len() as u64))?;
        a.jmp(refuse_and_finish)?;
        a.set_label(&mut text)?;
        a.db(reason.as_str().as_bytes())?;
    }
    a.set_label(&mut refuse_and_finish)?;
    a.mov(esp, immediate(STACK_TOP))?;
    a.call(refuse)?;
    a.jmp(shared.finish)?;

    let mut letter = a.create_label();
    a.set_label(&mut refuse)?;
    a.mov(edi, immediate(REPLY_LINE))?;
    a.mov(eax, u32::from_le_bytes(*b"err "))?;
    a.stosd()?;
    a.mov(eax, u32::from(b'?'))?;
    a.lea(edx, dword_ptr(r15 - i32::from(b'a')))?;
    a.cmp(edx, 25)?;
    a.ja(letter)?;
    a.mov(eax, r15d)?;
    a.set_label(&mut letter)?;
    a.mov(ah, i32::from(b' '))?;
    a.stosw()?;
    a.rep().movsb()?;
    a.ret()?;

    let mut fault_text = a.create_label();
    a.set_label(&mut fault_text)?;
    a.db(Reason::FAULT.as_bytes())?;
    Ok((refuse, fault_text))
}

/// One handler per exception: reports vector, error code, instruction and address, and goes on
/// with the next line.
fn exceptions(
    a: &mut CodeAssembler,
    shared: &Shared,
    refuse: CodeLabel,
    fault_text: CodeLabel,
) -> Result<Vec<CodeLabel>, IcedError> {
    let mut common = a.create_label();
    let mut handlers = Vec::new();
    for vector in 0..EXCEPTIONS {
        let mut handler = a.create_label();
        a.set_label(&mut handler)?;
        if WITH_ERROR_CODE >> vector & 1 == 0 {
            a.push(0)?;
        }
        a.push(immediate(vector))?;
        a.jmp(common)?;
        handlers.push(handler);
    }
    a.set_label(&mut common)?;
    a.pop(r8)?;
    a.pop(r9)?;
    a.pop(r10)?;
    a.mov(r11, cr2)?;
    a.mov(esp, immediate(STACK_TOP))?;
    a.cld()?;
    a.lea(rsi, ptr(fault_text))?;
    a.mov(ecx, immediate(Reason::FAULT.len() as u64))?;
    a.call(refuse)?;
    for register in [r8, r9, r10, r11] {
        a.mov(rax, register)?;
        a.call(shared.put_hex)?;
    }
    a.jmp(shared.finish)?;
    Ok(handlers)
}
