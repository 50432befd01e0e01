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

use pando_vmm::machine::state::{DeviceRecord, MachineState, VmState};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::memory::layout::RamLayout;
use pando_vmm::qemu::migration::file::{FORMAT, StateFile};
use pando_vmm::qemu::migration::ram::{self, Contents, Placement};
use pando_vmm::qemu::migration::state::{SavedBackend, SavedContent, SavedMachine};
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
    let mut options = vec!["-incoming", "file:state"];
    let backend = if how & 1 == 0 { OWN_RAM } else { CLONE };
    if how & 2 != 0 {
        options.extend(["-global", "migration.validate-uuid=true"]);
    }
    if let Some(mut vm) = machine(backend, &options) {
        vm.begin();
    }
    scratch::clean();
}

/// RAM out of a file, whatever that says of it.
fn load_ram(bytes: &[u8]) {
    let Ok(((runs, checksum, mapped), ram)) =
        postcard::take_from_bytes::<(Vec<(u64, u64)>, Option<u64>, bool)>(bytes)
    else {
        return;
    };
    let memory = small_ram();
    let checksum = checksum.unwrap_or_default();
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

/// A state of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let here = SavedContent::Here {
        runs: vec![(1, 1)],
        checksum: 0,
    };
    let nothing = SavedContent::Here {
        runs: Vec::new(),
        checksum: 0x2d06_8005_38d3_94c2,
    };
    let left_out = SavedContent::LeftOut {
        offset_bytes: 0,
        seal: Seal {
            inode: 1,
            bytes: RAM_BYTES,
            mtime_s: 1,
            mtime_ns: 1,
        },
        index: crate::template::index_body("ram", RAM_BYTES / 4096),
    };
    let mut seeds = Vec::new();
    for (how, content) in [(0, here), (0, nothing), (1, left_out)] {
        let ignore_shared = how == 1;
        for mapped_ram in [false, true] {
            let saved = saved(content.clone(), (ignore_shared, mapped_ram));
            let body = postcard::to_stdvec(&saved).unwrap_or_default();
            seeds.push(parts::of(0, &parts::framed(MAGIC, FORMAT, &body)));
            seeds.push(parts::of(1, &body));
            let ram = [body, vec![7; 4096]].concat();
            seeds.push(parts::of(2 + 4 * how, &ram));
            seeds.push(parts::of(2 + 4 * (how | 2), &ram));
        }
    }
    for mapped in [false, true] {
        let pages: (Vec<(u64, u64)>, Option<u64>, bool) = (vec![(0, 1)], Some(0), mapped);
        let head = postcard::to_stdvec(&pages).unwrap_or_default();
        seeds.push(parts::of(3, &[head, vec![7; 4096]].concat()));
        let none: (Vec<(u64, u64)>, Option<u64>, bool) =
            (Vec::new(), Some(0x2d06_8005_38d3_94c2), mapped);
        seeds.push(parts::of(
            3,
            &postcard::to_stdvec(&none).unwrap_or_default(),
        ));
    }
    seeds
}

fn saved(content: SavedContent, (ignore_shared, mapped_ram): (bool, bool)) -> SavedMachine {
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
        machine: postcard::to_stdvec(&machine_state()).unwrap_or_default(),
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
        tsc_khz: Some(1),
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
