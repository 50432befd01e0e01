#![forbid(unsafe_code)]
//! A guest with a vsock device on real KVM: a program of the host reaches it, and its clones have a context
//! ID and a socket of their own, and hear that their connections are gone before they run.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pando_vmm::arch::x86_64::regs::InitialRegisters;
use pando_vmm::device::virtio::vsock::backend::{HostSide, VsockConnection};
use pando_vmm::machine::{Connections, HostCheck, Machine};
use pando_vmm::memory::guest::GuestRam;
use pando_vmm::memory::layout::{PCI_CONFIG_MEMORY, PCI_WINDOW};
use pando_vmm::spec::{DeviceKind, DeviceParts, MachineSpec, VsockParts};

use crate::program::{STACK, START};
use crate::support::{Wire, anonymous_ram, chain, copy_ram, spec};

const SLOT: u8 = 5;
/// Queue `n` has its descriptors at `n` times [`QUEUE_BYTES`] from here, then its rings.
const QUEUES: u32 = 0x20_0000;
const QUEUE_BYTES: u32 = 0x3000;
const QUEUE_COUNT: u32 = 3;
const RECEIVE: u32 = 0;
const EVENT: u32 = 2;
/// Room for one packet, and for one piece of news.
const PACKET: u32 = 0x24_0000;
const NEWS: u32 = 0x24_8000;
const COM1: u32 = 0x3f8;
/// Spurious interrupt vector register: bit 8 switches the local APIC on.
const APIC_SPURIOUS: u32 = 0xfee0_00f0;
/// Vectors 0x40 to 0x5f that were received and not served.
const APIC_RECEIVED: u32 = 0xfee0_0220;
/// The vector of the receive queue; the event queue has the next.
const FIRST_VECTOR: u32 = 0x40;
/// The context ID of the first machine: clones have the letters behind it.
const CID: u8 = b'A';

type Code = Result<(), IcedError>;

fn machine() -> MachineSpec {
    let vsock = DeviceParts {
        id: None,
        slot: Some(SLOT),
        kind: DeviceKind::Vsock(VsockParts {
            cid: CID.into(),
            path: None,
        }),
    };
    spec(1).with_devices(vec![vsock]).unwrap()
}

fn connection(cid: u8, path: &Path) -> VsockConnection {
    VsockConnection {
        cid: Some(cid.into()),
        host: Some(HostSide::listen(path).unwrap()),
    }
}

/// Prints `R` when the device is set up. Then, for each byte that comes, how many packets it has, how much
/// news, its context ID as a letter, and of which it was interrupted: 1 for packets, 2 for news.
fn program() -> Result<Vec<u8>, IcedError> {
    let config = u32::try_from(PCI_CONFIG_MEMORY.start).unwrap() + (u32::from(SLOT) << 15);
    let bar = u32::try_from(PCI_WINDOW.start).unwrap() + 0x100_0000;
    let mut asm = CodeAssembler::new(32)?;
    let a = &mut asm;
    let mut next = a.create_label();
    a.mov(dword_ptr(config + 0x10), bar)?;
    a.mov(dword_ptr(config + 0x14), 0)?;
    a.mov(dword_ptr(config + 0x04), 6)?;
    // Its messages.
    a.mov(dword_ptr(config + 0x40), 0x8000_0000_u32)?;
    a.mov(dword_ptr(APIC_SPURIOUS), 0x1ff)?;
    for entry in [0, 1] {
        let words = [0xfee0_0000, 0, FIRST_VECTOR + entry, 0];
        for (word, value) in (0..).zip(words) {
            a.mov(dword_ptr(bar + 0x4000 + entry * 16 + word * 4), value)?;
        }
    }
    for status in [0_u32, 1, 3] {
        set_status(a, bar, status)?;
    }
    a.mov(dword_ptr(bar + 8), 1)?;
    a.mov(dword_ptr(bar + 12), 1)?;
    set_status(a, bar, 0xb)?;
    for queue in 0..QUEUE_COUNT {
        let base = QUEUES + queue * QUEUE_BYTES;
        a.mov(word_ptr(bar + 22), queue)?;
        a.mov(word_ptr(bar + 24), 16)?;
        a.mov(word_ptr(bar + 26), u32::from(queue == EVENT))?;
        for (offset, place) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
            a.mov(dword_ptr(bar + offset), base + place)?;
            a.mov(dword_ptr(bar + offset + 4), 0)?;
        }
        a.mov(word_ptr(bar + 28), 1)?;
    }
    set_status(a, bar, 0xf)?;
    for queue in [RECEIVE, EVENT] {
        a.mov(word_ptr(bar + 0x3000 + queue * 4), queue)?;
    }
    a.mov(al, u32::from(b'R'))?;
    print(a)?;
    a.set_label(&mut next)?;
    wait_for_byte(a)?;
    for queue in [RECEIVE, EVENT] {
        a.mov(al, byte_ptr(QUEUES + queue * QUEUE_BYTES + 0x2002))?;
        a.add(al, u32::from(b'0').cast_signed())?;
        print(a)?;
    }
    a.mov(al, byte_ptr(bar + 0x2000))?;
    print(a)?;
    a.mov(eax, dword_ptr(APIC_RECEIVED))?;
    a.add(al, u32::from(b'0').cast_signed())?;
    print(a)?;
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

/// What is in `al`.
fn print(a: &mut CodeAssembler) -> Code {
    a.mov(edx, COM1)?;
    a.out(dx, al)
}

/// The program, and room in two queues.
fn load(ram: &GuestRam) -> InitialRegisters {
    ram.write(START, &program().unwrap()).unwrap();
    for (queue, address, bytes) in [(RECEIVE, PACKET, 4096_u32), (EVENT, NEWS, 8)] {
        let base = u64::from(QUEUES + queue * QUEUE_BYTES);
        let mut descriptor = u64::from(address).to_le_bytes().to_vec();
        descriptor.extend(bytes.to_le_bytes());
        // The device writes it.
        descriptor.extend([2, 0, 0, 0]);
        ram.write(base, &descriptor).unwrap();
        ram.write(base + 0x1002, &1_u16.to_le_bytes()).unwrap();
    }
    let mut registers = InitialRegisters::pvh(START);
    registers.general.rsp = STACK;
    registers
}

#[test]
fn clones_have_context_ids_and_sockets_of_their_own_and_hear_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let ram = anonymous_ram();
    let registers = load(&ram);
    let (mut wire, target) = Wire::new();
    let to = Connections {
        vsock: Some(connection(CID, &path("template"))),
        ..target.into()
    };
    let machine = Machine::boot_at(&machine(), ram, &registers, to)
        .unwrap_or_else(|error| panic!("these tests need KVM: {}", chain(&error)));
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'?', "00A0");
    let mut program = UnixStream::connect(path("template")).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    while wire.answer(b'?', 4) != "10A1" {}
    let machine = machine.pause().unwrap();
    let mut packet = [0; 44];
    machine.ram().read(PACKET.into(), &mut packet).unwrap();
    // From the host, to this guest's port 52: a request for a stream.
    assert_eq!((packet[0], packet[8], packet[20]), (2, CID, 52));
    assert_eq!((packet[28], packet[30]), (1, 1));
    let state = machine.save().unwrap();
    let kinds: Vec<_> = state.devices.iter().map(|d| d.kind.as_str()).collect();
    assert_eq!(kinds, ["serial", "pci", "pci-hotplug", "virtio-vsock"]);
    for (cid, is_bound_later) in [(b'B', false), (b'C', true)] {
        let (mut wire, target) = Wire::new();
        let ram = copy_ram(machine.ram());
        let own = path(&cid.to_string());
        let clone = if is_bound_later {
            let clone = Machine::restore(&self::machine(), ram, &state, target, HostCheck::Due);
            let clone = clone.unwrap();
            assert_eq!(clone.save().unwrap().devices, state.devices);
            clone.bind_vsock(connection(cid, &own)).unwrap();
            clone.resume().unwrap()
        } else {
            let to = Connections {
                vsock: Some(connection(cid, &own)),
                ..target.into()
            };
            Machine::restore_and_run(&self::machine(), ram, &state, to, HostCheck::Due, |_| ())
                .unwrap()
        };
        wire.ask(b'?', &format!("11{}3", char::from(cid)));
        UnixStream::connect(&own).unwrap();
        let clone = clone.pause().unwrap();
        let mut news = [0xee; 4];
        clone.ram().read(NEWS.into(), &mut news).unwrap();
        assert_eq!(news, [0; 4]);
        // Nothing is left that holds the memory, or the socket.
        clone.into_ram().unwrap();
        assert!(!own.exists());
    }
}
