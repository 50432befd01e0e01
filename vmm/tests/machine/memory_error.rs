#![forbid(unsafe_code)]
//! Guest memory that cannot be read ends the machine with a message, never this process.

use std::process::Command;

use crate::program::TOUCHED;
use crate::support::{RAM_BYTES, boot_on, load, spec};
use pando_vmm::machine::{Failure, Outcome};
use pando_vmm::memory::guest::{GuestRam, RamBacking};
use pando_vmm::sandbox::sigbus;

/// RAM whose file is cut short behind the program: touching what is missing raises SIGBUS.
fn truncated_ram() -> (tempfile::NamedTempFile, GuestRam) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(RAM_BYTES).unwrap();
    let backing = RamBacking::shared(file.as_file(), RAM_BYTES).unwrap();
    let ram = GuestRam::new(spec(1).layout(), vec![backing]).unwrap();
    load(&ram);
    file.as_file().set_len(TOUCHED.into()).unwrap();
    (file, ram)
}

#[test]
fn a_guest_that_touches_lost_memory_fails_with_its_address() {
    let (_file, ram) = truncated_ram();
    let (machine, mut wire) = boot_on(1, ram);
    let machine = machine.resume().unwrap();
    wire.expect("R");
    wire.ask(b'c', "B");
    wire.send(b'm');
    let outcome = machine.wait();
    let Outcome::Failed(Failure::MemoryError {
        cpu: 0,
        guest_address,
        ..
    }) = outcome
    else {
        panic!("{outcome:?}")
    };
    // Not every KVM says where; one that does must be right.
    if let Some(address) = guest_address {
        assert_eq!(address & !0xfff, u64::from(TOUCHED), "{outcome}");
        assert!(
            outcome.to_string().contains("guest memory at 0x3000"),
            "{outcome}"
        );
    }
}

/// The child of the next test.
#[test]
#[ignore = "ends its process: run by the test below"]
fn child_that_touches_lost_memory() {
    sigbus::install().unwrap();
    let (_file, ram) = truncated_ram();
    let mut byte = [0];
    ram.read(TOUCHED.into(), &mut byte).unwrap();
}

#[test]
fn this_process_touching_lost_memory_ends_with_one_line_and_its_own_code() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "memory_error::child_that_touches_lost_memory",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(sigbus::EXIT_CODE));
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.lines().last().unwrap();
    assert!(
        line.starts_with("pando: guest memory at host address 0x"),
        "{text}"
    );
    assert!(
        line.contains("000 cannot be had: its page is poisoned"),
        "{text}"
    );
}
