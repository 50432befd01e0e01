#![forbid(unsafe_code)]
//! The guest of these tests: 32-bit protected mode without paging, commands over COM1, of one byte most of them.
//!
//! It uses integer and string instructions and port I/O only (but for command `i`), so that it runs
//! on a KVM that emulates.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the program is loaded and starts.
pub(crate) const START: u64 = 0x10_0000;
/// Its stack.
pub(crate) const STACK: u64 = 0x7_0000;
/// What `m` reads.
pub(crate) const TOUCHED: u32 = 0x300_0000;
/// Text that `o` prints with one string instruction.
pub(crate) const STRING: &str = "aspens share one root";
const STRING_ADDRESS: u32 = 0x20_1000;
/// What `c` counts up.
pub(crate) const COUNTER: u32 = 0x20_0000;
/// Where the other vCPUs start: real mode cannot reach [`START`].
const AP_START: u32 = 0x8000;

const COM1: u32 = 0x3f8;
const COM1_STATUS: u32 = 0x3fd;
const APIC_COMMAND: u32 = 0xfee0_0300;

type Code = Result<(), IcedError>;
/// The byte that asks for it, and what writes its code.
type Command = (u8, fn(&mut CodeAssembler) -> Code);

/// What is written where.
pub(crate) fn images() -> Result<Vec<(u64, Vec<u8>)>, IcedError> {
    Ok(vec![
        (START, main_program()?),
        (AP_START.into(), ap_program()?),
        (STRING_ADDRESS.into(), STRING.as_bytes().to_vec()),
    ])
}

/// Prints `R`, then obeys; anything else is answered by `?`.
fn main_program() -> Result<Vec<u8>, IcedError> {
    let commands: [Command; 14] = [
        (b'c', count),
        (b'o', print_string),
        (b'u', touch_what_is_not_there),
        (b'm', touch_memory),
        (b'a', start_other_vcpus),
        (b'l', spin_for_ever),
        (b'h', halt_for_ever),
        (b'i', run_sse),
        (b'q', |a| out(a, 0x600, 5 << 2 | 1 << 5)),
        (b'r', |a| out(a, 0x602, 1)),
        (b'k', |a| out(a, 0x64, 0xfe)),
        (b't', triple_fault),
        (b'w', write_port),
        (b'g', read_port),
    ];
    let mut asm = CodeAssembler::new(32)?;
    let a = &mut asm;
    let mut next = a.create_label();
    let mut labels: Vec<_> = commands.iter().map(|_| a.create_label()).collect();
    print(a, b'R')?;
    a.set_label(&mut next)?;
    a.mov(edx, COM1_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(next)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)?;
    for ((command, _), label) in commands.iter().zip(&labels) {
        a.cmp(al, u32::from(*command))?;
        a.je(*label)?;
    }
    print(a, b'?')?;
    a.jmp(next)?;
    for ((_, body), label) in commands.iter().zip(&mut labels) {
        a.set_label(label)?;
        body(a)?;
        a.jmp(next)?;
    }
    a.assemble(START)
}

/// Waits for a byte on COM1, into `al`.
fn take_byte(a: &mut CodeAssembler) -> Code {
    let mut again = a.create_label();
    a.mov(edx, COM1_STATUS)?;
    a.set_label(&mut again)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(again)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)
}

/// Takes a port below 256 and a byte, writes it there, prints `W`.
fn write_port(a: &mut CodeAssembler) -> Code {
    take_byte(a)?;
    a.movzx(ebx, al)?;
    take_byte(a)?;
    a.mov(edx, ebx)?;
    a.out(dx, al)?;
    print(a, b'W')
}

/// Takes a port below 256, reads a byte there and prints it.
fn read_port(a: &mut CodeAssembler) -> Code {
    take_byte(a)?;
    a.movzx(edx, al)?;
    a.in_(al, dx)?;
    a.mov(edx, COM1)?;
    a.out(dx, al)
}

/// Counts up in memory and prints a letter for the count.
fn count(a: &mut CodeAssembler) -> Code {
    a.inc(dword_ptr(COUNTER))?;
    a.mov(eax, dword_ptr(COUNTER))?;
    a.and(eax, 15)?;
    a.add(eax, u32::from(b'A'))?;
    a.mov(edx, COM1)?;
    a.out(dx, al)
}

/// Prints [`STRING`] with one `rep outsb`.
fn print_string(a: &mut CodeAssembler) -> Code {
    a.mov(esi, STRING_ADDRESS)?;
    a.mov(ecx, u32::try_from(STRING.len()).unwrap())?;
    a.mov(edx, COM1)?;
    a.cld()?;
    a.rep().outsb()
}

/// Writes and reads ports and addresses where nothing is; prints `U` if all read as ones, else `x`.
fn touch_what_is_not_there(a: &mut CodeAssembler) -> Code {
    let mut wrong = a.create_label();
    let mut done = a.create_label();
    for port in [0x1234_u32, 0xcfc, 0xffff] {
        a.mov(edx, port)?;
        a.mov(eax, 0x5a5a_5a5a)?;
        a.out(dx, eax)?;
        a.in_(eax, dx)?;
        a.cmp(eax, -1)?;
        a.jne(wrong)?;
    }
    for address in [0xd000_0000_u32, 0x7000_0000, 0xffff_fff0] {
        a.mov(dword_ptr(address), eax)?;
        a.mov(eax, dword_ptr(address))?;
        a.cmp(eax, -1)?;
        a.jne(wrong)?;
    }
    print(a, b'U')?;
    a.jmp(done)?;
    a.set_label(&mut wrong)?;
    print(a, b'x')?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Reads [`TOUCHED`], prints `M`.
fn touch_memory(a: &mut CodeAssembler) -> Code {
    a.mov(eax, dword_ptr(TOUCHED))?;
    print(a, b'M')
}

/// INIT, then the start-up interrupt with the page of [`AP_START`], to all but self.
fn start_other_vcpus(a: &mut CodeAssembler) -> Code {
    a.mov(dword_ptr(APIC_COMMAND), 0x000c_4500)?;
    a.mov(dword_ptr(APIC_COMMAND), 0x000c_4600 | AP_START >> 12)
}

/// Prints `L`, then spins.
fn spin_for_ever(a: &mut CodeAssembler) -> Code {
    let mut spin = a.create_label();
    print(a, b'L')?;
    a.set_label(&mut spin)?;
    a.inc(ebx)?;
    a.jmp(spin)
}

/// Prints `H`, then halts with interrupts off.
fn halt_for_ever(a: &mut CodeAssembler) -> Code {
    let mut sleep = a.create_label();
    print(a, b'H')?;
    a.set_label(&mut sleep)?;
    a.hlt()?;
    a.jmp(sleep)
}

/// An instruction that a KVM which emulates does not know, and that is undefined elsewhere, because
/// the guest has not enabled it; it cannot handle either.
fn run_sse(a: &mut CodeAssembler) -> Code {
    forget_interrupts(a)?;
    a.movaps(xmm0, xmm1)
}

fn triple_fault(a: &mut CodeAssembler) -> Code {
    forget_interrupts(a)?;
    a.ud2()
}

/// An interrupt table of no entries: an exception cannot be handled, nor the next, nor that.
fn forget_interrupts(a: &mut CodeAssembler) -> Code {
    a.push(0)?;
    a.push(0)?;
    a.lidt(fword_ptr(esp))
}

fn print(a: &mut CodeAssembler, byte: u8) -> Code {
    out(a, COM1, byte)
}

fn out(a: &mut CodeAssembler, port: u32, byte: u8) -> Code {
    a.mov(edx, port)?;
    a.mov(al, u32::from(byte))?;
    a.out(dx, al)
}

/// What the other vCPUs do, in real mode: print `p`, then spin.
fn ap_program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut spin = a.create_label();
    a.mov(dx, COM1)?;
    a.mov(al, u32::from(b'p'))?;
    a.out(dx, al)?;
    a.set_label(&mut spin)?;
    a.inc(ebx)?;
    a.jmp(spin)?;
    a.assemble(AP_START.into())
}
