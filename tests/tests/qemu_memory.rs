#![forbid(unsafe_code)]
//! Memory that monitors plug and unplug: QEMU's words, its events, and what a state has of it. The built-in
//! guest lets go of a module when it is told to: it writes the slot to its port.

use std::path::Path;

use anyhow::{Result, ensure};
use pando_tests::qemu::{CLONE, QemuVm, Qmp, Serial, memory, words};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const MODULE: &str = "pc-dimm,id=dimm0,memdev=d0";
const GROWING: &str = "virtio-mem-pci,id=v0,memdev=v0ram";

/// Has the guest let go of the module in a slot.
fn eject(serial: &mut Serial, slot: u8) -> Result<()> {
    let answer = serial.ask(&format!("o 648 {slot:x}"))?;
    ensure!(answer.starts_with("ok o"), "{answer}");
    Ok(())
}

/// A machine with room for memory.
fn start(dir: &Path, name: &str, how: &str, more: &[&str]) -> Result<QemuVm> {
    let mut all = memory("template", how);
    all.extend(words(&["-m", "slots=2,maxmem=1G"]));
    all.extend(words(more));
    QemuVm::start(dir, name, &all)
}

fn object(id: &str, mib: u64) -> Value {
    json!({"qom-type": "memory-backend-ram", "id": id, "size": mib * MIB})
}

fn plugged(qmp: &mut Qmp) -> Result<u64> {
    let answer = qmp.ok("query-memory-size-summary", &json!({}))?;
    Ok(answer["plugged-memory"].as_u64().unwrap_or(0))
}

/// The device and what it says of itself.
fn device(qmp: &mut Qmp, id: &str) -> Result<Value> {
    let answer = qmp.ok("query-memory-devices", &json!({}))?;
    let mut all = answer.as_array().into_iter().flatten();
    let found = all.find(|device| device["data"]["id"] == id);
    Ok(found.map_or(Value::Null, |device| device["data"].clone()))
}

#[test]
fn a_module_comes_is_saved_is_kept_by_a_reset_and_goes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path(), "t", "share=on", &["-kernel", "embedded"])?;
    vm.serial()?.ready()?;
    let qmp = &mut vm.qmp;
    qmp.ok("object-add", &object("d0", 128))?;
    let add = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "d0", "slot": 1});
    qmp.ok("device_add", &add)?;
    let dimm = device(qmp, "dimm0")?;
    ensure!(dimm["hotplugged"] == true && dimm["slot"] == 1 && dimm["addr"] == 4096 * MIB);
    ensure!(plugged(qmp)? == 128 * MIB);
    for (arguments, text) in [
        (add.clone(), "Duplicate device ID 'dimm0'"),
        (
            json!({"driver": "pc-dimm", "memdev": "d0"}),
            "can't use already busy memdev: d0",
        ),
        (
            json!({"driver": "pc-dimm", "memdev": "no"}),
            "Device 'no' not found",
        ),
    ] {
        let desc = qmp.refused("device_add", &arguments)?;
        ensure!(desc == text, "{arguments}: {desc}");
    }
    qmp.ok("object-add", &object("d1", 2048))?;
    let large = qmp.refused("device_add", &json!({"driver": "pc-dimm", "memdev": "d1"}))?;
    ensure!(large.starts_with("not enough space"), "{large}");
    qmp.ok("object-del", &json!({"id": "d1"}))?;
    let busy = qmp.refused("object-del", &json!({"id": "d0"}))?;
    ensure!(
        busy == "object 'd0' is in use, can not be deleted",
        "{busy}"
    );
    qmp.ok("system_reset", &json!({}))?;
    vm.serial()?.ready()?;
    let qmp = &mut vm.qmp;
    ensure!(device(qmp, "dimm0")? == dimm, "a reset keeps it");
    qmp.ok("stop", &json!({}))?;
    qmp.capability("x-ignore-shared")?;
    qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    let end = qmp.migrated()?;
    ensure!(end["status"] == "completed", "{end}");
    vm.quit()?;

    let own = "memory-backend-ram,id=d0,size=128M";
    let slot = format!("{MODULE},slot=1");
    let with = ["-object", own, "-device", &slot, "-incoming", "defer"];
    let uri = json!({"uri": "file:state", "exit-on-error": false});
    let mut vm = start(dir.path(), "c", CLONE, &with)?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok("migrate-incoming", &uri)?;
    let end = vm.qmp.migrated()?;
    ensure!(end["status"] == "completed", "{end}");
    let mut serial = vm.serial()?;
    let qmp = &mut vm.qmp;
    qmp.ok("cont", &json!({}))?;
    for _ in 0..2 {
        qmp.ok("device_del", &json!({"id": "dimm0"}))?;
    }
    eject(&mut serial, 1)?;
    qmp.deleted("dimm0")?;
    ensure!(plugged(qmp)? == 0 && device(qmp, "dimm0")? == Value::Null);
    // Many come and go, in any order.
    qmp.ok("object-add", &object("d1", 128))?;
    for round in 0..8 {
        for id in ["d0", "d1"] {
            let add = json!({"driver": "pc-dimm", "id": format!("dimm-{id}"), "memdev": id});
            qmp.ok("device_add", &add)?;
        }
        ensure!(plugged(qmp)? == 256 * MIB);
        for slot in [round % 2, 1 - round % 2] {
            eject(&mut serial, slot)?;
            qmp.deleted(&format!("dimm-d{slot}"))?;
        }
    }
    for id in ["d0", "d1"] {
        qmp.ok("object-del", &json!({"id": id}))?;
    }
    vm.quit()?;
    let mut vm = start(dir.path(), "w", CLONE, &["-incoming", "defer"])?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok("migrate-incoming", &uri)?;
    let end = vm.qmp.migrated()?;
    ensure!(end["status"] == "failed", "{end}");
    let said = vm.quit()?.stderr;
    ensure!(said.contains("Unknown ramblock \"d0\""), "{said}");
    Ok(())
}

#[test]
fn memory_that_grows_is_plugged_and_frozen_with_nothing_in_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let own = "memory-backend-ram,id=v0ram,size=128M";
    let growing = ["-object", own, "-device", GROWING];
    let boot = [&growing[..], &["-kernel", "embedded"]].concat();
    let mut vm = start(dir.path(), "t", "share=on", &boot)?;
    vm.serial()?.ready()?;
    let qmp = &mut vm.qmp;
    let request = |id: &str, bytes: u64| json!({"path": format!("/machine/peripheral/{id}"), "property": "requested-size", "value": bytes});
    qmp.ok("stop", &json!({}))?;
    qmp.capability("x-ignore-shared")?;
    qmp.ok("qom-set", &request("v0", 32 * MIB))?;
    qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    let end = qmp.migrated()?;
    ensure!(end["status"] == "completed", "{end}");
    vm.quit()?;

    let waits = [&growing[..], &["-incoming", "defer"]].concat();
    let mut vm = start(dir.path(), "c", CLONE, &waits)?;
    let qmp = &mut vm.qmp;
    qmp.capability("x-ignore-shared")?;
    qmp.ok("migrate-incoming", &json!({"uri": "file:state"}))?;
    let end = qmp.migrated()?;
    ensure!(end["status"] == "completed", "{end}");
    qmp.ok("cont", &json!({}))?;
    // What was requested is in the state, and another machine in its place is asked for as much.
    for times in 0..2 {
        let device = device(qmp, "v0")?;
        ensure!(device["requested-size"] == 32 * MIB, "{times}: {device}");
        qmp.ok("system_reset", &json!({}))?;
    }
    qmp.ok("qom-set", &request("v0", 64 * MIB))?;
    ensure!(device(qmp, "v0")?["requested-size"] == 64 * MIB);
    for (bytes, text) in [
        (
            5,
            "'requested-size' has to be multiples of 'block-size' (0x200000)",
        ),
        (
            256 * MIB,
            "'requested-size' cannot exceed the memory backend size(0x8000000)",
        ),
    ] {
        let desc = qmp.refused("qom-set", &request("v0", bytes))?;
        ensure!(desc == text, "{desc}");
    }
    let desc = qmp.refused("device_del", &json!({"id": "v0"}))?;
    ensure!(
        desc.ends_with("while 'requested-size' is not '0'"),
        "{desc}"
    );
    // Another comes behind it, and is refused on a template's file.
    qmp.ok("object-add", &object("v1ram", 64))?;
    let add = json!({"driver": "virtio-mem-pci", "id": "v1", "memdev": "v1ram"});
    qmp.ok("device_add", &add)?;
    ensure!(device(qmp, "v1")?["memaddr"] == (4096 + 128) * MIB);
    let file = json!({
        "qom-type": "memory-backend-file", "id": "file", "size": 16 * MIB, "mem-path": "template",
        "readonly": true, "rom": "off",
    });
    qmp.ok("object-add", &file)?;
    let templated = json!({"driver": "virtio-mem-pci", "memdev": "file"});
    let desc = qmp.refused("device_add", &templated)?;
    ensure!(
        desc == "Unexpected error discarding RAM: Operation not permitted",
        "{desc}"
    );
    let discards = qmp.ok("x-query-discards", &json!({}))?;
    ensure!(discards["refused"]["virtio-mem"] == 1, "{discards}");
    for id in ["v0", "v1"] {
        let all = discards["backends"].as_array().into_iter().flatten();
        let memory = all.filter(|backend| backend["id"] == format!("{id}ram"));
        let holders: Vec<&Value> = memory.map(|backend| &backend["required-by"]).collect();
        let expected = json!([{"device": id, "coordinated": true}]);
        ensure!(holders == [&expected], "{discards}");
    }
    let line = json!({"command-line": "info memdev"});
    let text = qmp.ok("human-monitor-command", &line)?;
    let holder = "discard: on for v0ram, required by v0 (coordinated)";
    ensure!(
        text.as_str().is_some_and(|text| text.contains(holder)),
        "{text}"
    );
    let said = vm.quit()?.stderr;
    ensure!(
        said.contains("Discarding RAM with readonly files is not supported"),
        "{said}"
    );
    Ok(())
}
