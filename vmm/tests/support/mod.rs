//! A little guest for the machine's tests, and a harness that talks to it over COM1.
//!
//! The guest runs in 32-bit protected mode without paging and obeys one-byte commands; see
//! [`program`]. It uses integer and string instructions and port I/O only, so that it runs on a KVM
//! that emulates.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use iced_x86::code_asm::*;
use pando_vmm::arch::x86_64::regs::InitialRegisters;
use pando_vmm::device::legacy::console::SerialTarget;
use pando_vmm::machine::{Machine, Paused};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::spec::{BackendSpec, CpuCount, MachineSpec};

/// RAM of the test machines.
pub const RAM_BYTES: u64 = 64 << 20;
/// Where the program is loaded and starts.
const PROGRAM: u64 = 0x10_0000;
/// Where the other vCPUs start: `PROGRAM` cannot be reached from real mode.
const AP_PROGRAM: u64 = 0x8000;
/// The counter that `c` counts up.
pub const COUNTER: u64 = 0x20_0000;
/// The page that `m` reads.
pub const TOUCHED: u64 = 0x300_0000;
/// Text that `o` prints with one string instruction.
pub const STRING: &str = "aspens share one root";
const STRING_ADDRESS: u64 = 0x20_1000;
/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(60);

const COM1: u32 = 0x3f8;
const COM1_STATUS: u32 = 0x3fd;
const APIC_COMMAND: u32 = 0xfee0_0300;

/// The program: prints `R`, then obeys.
///
/// | command | does |
/// |---|---|
/// | `c` | counts up in memory and prints a letter for the count |
/// | `o` | prints [`STRING`] with one `rep outsb` |
/// | `u` | reads and writes ports and addresses where nothing is; prints `U` if all read as ones |
/// | `m` | reads [`TOUCHED`], prints `M` |
/// | `a` | starts all other vCPUs; each prints `p` and then spins |
/// | `l` | prints `L`, then spins for ever |
/// | `h` | prints `H`, then halts for ever |
/// | `q` `r` `k` `t` | power off; ACPI reset; keyboard reset; triple fault |
fn program() -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(32)?;
    let a = &mut asm;
    let mut next = a.create_label();
    let commands: Vec<(u8, CodeLabel)> = b"coumalhqrkt"
        .iter()
        .map(|&c| (c, a.create_label()))
        .collect();
    let label = |c: u8| commands.iter().find(|(d, _)| *d == c).unwrap().1;

    print(a, b'R')?;
    a.set_label(&mut next)?;
    a.mov(edx, COM1_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(next)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)?;
    for (command, target) in &commands {
        a.cmp(al, u32::from(*command))?;
        a.je(*target)?;
    }
    print(a, b'?')?;
    a.jmp(next)?;

    a.set_label(&mut label(b'c'))?;
    a.inc(dword_ptr(COUNTER))?;
    a.mov(eax, dword_ptr(COUNTER))?;
    a.and(eax, 15)?;
    a.add(eax, u32::from(b'A'))?;
    a.mov(edx, COM1)?;
    a.out(dx, al)?;
    a.jmp(next)?;

    a.set_label(&mut label(b'o'))?;
    a.mov(esi, STRING_ADDRESS as u32)?;
    a.mov(ecx, STRING.len() as u32)?;
    a.mov(edx, COM1)?;
    a.cld()?;
    a.rep().outsb()?;
    a.jmp(next)?;

    let mut wrong = a.create_label();
    a.set_label(&mut label(b'u'))?;
    for port in [0x1234_u32, 0xcfc, 0xffff] {
        a.mov(edx, port)?;
        a.mov(eax, 0x5a5a_5a5a)?;
        a.out(dx, eax)?;
        a.in_(eax, dx)?;
        a.cmp(eax, -1)?;
        a.jne(wrong)?;
    }
    for address in [0xd000_0000_u32, RAM_BYTES as u32, 0xffff_fff0] {
        a.mov(dword_ptr(address), eax)?;
        a.mov(eax, dword_ptr(address))?;
        a.cmp(eax, -1)?;
        a.jne(wrong)?;
    }
    print(a, b'U')?;
    a.jmp(next)?;
    a.set_label(&mut wrong)?;
    print(a, b'x')?;
    a.jmp(next)?;

    a.set_label(&mut label(b'm'))?;
    a.mov(eax, dword_ptr(TOUCHED))?;
    print(a, b'M')?;
    a.jmp(next)?;

    a.set_label(&mut label(b'a'))?;
    // INIT, then the start-up interrupt with AP_PROGRAM's page, to all but self.
    a.mov(dword_ptr(APIC_COMMAND), 0x000c_4500)?;
    a.mov(
        dword_ptr(APIC_COMMAND),
        0x000c_4600 | (AP_PROGRAM >> 12) as u32,
    )?;
    a.jmp(next)?;

    let mut spin = a.create_label();
    a.set_label(&mut label(b'l'))?;
    print(a, b'L')?;
    a.set_label(&mut spin)?;
    a.inc(ebx)?;
    a.jmp(spin)?;

    let mut sleep = a.create_label();
    a.set_label(&mut label(b'h'))?;
    print(a, b'H')?;
    a.set_label(&mut sleep)?;
    a.hlt()?;
    a.jmp(sleep)?;

    a.set_label(&mut label(b'q'))?;
    out(a, 0x600, 5 << 2 | 1 << 5)?;
    a.jmp(next)?;
    a.set_label(&mut label(b'r'))?;
    out(a, 0x602, 1)?;
    a.jmp(next)?;
    a.set_label(&mut label(b'k'))?;
    out(a, 0x64, 0xfe)?;
    a.jmp(next)?;
    a.set_label(&mut label(b't'))?;
    // An interrupt table of no entries: the exception cannot be handled, nor the next, nor that.
    a.push(0)?;
    a.push(0)?;
    a.lidt(fword_ptr(esp))?;
    a.ud2()?;
    a.assemble(PROGRAM)
}

fn print(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    out(a, COM1, byte)
}

fn out(a: &mut CodeAssembler, port: u32, byte: u8) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(al, u32::from(byte))?;
    a.out(dx, al)
}

/// What the other vCPUs do, in real mode.
fn ap_program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut spin = a.create_label();
    a.mov(dx, COM1)?;
    a.mov(al, u32::from(b'p'))?;
    a.out(dx, al)?;
    a.set_label(&mut spin)?;
    a.inc(ebx)?;
    a.jmp(spin)?;
    a.assemble(AP_PROGRAM)
}

/// A machine of `cpus` vCPUs with [`RAM_BYTES`] of RAM.
pub fn spec(cpus: u32) -> MachineSpec {
    let ram = BackendSpec::new("ram", RAM_BYTES).unwrap();
    MachineSpec::new(CpuCount::new(cpus).unwrap(), vec![ram]).unwrap()
}

/// Anonymous RAM for [`spec`].
pub fn anonymous_ram() -> GuestRam {
    let backing = RamBacking::anonymous(RAM_BYTES).unwrap();
    GuestRam::new(spec(1).layout(), vec![backing]).unwrap()
}

/// A copy of all RAM in new memory.
pub fn copy_ram(ram: &GuestRam) -> GuestRam {
    let copy = anonymous_ram();
    let mut chunk = vec![0; 1 << 20];
    for address in (0..RAM_BYTES).step_by(chunk.len()) {
        ram.read(address, &mut chunk).unwrap();
        if chunk.iter().any(|&byte| byte != 0) {
            copy.write(address, &chunk).unwrap();
        }
    }
    copy
}

/// Writes the program into RAM; returns the registers that start it.
pub fn load(ram: &GuestRam) -> InitialRegisters {
    ram.write(PROGRAM, &program().unwrap()).unwrap();
    ram.write(AP_PROGRAM, &ap_program().unwrap()).unwrap();
    ram.write(STRING_ADDRESS, STRING.as_bytes()).unwrap();
    let mut registers = InitialRegisters::pvh(PROGRAM);
    registers.general.rsp = 0x7_0000;
    registers
}

/// The test's end of COM1.
pub struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// Both ends.
    pub fn new() -> (Self, SerialTarget) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        (
            Self { stream: ours },
            SerialTarget::Fd(OwnedFd::from(theirs)),
        )
    }

    /// Gives the guest a command.
    pub fn send(&mut self, command: u8) {
        self.stream.write_all(&[command]).unwrap();
    }

    /// Reads exactly `text`.
    pub fn expect(&mut self, text: &str) {
        let mut got = vec![0; text.len()];
        match self.stream.read_exact(&mut got) {
            Ok(()) => assert_eq!(String::from_utf8_lossy(&got), text),
            Err(e) if e.kind() == ErrorKind::WouldBlock => panic!("the guest never said {text:?}"),
            Err(e) => panic!("waiting for {text:?}: {e}"),
        }
    }

    /// A command and the answer to it.
    pub fn ask(&mut self, command: u8, answer: &str) {
        self.send(command);
        self.expect(answer);
    }
}

/// A machine with the program loaded, not yet running.
pub fn boot(cpus: u32) -> (Machine<Paused>, Wire) {
    boot_on(cpus, anonymous_ram())
}

/// The same on given RAM.
pub fn boot_on(cpus: u32, ram: GuestRam) -> (Machine<Paused>, Wire) {
    let registers = load(&ram);
    let (wire, target) = Wire::new();
    let machine = Machine::boot_at(&spec(cpus), ram, &registers, target).unwrap();
    (machine, wire)
}
