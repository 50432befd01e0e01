#![forbid(unsafe_code)]
//! State files. The first byte says how the rest becomes one:
//!
//! 0. it is the file;
//! 1. it is the body, behind a right header;
//! 2. it is the body, whose own parts get right headers, and RAM behind it; the rest of that byte
//!    says how the machine that loads it is made;
//! 3. it is what the file says of a backend's pages, and RAM.

use std::fs;
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use pando_vmm::arch::x86_64::regs::InitialRegisters;
use pando_vmm::device::legacy::console::SerialTarget;
use pando_vmm::machine::Machine;
use pando_vmm::machine::state::{DeviceRecord, MachineState, VmState};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::memory::layout::RamLayout;
use pando_vmm::qemu::hmp;
use pando_vmm::qemu::migration::file::{FORMAT, StateFile};
use pando_vmm::qemu::migration::ram::{self, Contents, Placement};
use pando_vmm::qemu::migration::state::{SavedBackend, SavedContent, SavedMachine, SavedTopology};
use pando_vmm::qemu::vm::Vm;
use pando_vmm::spec::{BackendSpec, CpuCount, MachineSpec};
use pando_vmm::template::seal::Seal;
use pando_vmm::template::state_file;
use pando_vmm::vcpu::state::{SAVE_ORDER, SavedCpuid, VcpuState};

use crate::monitor::{OWN_RAM, file, machine};
use crate::template::{INDEX, STATE};
use crate::{parts, scratch};

const MAGIC: [u8; 8] = *b"PANDOMG\0";
const RAM_BYTES: u64 = 4 << 20;
const CLONE: &str = "memory-backend-file,id=ram,size=4M,mem-path=ram,share=off,readonly=on,rom=off";

/// Takes a state file.
pub fn run(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else {
        return;
    };
    match first % 4 {
        0 => _ = read(rest),
        1 => _ = read(&parts::framed(MAGIC, FORMAT, rest)),
        2 => load(first / 4, rest),
        _ => load_ram(rest),
    }
}

fn read(bytes: &[u8]) -> Option<SavedMachine> {
    let mut state = state_of(bytes);
    state.read_head().ok().map(|(saved, _)| saved)
}

fn state_of(bytes: &[u8]) -> StateFile {
    StateFile {
        file: file(bytes),
        path: PathBuf::from("state"),
        offset_bytes: 0,
        can_seek: true,
        is_regular: true,
    }
}

/// Has a machine load it, as far as that goes without KVM.
fn load(how: u8, bytes: &[u8]) {
    let Ok((mut saved, ram)) = postcard::take_from_bytes::<SavedMachine>(bytes) else {
        return;
    };
    saved.machine = parts::framed(STATE.0, STATE.1, &saved.machine);
    for backend in &mut saved.backends {
        if let SavedContent::LeftOut { index, .. } = &mut backend.content {
            *index = parts::framed(INDEX.0, INDEX.1, index);
        }
    }
    let _ = state_file::decode(Path::new("state"), &saved.machine);
    scratch::enter();
    let body = postcard::to_stdvec(&saved).unwrap_or_default();
    let mut content = parts::framed(MAGIC, FORMAT, &body);
    content.resize(content.len().next_multiple_of(4096), 0);
    content.extend(ram);
    let written = fs::write("state", &content).and_then(|()| fs::write("ram", [0; 4096]));
    written.expect("the scratch directory can be written");
    let _ = fs::OpenOptions::new()
        .write(true)
        .open("ram")
        .and_then(|file| file.set_len(RAM_BYTES));
    let backend = if how & 1 == 0 { OWN_RAM } else { CLONE };
    let is_asked = how & 2 != 0;
    let incoming = if is_asked { "defer" } else { "file:state" };
    if let Some(mut vm) = machine(backend, &["-incoming", incoming]) {
        if is_asked {
            ask(&mut vm, how);
        }
        vm.begin();
    }
    scratch::clean();
}

/// As a monitor asks, with capabilities.
fn ask(vm: &mut Vm, how: u8) {
    let names = ["validate-uuid", "x-ignore-shared", "mapped-ram"];
    for (bit, name) in names.iter().enumerate() {
        if how >> (2 + bit) & 1 != 0 {
            hmp::execute(vm, &format!("migrate_set_capability {name} on"));
        }
    }
    hmp::execute(vm, "migrate_incoming file:state");
}

/// RAM out of a file, whatever that says of it.
fn load_ram(bytes: &[u8]) {
    let Ok(((runs, checksum, mapped), ram)) =
        postcard::take_from_bytes::<(Vec<(u64, u64)>, u64, bool)>(bytes)
    else {
        return;
    };
    let memory = small_ram();
    let saved = Contents { runs, checksum };
    let placement = if mapped {
        Placement::Mapped(0)
    } else {
        Placement::Packed
    };
    let mut input = file(ram);
    if ram::load(&memory, 0, &saved, placement, &mut input).is_err() {
        return;
    }
    let go_on = AtomicBool::new(false);
    let found = ram::contents(&memory, 0, RAM_BYTES, &go_on).expect("memory can be read");
    let mut output = file(b"");
    ram::save(&memory, 0, &found.runs, placement, &mut output, &go_on).expect("and saved");
    output.rewind().expect("and read again");
    ram::load(&small_ram(), 0, &found, placement, &mut output).expect("with the same content");
}

fn small_ram() -> GuestRam {
    let layout = RamLayout::new(&[RAM_BYTES]).expect("the layout is right");
    let backing = RamBacking::anonymous(RAM_BYTES).expect("memory can be had");
    GuestRam::new(layout, vec![backing]).expect("the memory fits")
}

/// A state of each kind. Where there is KVM, one of them is that of a real machine.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for machine in [Some(machine_state()), real_machine_state()]
        .iter()
        .flatten()
    {
        for (is_clone, content) in contents() {
            for mapped_ram in [false, true] {
                let saved = saved(content.clone(), (is_clone, mapped_ram), machine);
                let body = postcard::to_stdvec(&saved).unwrap_or_default();
                seeds.push(parts::of(0, &parts::framed(MAGIC, FORMAT, &body)));
                seeds.push(parts::of(1, &body));
                let asks = 2 | 4 | u8::from(is_clone) << 3 | u8::from(mapped_ram) << 4;
                let ram = [body, vec![7; 4096]].concat();
                for how in [0, asks] {
                    seeds.push(parts::of(2 + 4 * (how | u8::from(is_clone)), &ram));
                }
            }
        }
    }
    for mapped in [false, true] {
        for (runs, checksum) in [(vec![(0_u64, 1_u64)], SEVENS), (Vec::new(), NOTHING)] {
            let head = postcard::to_stdvec(&(runs, checksum, mapped)).unwrap_or_default();
            seeds.push(parts::of(3, &[head, vec![7; 4096]].concat()));
        }
    }
    seeds
}

/// Where RAM is: whether it is a clone's, and what the state says.
fn contents() -> [(bool, SavedContent); 3] {
    let here = |runs, checksum| SavedContent::Here { runs, checksum };
    let left_out = SavedContent::LeftOut {
        offset_bytes: 0,
        seal: Seal {
            inode: 1,
            bytes: RAM_BYTES,
            mtime_s: 1,
            mtime_ns: 1,
        },
        index: crate::template::index_body("ram", RAM_BYTES / 4096, false),
    };
    [
        (false, here(vec![(0, 1)], SEVENS)),
        (false, here(Vec::new(), NOTHING)),
        (true, left_out),
    ]
}

/// XXH3-64 of a page of sevens.
const SEVENS: u64 = 0x63a6_bf87_74b6_859d;
/// XXH3-64 of no bytes.
const NOTHING: u64 = 0x2d06_8005_38d3_94c2;

/// The state of a machine that KVM has just made.
fn real_machine_state() -> Option<MachineState> {
    let cpus = CpuCount::new(1).ok()?;
    let spec = MachineSpec::new(cpus, vec![BackendSpec::new("ram", RAM_BYTES).ok()?]).ok()?;
    let begin = InitialRegisters::linux64(0);
    let machine = Machine::boot_at(&spec, small_ram(), &begin, SerialTarget::Null).ok()?;
    machine.save().ok()
}

fn saved(
    content: SavedContent,
    (ignore_shared, mapped_ram): (bool, bool),
    machine: &MachineState,
) -> SavedMachine {
    SavedMachine {
        kind: "pc-q35-10.0".into(),
        cpus: 1,
        status: "paused".into(),
        has_program: true,
        uuid: Some([0; 16]),
        ignore_shared,
        mapped_ram,
        backends: vec![SavedBackend {
            id: "ram".into(),
            bytes: RAM_BYTES,
            guest_address: 0,
            is_rom: false,
            content,
        }],
        topology: SavedTopology::default(),
        machine: postcard::to_stdvec(machine).unwrap_or_default(),
    }
}

/// A state with each part, none of which is what KVM would give.
pub(crate) fn machine_state() -> MachineState {
    MachineState {
        cpus: vec![VcpuState {
            cpuid: vec![SavedCpuid {
                function: 1,
                index: 0,
                flags: 0,
                registers: [0; 4],
            }],
            sections: SAVE_ORDER.iter().map(|&part| (part, vec![0; 8])).collect(),
            msrs: vec![(0x10, 1)],
        }],
        vm: VmState {
            pic_master: vec![0; 8],
            pic_slave: vec![0; 8],
            io_apic: vec![0; 8],
            pit: vec![0; 8],
            clock_ns: 1,
            realtime_ns: Some(1),
        },
        devices: vec![DeviceRecord {
            kind: "serial".into(),
            version: 1,
            body: vec![0; 10],
        }],
        tsc_khz: None,
    }
}

/// Names in states.
pub fn words() -> Vec<String> {
    let words = [
        "PANDOMG",
        "pc-q35-10.0",
        "paused",
        "running",
        "prelaunch",
        "serial",
        "ram",
    ];
    words.map(str::to_owned).to_vec()
}
