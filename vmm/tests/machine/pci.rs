#![forbid(unsafe_code)]
//! A guest that drives a virtio device on the PCI bus by itself, on real KVM: registers by ports and by
//! memory, a queue, and the message of its interrupt in the local APIC.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pando_vmm::arch::x86_64::regs::InitialRegisters;
use pando_vmm::machine::{HostCheck, Machine};
use pando_vmm::memory::guest::GuestRam;
use pando_vmm::memory::layout::{PCI_CONFIG_MEMORY, PCI_WINDOW};
use pando_vmm::spec::{DeviceKind, DeviceParts, MachineSpec};

use crate::program::{STACK, START};
use crate::support::{Wire, anonymous_ram, chain, copy_ram, spec};

const SLOT: u8 = 5;
/// How many requests there were, which is also the vector of the last, less [`FIRST_VECTOR`].
const COUNT: u32 = 0x20_0000;
const DESCRIPTORS: u32 = 0x20_1000;
const DRIVER_RING: u32 = 0x20_2000;
const DEVICE_RING: u32 = 0x20_3000;
const BUFFER: u32 = 0x20_4000;
const BUFFER_BYTES: u32 = 64;
const FIRST_VECTOR: u32 = 0x40;
/// Spurious interrupt vector register: bit 8 switches the local APIC on.
const APIC_SPURIOUS: u32 = 0xfee0_00f0;
/// Vectors 0x40 to 0x5f that were received and not served.
const APIC_RECEIVED: u32 = 0xfee0_0220;
const COM1: u32 = 0x3f8;

type Code = Result<(), IcedError>;

fn machine() -> MachineSpec {
    let rng = DeviceParts {
        id: None,
        slot: Some(SLOT),
        kind: DeviceKind::Rng,
    };
    spec(1).with_devices(vec![rng]).unwrap()
}

/// Prints `R` when the device is set up, or `x` where it is not what it should be. Then, for each byte
/// that comes, asks for entropy, waits for the answer and its interrupt, and prints `E`.
fn program() -> Result<Vec<u8>, IcedError> {
    let config = u32::try_from(PCI_CONFIG_MEMORY.start).unwrap() + (u32::from(SLOT) << 15);
    let bar = u32::try_from(PCI_WINDOW.start).unwrap() + 0x100_0000;
    let mut asm = CodeAssembler::new(32)?;
    let a = &mut asm;
    let mut wrong = a.create_label();
    let mut next = a.create_label();
    // By ports: who it is.
    a.mov(edx, 0xcf8)?;
    a.mov(eax, 0x8000_0000 | u32::from(SLOT) << 11)?;
    a.out(dx, eax)?;
    a.mov(edx, 0xcfc)?;
    a.in_(eax, dx)?;
    a.cmp(eax, 0x1044_1af4)?;
    a.jne(wrong)?;
    // By memory: moved, switched on, and its messages (the first capability).
    a.mov(dword_ptr(config + 0x10), bar)?;
    a.mov(dword_ptr(config + 0x14), 0)?;
    a.mov(dword_ptr(config + 0x04), 6)?;
    a.mov(dword_ptr(config + 0x40), 0x8000_0000_u32)?;
    a.mov(dword_ptr(APIC_SPURIOUS), 0x1ff)?;
    for (offset, value) in [(0, 0xfee0_0000_u32), (4, 0), (12, 0)] {
        a.mov(dword_ptr(bar + 0x4010 + offset), value)?;
    }
    for status in [0_u32, 1, 3] {
        set_status(a, bar, status)?;
    }
    a.mov(dword_ptr(bar + 8), 1)?;
    a.mov(dword_ptr(bar + 12), 1)?;
    set_status(a, bar, 0xb)?;
    a.mov(word_ptr(bar + 24), 16)?;
    a.mov(word_ptr(bar + 26), 1)?;
    for (offset, ring) in [(32, DESCRIPTORS), (40, DRIVER_RING), (48, DEVICE_RING)] {
        a.mov(dword_ptr(bar + offset), ring)?;
        a.mov(dword_ptr(bar + offset + 4), 0)?;
    }
    a.mov(word_ptr(bar + 28), 1)?;
    set_status(a, bar, 0xf)?;
    a.movzx(eax, byte_ptr(bar + 20))?;
    a.cmp(eax, 0xf)?;
    a.jne(wrong)?;
    print(a, b'R')?;
    a.set_label(&mut next)?;
    wait_for_byte(a)?;
    ask(a, bar)?;
    print(a, b'E')?;
    a.jmp(next)?;
    a.set_label(&mut wrong)?;
    print(a, b'x')?;
    a.jmp(next)?;
    a.assemble(START)
}

fn set_status(a: &mut CodeAssembler, bar: u32, status: u32) -> Code {
    a.mov(eax, status)?;
    a.mov(byte_ptr(bar + 20), al)
}

fn wait_for_byte(a: &mut CodeAssembler) -> Code {
    let mut again = a.create_label();
    a.nop()?;
    a.set_label(&mut again)?;
    a.mov(edx, COM1 + 5)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(again)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)
}

/// One request, with a vector of its own: nobody serves interrupts here.
fn ask(a: &mut CodeAssembler, bar: u32) -> Code {
    let mut used = a.create_label();
    let mut received = a.create_label();
    a.inc(dword_ptr(COUNT))?;
    a.mov(ecx, dword_ptr(COUNT))?;
    a.lea(eax, ecx + FIRST_VECTOR)?;
    a.mov(dword_ptr(bar + 0x4018), eax)?;
    a.mov(word_ptr(DRIVER_RING + 2), cx)?;
    a.mov(word_ptr(bar + 0x3000), 0)?;
    a.set_label(&mut used)?;
    a.nop()?;
    a.movzx(eax, word_ptr(DEVICE_RING + 2))?;
    a.cmp(eax, ecx)?;
    a.jne(used)?;
    a.mov(ebx, 1)?;
    a.shl(ebx, cl)?;
    a.set_label(&mut received)?;
    a.mov(eax, dword_ptr(APIC_RECEIVED))?;
    a.test(eax, ebx)?;
    a.jz(received)
}

fn print(a: &mut CodeAssembler, byte: u8) -> Code {
    a.mov(edx, COM1)?;
    a.mov(al, u32::from(byte))?;
    a.out(dx, al)
}

/// The program, and one descriptor for all requests.
fn load(ram: &GuestRam) -> InitialRegisters {
    ram.write(START, &program().unwrap()).unwrap();
    let mut descriptor = u64::from(BUFFER).to_le_bytes().to_vec();
    descriptor.extend(BUFFER_BYTES.to_le_bytes());
    // The device writes it.
    descriptor.extend([2, 0, 0, 0]);
    ram.write(DESCRIPTORS.into(), &descriptor).unwrap();
    let mut registers = InitialRegisters::pvh(START);
    registers.general.rsp = STACK;
    registers
}

fn buffer(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    ram.read(BUFFER.into(), &mut bytes).unwrap();
    bytes
}

#[test]
fn a_guest_uses_a_device_and_its_clones_go_on_with_it() {
    let ram = anonymous_ram();
    let registers = load(&ram);
    let (mut wire, target) = Wire::new();
    let machine = Machine::boot_at(&machine(), ram, &registers, target)
        .unwrap_or_else(|error| panic!("these tests need KVM: {}", chain(&error)));
    let machine = machine.resume().unwrap();
    wire.expect("R");
    for _ in 0..3 {
        wire.ask(b'e', "E");
    }
    let machine = machine.pause().unwrap();
    let state = machine.save().unwrap();
    let kinds: Vec<_> = state.devices.iter().map(|d| d.kind.as_str()).collect();
    assert_eq!(kinds, ["serial", "pci", "pci-hotplug", "virtio-rng"]);
    let before = buffer(machine.ram());
    assert!(before.iter().any(|&byte| byte != 0));
    let mut seen = vec![before];
    for _ in 0..2 {
        let (mut wire, target) = Wire::new();
        let ram = copy_ram(machine.ram());
        let clone =
            Machine::restore(&self::machine(), ram, &state, target, HostCheck::Due).unwrap();
        assert_eq!(clone.save().unwrap().devices, state.devices);
        let clone = clone.resume().unwrap();
        for _ in 0..3 {
            wire.ask(b'e', "E");
        }
        let clone = clone.pause().unwrap();
        let entropy = buffer(clone.ram());
        assert!(
            !seen.contains(&entropy),
            "two machines have the same entropy"
        );
        seen.push(entropy);
        // Nothing is left that holds the memory.
        clone.into_ram().unwrap();
    }
}

#[test]
fn a_state_with_other_devices_is_refused_by_name() {
    let ram = anonymous_ram();
    let registers = load(&ram);
    let (_wire, target) = Wire::new();
    let machine = Machine::boot_at(&machine(), ram, &registers, target).unwrap();
    let state = machine.save().unwrap();
    let refused = |spec: &MachineSpec| {
        let (_wire, target) = Wire::new();
        let error = Machine::restore(spec, anonymous_ram(), &state, target, HostCheck::Due);
        chain(&error.err().unwrap())
    };
    assert!(refused(&spec(1)).contains("has a device \"pci\" that this machine does not have"));
    let part = |id: &str, slot| DeviceParts {
        id: Some(id.to_owned()),
        slot: Some(slot),
        kind: DeviceKind::Rng,
    };
    let with = |parts| spec(1).with_devices(parts).unwrap();
    let other = refused(&with(vec![part("other", SLOT)]));
    assert!(other.contains("has a device \"virtio-rng\""), "{other}");
    let moved = refused(&with(vec![part("rng0", 6)]));
    assert!(
        moved.contains("it was in PCI slot 5, the machine has it in 6"),
        "{moved}"
    );
    let more = refused(&with(vec![part("rng0", SLOT), part("rng1", 6)]));
    assert!(
        more.contains("lacks the device \"virtio-rng rng1\""),
        "{more}"
    );
}
