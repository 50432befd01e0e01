#![forbid(unsafe_code)]
//! A harness that runs the little guest of [`crate::program`] and talks to it over COM1.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pando_vmm::arch::x86_64::regs::InitialRegisters;
use pando_vmm::device::legacy::console::SerialTarget;
use pando_vmm::machine::{Machine, Paused};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::spec::{BackendSpec, CpuCount, MachineSpec};

use crate::program;

/// RAM of the test machines.
pub(crate) const RAM_BYTES: u64 = 64 << 20;
/// No test waits longer than this for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A machine of `cpus` vCPUs with [`RAM_BYTES`] of RAM.
pub(crate) fn spec(cpus: u32) -> MachineSpec {
    let ram = BackendSpec::new("ram", RAM_BYTES).unwrap();
    MachineSpec::new(CpuCount::new(cpus).unwrap(), vec![ram]).unwrap()
}

/// Anonymous RAM for [`spec`].
pub(crate) fn anonymous_ram() -> GuestRam {
    let backing = RamBacking::anonymous(RAM_BYTES).unwrap();
    GuestRam::new(spec(1).layout(), vec![backing]).unwrap()
}

/// A copy of all RAM in new memory.
pub(crate) fn copy_ram(ram: &GuestRam) -> GuestRam {
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
pub(crate) fn load(ram: &GuestRam) -> InitialRegisters {
    for (address, bytes) in program::images().unwrap() {
        ram.write(address, &bytes).unwrap();
    }
    let mut registers = InitialRegisters::pvh(program::START);
    registers.general.rsp = program::STACK;
    registers
}

/// The test's end of COM1.
pub(crate) struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// Both ends.
    pub(crate) fn new() -> (Self, SerialTarget) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        (
            Self { stream: ours },
            SerialTarget::Fd(OwnedFd::from(theirs)),
        )
    }

    /// Gives the guest a command.
    pub(crate) fn send(&mut self, command: u8) {
        self.stream.write_all(&[command]).unwrap();
    }

    /// Has the guest write `value` to a port below 256.
    pub(crate) fn write_port(&mut self, port: u8, value: u8) {
        self.stream.write_all(&[b'w', port, value]).unwrap();
        self.expect("W");
    }

    /// What the guest reads at a port below 256.
    pub(crate) fn read_port(&mut self, port: u8) -> u8 {
        self.stream.write_all(&[b'g', port]).unwrap();
        let mut byte = [0];
        self.stream.read_exact(&mut byte).unwrap();
        byte[0]
    }

    /// Sends `bytes`; the four bytes that come back.
    pub(crate) fn exchange(&mut self, bytes: &[u8]) -> [u8; 4] {
        self.stream.write_all(bytes).unwrap();
        let mut answer = [0; 4];
        self.stream.read_exact(&mut answer).unwrap();
        answer
    }

    /// Reads exactly `text`.
    pub(crate) fn expect(&mut self, text: &str) {
        let mut got = vec![0; text.len()];
        match self.stream.read_exact(&mut got) {
            Ok(()) => assert_eq!(String::from_utf8_lossy(&got), text),
            Err(e) if e.kind() == ErrorKind::WouldBlock => panic!("the guest never said {text:?}"),
            Err(e) => panic!("waiting for {text:?}: {e}"),
        }
    }

    /// A command, and so many bytes of the answer to it.
    pub(crate) fn answer(&mut self, command: u8, bytes: usize) -> String {
        self.send(command);
        let mut got = vec![0; bytes];
        self.stream.read_exact(&mut got).unwrap();
        String::from_utf8_lossy(&got).into_owned()
    }

    /// A command and the answer to it.
    pub(crate) fn ask(&mut self, command: u8, answer: &str) {
        self.send(command);
        self.expect(answer);
    }
}

/// A machine with the program loaded, not yet running.
pub(crate) fn boot(cpus: u32) -> (Machine<Paused>, Wire) {
    boot_on(cpus, anonymous_ram())
}

/// The same on given RAM.
pub(crate) fn boot_on(cpus: u32, ram: GuestRam) -> (Machine<Paused>, Wire) {
    let registers = load(&ram);
    let (wire, target) = Wire::new();
    match Machine::boot_at(&spec(cpus), ram, &registers, target) {
        Ok(machine) => (machine, wire),
        Err(error) => panic!("these tests need KVM: {}", chain(&error)),
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
