#![forbid(unsafe_code)]
//! The embedded guest on a machine whose memory is a template, a clone, read-only and nameless at once.

use std::fs;
use std::time::Duration;

use pando_pager::PagerOptions;
use pando_vmm::arch::x86_64::boot::BootSource;
use pando_vmm::config::{self, file::MachineFile};
use pando_vmm::console::GuestConsole;
use pando_vmm::device::legacy::console::SerialTarget;
use pando_vmm::machine::{Machine, Outcome as Ending};
use pando_vmm::memory::provide::{MachineMemory, provide};
use pando_vmm::payload::model::{place_bytes, word};
use pando_vmm::payload::protocol::{Command, Outcome, READY_LINE, Reply, Visit};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// First page of a module of a machine with less than 4 GiB of RAM.
const HIGH_PAGE: u64 = (4 << 30) / 4096;
const SALT: u64 = 77;

fn ask(console: &mut GuestConsole, command: &Command) -> Outcome {
    console.send(&command.encode()).unwrap();
    let line = console.line(PATIENCE).unwrap();
    Reply::parse(&line).unwrap().outcome
}

fn write(console: &mut GuestConsole, visit: Visit) {
    let salt = SALT;
    ask(console, &Command::Write { visit, salt });
}

fn wrong(console: &mut GuestConsole, visit: Visit) -> u64 {
    let salt = SALT;
    match ask(console, &Command::Verify { visit, salt }) {
        Outcome::Verified { mismatches, .. } => mismatches,
        other => panic!("{other:?}"),
    }
}

/// Bytes of `pages` pages that hold what the guest writes from page `first` on.
fn content(first: u64, pages: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(pages * 4096).unwrap()];
    for page in 0..pages {
        let at = usize::try_from(page * 4096 + place_bytes(first + page)).unwrap();
        bytes[at..at + 8].copy_from_slice(&word(first + page, SALT).to_le_bytes());
    }
    bytes
}

#[test]
fn each_backend_of_a_running_machine_is_what_it_was_asked_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let node1 = 64 * MIB / 4096;
    // What the clone of the second node begins with, and the read-only module.
    let clone_bytes = content(node1, 64 * MIB / 4096);
    let rom_bytes = content(HIGH_PAGE, 2 * MIB / 4096);
    fs::write(path("n1"), &clone_bytes).unwrap();
    fs::write(path("rom"), &rom_bytes).unwrap();
    let text = format!(
        "kernel = 'embedded'\ncpus = 2\n[memory]\nslots = 2\nmax = '1G'\n\
         [[backend]]\nid = 'n0'\nkind = 'file'\npath = '{}'\nsize = '64M'\nshare = true\n\
         [[backend]]\nid = 'n1'\nkind = 'file'\npath = '{}'\nsize = '64M'\nreadonly = true\nrom = 'off'\n\
         [[backend]]\nid = 'rom'\nkind = 'file'\npath = '{}'\nsize = '2M'\nreadonly = true\n\
         [[backend]]\nid = 'd1'\nkind = 'memfd'\nsize = '32M'\n\
         [[node]]\ncpus = [0]\nbackend = 'n0'\n[[node]]\ncpus = [1]\nbackend = 'n1'\n\
         [[dimm]]\nid = 'dimm0'\nbackend = 'rom'\n[[dimm]]\nid = 'dimm1'\nbackend = 'd1'\nnode = 1\n",
        path("n0"),
        path("n1"),
        path("rom"),
    );
    let file = MachineFile::from_toml(&text).unwrap();
    let (spec, boot): (_, BootSource) = config::resolve_file(&file).unwrap();
    let memory = provide(&spec, PagerOptions::default()).unwrap();
    let MachineMemory { ram, pager, files } = memory;
    let (mut console, serial) = GuestConsole::pair().unwrap();
    let machine = Machine::boot(&spec, ram, &boot, SerialTarget::Fd(serial)).unwrap();
    let machine = machine.resume().unwrap();
    console
        .wait_for(READY_LINE.trim_end(), PATIENCE, &mut |_| ())
        .unwrap();
    console.line(PATIENCE).unwrap();

    let node0 = Visit::all(4096, 100);
    let in_node1 = Visit::all(node1 + 50, 200);
    let rom = Visit::all(HIGH_PAGE, 2 * MIB / 4096);
    let module = Visit::all(HIGH_PAGE + 2 * MIB / 4096, 500);
    assert_eq!(wrong(&mut console, in_node1), 0, "the clone is its file");
    assert_eq!(wrong(&mut console, rom), 0, "the module is its file");
    write(&mut console, node0);
    write(&mut console, module);
    assert_eq!(wrong(&mut console, node0) + wrong(&mut console, module), 0);

    // Other words: kept by the clone, lost on read-only memory.
    let other = |visit| Command::Write { visit, salt: 1 };
    ask(&mut console, &other(in_node1));
    ask(&mut console, &other(rom));
    assert_eq!(wrong(&mut console, in_node1), 200);
    assert_eq!(wrong(&mut console, rom), 0, "writes are dropped");

    console.send(&Command::PowerOff.encode()).unwrap();
    assert_eq!(machine.wait(), Ending::PowerOff);
    let counts = pager.unwrap().stop().unwrap();
    assert!(counts.faults > 0, "the clone was served");
    drop(files);
    assert!(fs::read(path("n1")).unwrap() == clone_bytes);
    assert!(fs::read(path("rom")).unwrap() == rom_bytes);
    let written = fs::read(path("n0")).unwrap();
    let at = 4096 * 4096;
    assert!(
        written[at..at + 100 * 4096] == content(4096, 100),
        "the template has it"
    );
}
