#![forbid(unsafe_code)]
//! Devices that come and go on real KVM: a guest that does as it is told with ports and memory, so that these
//! tests are its system.

use std::cell::RefCell;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pando_vmm::arch::x86_64::ports::{PCI_HOTPLUG_GSI, PCI_HOTPLUG_PORTS};
use pando_vmm::arch::x86_64::regs::InitialRegisters;
use pando_vmm::device::virtio::block::backend::Disk;
use pando_vmm::machine::{
    Attachment, Connections, DeviceNews, HostCheck, Machine, MachineError, MachineHandle,
    MachineState, Paused, Running,
};
use pando_vmm::memory::guest::GuestRam;
use pando_vmm::memory::layout::{IO_APIC_BASE, PCI_CONFIG_MEMORY};
use pando_vmm::spec::{DeviceKind, DeviceParts, DeviceSpec, DiskAccess, DiskParts, MachineSpec};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::program::{STACK, START};
use crate::support::{PATIENCE, Wire, anonymous_ram, chain, copy_ram, spec};

const COM1: u32 = 0x3f8;
const SLOT: u8 = 5;
const VECTOR: u32 = 0x40;
/// Spurious interrupt vector register: bit 8 switches the local APIC on.
const APIC_SPURIOUS: u32 = 0xfee0_00f0;
/// Vectors 0x40 to 0x5f that were received and not served.
const APIC_RECEIVED: u32 = 0xfee0_0220;
/// Registers of the hot-plug block, behind its first port.
const PLUGGED: u16 = 0;
const UNPLUG: u16 = 4;
const EJECT: u16 = 8;
const OUTCOME: u16 = 12;
const RNG: u32 = 0x1044_1af4;
const NOTHING: u32 = u32::MAX;

/// Orders, each with an address and a value of four bytes; four bytes come back.
const IN: u8 = 0;
const OUT: u8 = 1;
const LOAD: u8 = 2;
const STORE: u8 = 3;

/// Prints `R`, then does order after order.
fn program() -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(32)?;
    let a = &mut asm;
    let [mut next, mut word, mut byte, mut again] = [(); 4].map(|()| a.create_label());
    let [mut output, mut load, mut store, mut reply, mut more] = [(); 5].map(|()| a.create_label());
    a.mov(edx, COM1)?;
    a.mov(eax, u32::from(b'R'))?;
    a.out(dx, al)?;
    a.set_label(&mut next)?;
    a.call(byte)?;
    a.movzx(esi, al)?;
    a.call(word)?;
    a.mov(edi, ebp)?;
    a.call(word)?;
    a.mov(ebx, ebp)?;
    for (order, label) in [(OUT, output), (LOAD, load), (STORE, store)] {
        a.cmp(esi, i32::from(order))?;
        a.je(label)?;
    }
    a.mov(edx, edi)?;
    a.in_(eax, dx)?;
    a.mov(ebx, eax)?;
    a.jmp(reply)?;
    a.set_label(&mut output)?;
    a.mov(edx, edi)?;
    a.mov(eax, ebx)?;
    a.out(dx, eax)?;
    a.jmp(reply)?;
    a.set_label(&mut load)?;
    a.mov(ebx, dword_ptr(edi))?;
    a.jmp(reply)?;
    a.set_label(&mut store)?;
    a.mov(dword_ptr(edi), ebx)?;
    a.set_label(&mut reply)?;
    a.mov(ecx, 4)?;
    a.set_label(&mut more)?;
    a.mov(edx, COM1)?;
    a.mov(eax, ebx)?;
    a.out(dx, al)?;
    a.shr(ebx, 8)?;
    a.dec(ecx)?;
    a.jnz(more)?;
    a.jmp(next)?;
    // Four bytes into ebp, the lowest first.
    a.set_label(&mut word)?;
    a.xor(ebp, ebp)?;
    for _ in 0..4 {
        a.call(byte)?;
        a.movzx(eax, al)?;
        a.or(ebp, eax)?;
        a.ror(ebp, 8)?;
    }
    a.ret()?;
    a.set_label(&mut byte)?;
    a.mov(edx, COM1 + 5)?;
    a.set_label(&mut again)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(again)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)?;
    a.ret()?;
    a.assemble(START)
}

fn load(ram: &GuestRam) -> InitialRegisters {
    ram.write(START, &program().unwrap()).unwrap();
    let mut registers = InitialRegisters::pvh(START);
    registers.general.rsp = STACK;
    registers
}

/// What a guest is told to do.
struct Guest(Wire);

impl Guest {
    fn order(&mut self, order: u8, address: u32, value: u32) -> u32 {
        let mut bytes = vec![order];
        bytes.extend(address.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        u32::from_le_bytes(self.0.exchange(&bytes))
    }

    fn read(&mut self, register: u16) -> u32 {
        let port = PCI_HOTPLUG_PORTS.start + register;
        self.order(IN, port.into(), 0)
    }

    fn write(&mut self, register: u16, value: u32) {
        let port = PCI_HOTPLUG_PORTS.start + register;
        self.order(OUT, port.into(), value);
    }

    /// A register of the function in a place.
    fn config(&mut self, slot: u8, register: u32) -> u32 {
        let base = u32::try_from(PCI_CONFIG_MEMORY.start).unwrap();
        self.order(LOAD, base + (u32::from(slot) << 15) + register, 0)
    }

    /// Has the interrupt of devices that come and go as a vector that nobody serves.
    fn listen(&mut self) {
        let io_apic = u32::try_from(IO_APIC_BASE).unwrap();
        self.order(STORE, APIC_SPURIOUS, 0x1ff);
        let entry = 0x10 + PCI_HOTPLUG_GSI * 2;
        // To CPU 0, level triggered.
        for (register, value) in [(entry + 1, 0), (entry, 1 << 15 | VECTOR)] {
            self.order(STORE, io_apic, register);
            self.order(STORE, io_apic + 0x10, value);
        }
    }

    fn is_told(&mut self) -> bool {
        self.order(LOAD, APIC_RECEIVED, 0) & 1 != 0
    }
}

fn machine() -> MachineSpec {
    spec(1).with_pci(true)
}

fn with(parts: Vec<DeviceParts>) -> MachineSpec {
    machine().with_devices(parts).unwrap()
}

fn rng(id: &str, slot: u8) -> DeviceParts {
    DeviceParts {
        id: Some(id.to_owned()),
        slot: Some(slot),
        kind: DeviceKind::Rng,
    }
}

fn only(part: DeviceParts) -> DeviceSpec {
    with(vec![part]).devices()[0].clone()
}

fn boot(spec: &MachineSpec) -> (Machine<Paused>, Guest) {
    let ram = anonymous_ram();
    let registers = load(&ram);
    let (wire, target) = Wire::new();
    match Machine::boot_at(spec, ram, &registers, target) {
        Ok(machine) => (machine, Guest(wire)),
        Err(error) => panic!("these tests need KVM: {}", chain(&error)),
    }
}

fn run(spec: &MachineSpec) -> (Machine<Running>, MachineHandle, Guest) {
    let (machine, mut guest) = boot(spec);
    let machine = machine.resume().unwrap();
    guest.0.expect("R");
    let handle = machine.handle();
    (machine, handle, guest)
}

fn clone_of(
    spec: &MachineSpec,
    of: &Machine<Paused>,
    state: &MachineState,
) -> (Machine<Running>, Guest) {
    let (wire, target) = Wire::new();
    let ram = copy_ram(of.ram());
    let clone = Machine::restore(spec, ram, state, target, HostCheck::Due).unwrap();
    assert_eq!(clone.save().unwrap().devices, state.devices);
    (clone.resume().unwrap(), Guest(wire))
}

#[test]
fn disks_and_entropy_come_and_go_fifty_times() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let open = || Disk::open(image.path(), DiskAccess::Write, &std::env::temp_dir());
    let disk = DeviceParts {
        id: Some("disk".into()),
        slot: Some(31),
        kind: DeviceKind::Block(DiskParts {
            path: image.path().to_owned(),
            ..DiskParts::default()
        }),
    };
    let (rng, disk) = (only(rng("rng", SLOT)), only(disk));
    let (machine, handle, mut guest) = run(&machine());
    let news = handle.watch();
    guest.listen();
    for round in 0..50 {
        assert_eq!(guest.config(SLOT, 0), NOTHING);
        handle.plug(rng.clone(), Attachment::Nothing).unwrap();
        handle.plug(disk.clone(), open().unwrap().into()).unwrap();
        open().unwrap_err();
        assert!(guest.is_told(), "round {round}");
        assert_eq!(guest.read(PLUGGED), 1 << SLOT | 1 << 31);
        assert_eq!(
            (guest.config(SLOT, 0), guest.config(31, 0)),
            (RNG, 0x1042_1af4)
        );
        assert_eq!(guest.config(SLOT, 0x10), 4, "no address, 64 bits");
        assert_eq!(guest.config(SLOT, 4) & 0xffff, 0, "switched off");
        for (id, slot) in [("rng", SLOT), ("disk", 31)] {
            handle.unplug(id).unwrap();
            assert_eq!(guest.read(UNPLUG), 1 << slot);
            guest.write(EJECT, 1 << slot);
            let gone = news.recv_timeout(PATIENCE).unwrap();
            assert_eq!(gone, DeviceNews::Gone { id: id.to_owned() });
            assert_eq!(guest.config(slot, 0), NOTHING);
        }
        // Its file is closed.
        drop(open().unwrap());
    }
    assert_eq!(handle.devices().unwrap(), Vec::<String>::new());
    // Nothing is left that holds the memory.
    machine.pause().unwrap().into_ram().unwrap();
}

#[test]
fn what_a_guest_has_not_heard_is_kept_over_a_freeze() {
    let (machine, handle, mut guest) = run(&with(vec![rng("old", 1)]));
    handle
        .plug(only(rng("new", SLOT)), Attachment::Nothing)
        .unwrap();
    handle.unplug("old").unwrap();
    // It does not listen yet, and the line stays raised.
    guest.listen();
    assert!(guest.is_told());
    let machine = machine.pause().unwrap();
    let state = machine.save().unwrap();
    let both = with(vec![rng("old", 1), rng("new", SLOT)]);
    for _ in 0..2 {
        let (clone, mut guest) = clone_of(&both, &machine, &state);
        let news = clone.handle().watch();
        assert!(guest.is_told());
        assert_eq!((guest.read(PLUGGED), guest.read(UNPLUG)), (1 << SLOT, 2));
        assert_eq!(guest.config(SLOT, 0), RNG);
        guest.write(EJECT, 2);
        let gone = news.recv_timeout(PATIENCE).unwrap();
        assert_eq!(gone, DeviceNews::Gone { id: "old".into() });
        // A clone of the clone has not got what went.
        let clone = clone.pause().unwrap();
        let state = clone.save().unwrap();
        let left = with(vec![rng("new", SLOT)]);
        let (_second, mut guest) = clone_of(&left, &clone, &state);
        assert_eq!((guest.config(1, 0), guest.config(SLOT, 0)), (NOTHING, RNG));
        assert_eq!((guest.read(PLUGGED), guest.read(UNPLUG)), (0, 0));
    }
}

#[test]
fn a_machine_that_stands_still_is_plugged_and_its_guest_finds_it() {
    let (machine, mut guest) = boot(&machine());
    let handle = machine.handle();
    handle
        .plug(only(rng("rng", SLOT)), Attachment::Nothing)
        .unwrap();
    assert_eq!(handle.devices().unwrap(), ["rng"]);
    let machine = machine.resume().unwrap();
    guest.0.expect("R");
    assert_eq!(
        (guest.read(PLUGGED), guest.config(SLOT, 0)),
        (1 << SLOT, RNG)
    );
    let machine = machine.pause().unwrap();
    handle.unplug("rng").unwrap();
    let functions = handle.functions().unwrap();
    let seen: Vec<_> = functions.iter().map(|f| (f.slot, f.is_going)).collect();
    assert_eq!(seen, [(0, false), (SLOT, true)]);
    let machine = machine.resume().unwrap();
    assert_eq!(guest.read(UNPLUG), 1 << SLOT);
    drop(machine);
}

#[test]
fn a_clone_is_given_what_its_original_had_not() {
    let (original, _handle, mut guest) = run(&with(vec![rng("old", 1)]));
    guest.listen();
    assert!(!guest.is_told());
    let original = original.pause().unwrap();
    let state = original.save().unwrap();
    let spec = with(vec![rng("old", 1)]);
    let restore = |device: DeviceSpec| {
        let (wire, target) = Wire::new();
        let to = Connections {
            plugged: vec![(device, Attachment::Nothing)],
            ..Connections::from(target)
        };
        let ram = copy_ram(original.ram());
        let clone = Machine::restore(&spec, ram, &state, to, HostCheck::Due);
        clone.map(|clone| (clone, Guest(wire)))
    };
    for _ in 0..2 {
        let (clone, mut guest) = restore(only(rng("new", SLOT))).unwrap();
        let clone = clone.resume().unwrap();
        assert!(guest.is_told());
        assert_eq!((guest.read(PLUGGED), guest.read(UNPLUG)), (1 << SLOT, 0));
        assert_eq!((guest.config(1, 0), guest.config(SLOT, 0)), (RNG, RNG));
        assert_eq!(guest.config(SLOT, 0x10), 4, "no address");
        assert_eq!(clone.handle().devices().unwrap(), ["old", "new"]);
    }
    let taken = restore(only(rng("new", 1))).map(|_| ()).unwrap_err();
    assert!(
        matches!(taken, MachineError::Taken { slot: 1, .. }),
        "{taken}"
    );
}

#[test]
fn a_guest_that_does_not_let_go_says_so_and_may_be_asked_again() {
    let (_machine, handle, mut guest) = run(&with(vec![rng("rng", SLOT)]));
    let news = handle.watch();
    for _ in 0..2 {
        handle.unplug("rng").unwrap();
        handle.unplug("rng").unwrap();
        // One that has been asked and says nothing keeps its name and its place.
        for (id, slot) in [("rng", 9), ("other", SLOT)] {
            let taken = handle
                .plug(only(rng(id, slot)), Attachment::Nothing)
                .unwrap_err();
            assert!(matches!(taken, MachineError::Taken { .. }), "{taken}");
        }
        assert_eq!(guest.read(UNPLUG), 1 << SLOT);
        for _ in 0..3 {
            guest.write(OUTCOME, u32::from(SLOT) | 3 << 8 | 0x81 << 16);
        }
        let (id, status) = ("rng".to_owned(), 0x81);
        let kept = news.recv_timeout(PATIENCE).unwrap();
        assert_eq!(kept, DeviceNews::Kept { id, status });
    }
    assert_eq!(handle.devices().unwrap(), ["rng"]);
    assert!(news.is_empty());
}

#[test]
fn what_cannot_be_plugged_is_refused_by_name() {
    let (_machine, handle, _guest) = run(&with(vec![rng("rng", SLOT)]));
    let plug = |id, slot| {
        handle
            .plug(only(rng(id, slot)), Attachment::Nothing)
            .unwrap_err()
    };
    assert!(matches!(
        plug("rng", 9),
        MachineError::Taken { slot: 9, .. }
    ));
    assert!(matches!(
        plug("other", SLOT),
        MachineError::Taken { slot: SLOT, .. }
    ));
    let nobody = handle.unplug("other").unwrap_err();
    assert!(matches!(nobody, MachineError::NoDevice { .. }));
    let (_machine, handle, _guest) = run(&spec(1));
    let no_bus = handle
        .plug(only(rng("rng", SLOT)), Attachment::Nothing)
        .unwrap_err();
    assert!(matches!(no_bus, MachineError::NoPci), "{no_bus}");
    assert!(handle.functions().unwrap().is_empty());
}

#[test]
fn a_guest_that_writes_anything_at_any_time_stops_nobody() {
    let (_machine, handle, mut guest) = run(&machine());
    let news = handle.watch();
    guest.listen();
    let step = (0_u8..4, 1_u8..8, 0_u16..4, any::<u32>());
    let steps = proptest::collection::vec(step, 1..40);
    // What was plugged, what has gone, and the guest that all cases have.
    let all = RefCell::new((0_usize, 0_usize, guest));
    TestRunner::new(ProptestConfig::with_cases(12))
        .run(&steps, |steps| {
            let (plugged, gone, guest) = &mut *all.borrow_mut();
            for (what, slot, register, value) in &steps {
                let id = format!("rng{slot}");
                match what {
                    0 => {
                        *plugged += usize::from(
                            handle
                                .plug(only(rng(&id, *slot)), Attachment::Nothing)
                                .is_ok(),
                        )
                    }
                    1 => drop(handle.unplug(&id)),
                    2 => guest.write(register * 4, *value),
                    _ => {
                        guest.read(register * 4);
                    }
                }
            }
            let devices = handle.devices().unwrap().len();
            let news = news.try_iter();
            *gone += news
                .filter(|n| matches!(n, DeviceNews::Gone { .. }))
                .count();
            prop_assert_eq!(devices, *plugged - *gone);
            Ok(())
        })
        .unwrap();
    let (.., mut guest) = all.into_inner();
    guest.write(EJECT, u32::MAX);
    assert!(handle.devices().unwrap().is_empty());
}
