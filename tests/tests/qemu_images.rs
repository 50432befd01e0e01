#![forbid(unsafe_code)]
//! Images of `pando qemu` that wait for a device: who holds them, and what may be none.

use std::fs::File;

use anyhow::{Result, ensure};
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{QemuVm, image, ready, words};
use serde_json::json;

#[test]
fn a_file_is_kept_by_whoever_is_next_to_have_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let (mut vm, _serial) = ready(dir.path(), &[])?;
    let file = json!({"driver": "file", "node-name": "f", "filename": path});
    vm.qmp.ok("blockdev-add", &file)?;
    let raw = json!({"driver": "raw", "node-name": "r", "file": "f"});
    vm.qmp.ok("blockdev-add", &raw)?;
    let other = json!({"driver": "file", "node-name": "o", "filename": path});
    for again in ["r", "f"] {
        let busy = vm.qmp.refused("blockdev-add", &other)?;
        ensure!(busy.contains("in use by another machine"), "{busy}");
        vm.qmp.ok("blockdev-del", &json!({"node-name": again}))?;
    }
    vm.qmp.ok("blockdev-add", &other)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn images_that_no_device_has_are_open_from_the_start() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let drive = format!("file={path},if=none,id=x");
    let (vm, _serial) = ready(dir.path(), &["-drive", &drive])?;
    let mut second = pando(&["qemu", "-nodefaults", "-m", "64M", "-S", "-drive", &drive])?;
    let refused = finish(&mut second)?.expect_code(1)?;
    refused.expect_error(&["in use by another machine"])?;
    vm.quit()?;
    Ok(())
}

#[test]
fn an_image_over_a_drive_is_no_more_than_the_drive() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let drive = format!("file={path},if=none,id=x,snapshot=on,format=raw");
    let (mut vm, _serial) = ready(dir.path(), &["-drive", &drive])?;
    let over = json!({"driver": "raw", "node-name": "y", "file": "x"});
    vm.qmp.ok("blockdev-add", &over)?;
    let disk = json!({"driver": "virtio-blk-pci", "id": "d", "drive": "y"});
    vm.qmp.ok("device_add", &disk)?;
    // Who wrote the image would hold it alone.
    let mut reads = words(&["-m", "64M", "-S", "-drive"]);
    reads.push(format!("file={path},if=virtio,readonly=on,format=raw"));
    QemuVm::start(dir.path(), "b", &reads)?.quit()?;
    vm.quit()?;
    Ok(())
}

#[test]
fn what_this_program_writes_or_a_guest_has_as_memory_is_no_image() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ram = image(dir.path(), "ram")?;
    File::options().write(true).open(&ram)?.set_len(64 << 20)?;
    let backend = format!("memory-backend-file,id=m,mem-path={ram},size=64M,share=on");
    let more = [
        "-object",
        &backend,
        "-machine",
        "q35,memory-backend=m",
        "-D",
        "log",
    ];
    let (mut vm, _serial) = ready(dir.path(), &more)?;
    let log = dir.path().join("log").display().to_string();
    for (path, text) in [
        (&log, "is what -D is written to"),
        (&ram, "the file of memory backend m"),
    ] {
        let node = json!({"driver": "file", "node-name": "n", "filename": path});
        let desc = vm.qmp.refused("blockdev-add", &node)?;
        ensure!(desc.contains(text), "{desc}");
    }
    vm.quit()?;
    Ok(())
}
