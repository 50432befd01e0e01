#![forbid(unsafe_code)]
//! Disks of `pando qemu` over resets, and of clones that it loads.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, memory};
use serde_json::json;

/// A disk that the guest writes, one over which it writes, one that it reads, and entropy.
const DEVICES: [&str; 8] = [
    "-drive",
    "file=written.img,if=virtio,format=raw",
    "-drive",
    "file=kept.img,if=virtio,format=raw,snapshot=on",
    "-drive",
    "file=read.img,if=virtio,format=raw,readonly=on",
    "-device",
    "virtio-rng-pci",
];

fn images(dir: &Path) -> Result<()> {
    for name in ["written.img", "kept.img", "read.img", "waiting.img"] {
        File::create(dir.join(name))?.set_len(1 << 20)?;
    }
    Ok(())
}

fn with(mut words: Vec<String>, more: &[&str]) -> Vec<String> {
    words.extend(more.iter().map(|&word| word.to_owned()));
    words
}

#[test]
fn a_machine_has_its_disks_after_each_reset_and_no_other_has_them() -> Result<()> {
    let dir = tempfile::tempdir()?;
    images(dir.path())?;
    let boots = with(vec![], &["-m", "64M", "-kernel", "embedded"]);
    let boots = with(boots, &DEVICES);
    let mut vm = QemuVm::start(dir.path(), "a", &boots)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    vm.qmp.ok("system_reset", &json!({}))?;
    serial.ready()?;
    assert_eq!(serial.ask("x")?, "ok x");
    serial.ready()?;
    assert_eq!(vm.qmp.status()?, "running");
    let mut other = pando(&["qemu", "-nodefaults", "-nographic"])?;
    finish(other.current_dir(dir.path()).args(&boots))?
        .expect_code(1)?
        .expect_error(&["written.img is in use by another machine"])?;
    vm.quit()?;
    Ok(())
}

#[test]
fn a_clone_with_disks_and_no_kernel_stands_still_after_a_reset() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    images(dir)?;
    let original = with(memory("template", "share=on"), &["-kernel", "embedded"]);
    let mut vm = QemuVm::start(dir, "template", &with(original, &DEVICES))?;
    vm.serial()?.ready()?;
    vm.qmp.ok("stop", &json!({}))?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    vm.quit()?;
    let clone = with(memory("template", CLONE), &["-incoming", "file:state"]);
    let mut vm = QemuVm::start(dir, "c", &with(clone, &DEVICES))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    vm.qmp.ok("cont", &json!({}))?;
    vm.serial()?.send("x\n")?;
    vm.running.wait_stderr("there is nothing to boot")?;
    while !vm.qmp.event_names().contains(&"RESET") {
        assert_eq!(vm.qmp.status()?, "running");
    }
    vm.qmp.ok("system_reset", &json!({}))?;
    assert_eq!(vm.qmp.status()?, "running");
    vm.quit()?;
    Ok(())
}

#[test]
fn no_log_goes_into_a_disk_and_no_state_is_saved_without_what_was_written() -> Result<()> {
    let dir = tempfile::tempdir()?;
    images(dir.path())?;
    let boots = with(vec![], &["-m", "64M", "-kernel", "embedded"]);
    let boots = with(boots, &DEVICES);
    // One that waits for a device is one too.
    let waiting = ["-drive", "file=waiting.img,if=none,id=w,format=raw"];
    for output in [
        ["-D", "kept.img"],
        ["-serial", "file:./read.img"],
        ["-serial", "file:./waiting.img"],
    ] {
        let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
        let command = command.current_dir(dir.path()).args(&boots);
        finish(command.args(waiting).args(output))?
            .expect_code(1)?
            .expect_error(&["which nothing else may write"])?;
    }
    assert_eq!(dir.path().join("waiting.img").metadata()?.len(), 1 << 20);
    // Nothing was written over the snapshot: it may be saved.
    let mut vm = QemuVm::start(dir.path(), "s", &boots)?;
    vm.serial()?.ready()?;
    vm.qmp.ok("stop", &json!({}))?;
    vm.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    vm.quit()?;
    Ok(())
}
