#![forbid(unsafe_code)]
//! Devices that monitors plug and unplug: QEMU's words, its events, and what a state has of them. The
//! built-in guest lets go of a device when it is told to: it writes the place to the port of the bus.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, Qmp, Serial, image, memory, ready, words};
use serde_json::{Value, json};

/// Has the guest take out what is in a place.
fn eject(serial: &mut Serial, slot: u16) -> Result<()> {
    let (port, bit) = (0x618 + slot / 8, 1_u16 << (slot % 8));
    let answer = serial.ask(&format!("o {port:x} {bit:x}"))?;
    ensure!(answer.starts_with("ok o"), "{answer}");
    Ok(())
}

/// Waits until a device is deleted, and proves its events.
fn deleted(qmp: &mut Qmp, id: &str) -> Result<()> {
    let all = qmp.deleted(id)?;
    let events = all
        .iter()
        .filter(|event| event["event"] == "DEVICE_DELETED");
    let events: Vec<_> = events.map(|event| event["data"].clone()).collect();
    let path = format!("/machine/peripheral/{id}");
    let expected = [
        json!({"path": format!("{path}/virtio-backend")}),
        json!({"device": id, "path": path}),
    ];
    ensure!(events == expected, "{events:?}");
    Ok(())
}

/// Places and names of what is on the bus.
fn on_bus(qmp: &mut Qmp) -> Result<Vec<(u64, String)>> {
    let answer = qmp.ok("query-pci", &json!({}))?;
    let devices = answer[0]["devices"].as_array().into_iter().flatten();
    let seen = devices.map(|device| {
        let id = device["qdev_id"].as_str().unwrap_or_default();
        (device["slot"].as_u64().unwrap_or(99), id.to_owned())
    });
    Ok(seen.collect())
}

fn bus(devices: &[(u64, &str)]) -> Vec<(u64, String)> {
    let host_bridge = std::iter::once(&(0, ""));
    let all = host_bridge.chain(devices);
    all.map(|&(slot, id)| (slot, id.to_owned())).collect()
}

fn human(qmp: &mut Qmp, line: &str) -> Result<String> {
    let answer = qmp.ok("human-monitor-command", &json!({"command-line": line}))?;
    Ok(answer.as_str().unwrap_or_default().replace("\r\n", "\n"))
}

#[test]
fn a_disk_comes_and_goes_with_its_image_and_its_event() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let (mut vm, mut serial) = ready(dir.path(), &[])?;
    let qmp = &mut vm.qmp;
    ensure!(on_bus(qmp)? == bus(&[]));
    let file = json!({"driver": "file", "filename": path});
    let node = json!({"driver": "raw", "node-name": "n", "file": file});
    qmp.ok("blockdev-add", &node)?;
    let device = json!({
        "driver": "virtio-blk-pci", "id": "d", "drive": "n", "serial": "s", "addr": "0x5",
    });
    for _ in 0..3 {
        qmp.ok("device_add", &device)?;
        ensure!(on_bus(qmp)? == bus(&[(5, "d")]));
        let blocks = qmp.ok("query-block", &json!({}))?;
        let inserted = &blocks[0]["inserted"];
        ensure!(blocks[0]["qdev"] == "/machine/peripheral/d/virtio-backend");
        ensure!(inserted["node-name"] == "n", "{blocks}");
        ensure!(inserted["image"]["virtual-size"] == 1 << 20, "{blocks}");
        qmp.ok("device_del", &json!({"id": "/machine/peripheral/d"}))?;
        // As long as it is there nothing else has its name, its place, its image; it is asked for once.
        let going = "Device d is already in the process of unplug";
        let place = "PCI: slot 5 function 0 not available for virtio-rng-pci, in use by virtio-blk-pci,id=d";
        for (command, arguments, text) in [
            ("device_del", json!({"id": "d"}), going),
            (
                "device_add",
                json!({"driver": "virtio-rng-pci", "id": "d"}),
                "Duplicate device ID 'd'",
            ),
            (
                "device_add",
                json!({"driver": "virtio-rng-pci", "addr": "5"}),
                place,
            ),
            (
                "device_add",
                json!({"driver": "virtio-blk-pci", "drive": "n"}),
                "Drive 'n' is already in use by another block device",
            ),
            (
                "blockdev-del",
                json!({"node-name": "n"}),
                "Node n is in use",
            ),
        ] {
            let desc = qmp.refused(command, &arguments)?;
            ensure!(desc == text, "{command} {arguments}: {desc}");
        }
        ensure!(on_bus(qmp)? == bus(&[(5, "d")]));
        eject(&mut serial, 5)?;
        deleted(qmp, "d")?;
        ensure!(on_bus(qmp)? == bus(&[]));
        ensure!(qmp.ok("query-block", &json!({}))? == json!([]));
    }
    qmp.ok("blockdev-del", &json!({"node-name": "n"}))?;
    ensure!(qmp.ok("query-named-block-nodes", &json!({}))? == json!([]));
    // Nobody asked for this one to go.
    qmp.ok(
        "device_add",
        &json!({"driver": "virtio-rng-pci", "id": "r"}),
    )?;
    eject(&mut serial, 1)?;
    deleted(qmp, "r")?;
    ensure!(serial.ask("e 2a")? == "ok e 2a");
    vm.quit()?;
    Ok(())
}

#[test]
fn what_cannot_be_plugged_is_refused_in_qemus_words() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let more = [
        "-device",
        "virtio-rng-pci,id=r,addr=3",
        "-device",
        "vmgenid,id=g",
    ];
    let (mut vm, _serial) = ready(dir.path(), &more)?;
    let qmp = &mut vm.qmp;
    let file =
        |name: &str, path: &str| json!({"driver": "file", "node-name": name, "filename": path});
    qmp.ok("blockdev-add", &file("n", &path))?;
    let rng = |id: &str| json!({"driver": "virtio-rng-pci", "id": id});
    let (no_hotplug, no_object) = ("does not support hotplugging", "Device 'm' not found");
    for (arguments, text) in [
        (json!({}), "Parameter 'driver' is missing"),
        (
            json!({"driver": "nope"}),
            "'nope' is not a valid device model name",
        ),
        (json!({"driver": "vmgenid"}), no_hotplug),
        (json!({"driver": "pc-dimm", "memdev": "m"}), no_object),
        (rng("r"), "Duplicate device ID 'r'"),
        (rng("g"), "Duplicate device ID 'g'"),
        (rng(".x"), "Parameter 'id' expects an identifier"),
        (
            json!({"driver": "virtio-rng-pci", "addr": "3"}),
            "PCI: slot 3 function 0 not available for virtio-rng-pci, in use by virtio-rng-pci,id=r",
        ),
        (
            json!({"driver": "virtio-rng-pci", "bus": "x"}),
            "Bus 'x' not found",
        ),
        (
            json!({"driver": "virtio-rng-pci", "x": 1}),
            "Property 'virtio-rng-pci.x' not found",
        ),
        (
            json!({"driver": "virtio-blk-pci"}),
            "drive property not set",
        ),
        (
            json!({"driver": "virtio-blk-pci", "drive": "m"}),
            "can't find value 'm'",
        ),
    ] {
        let desc = qmp.refused("device_add", &arguments)?;
        ensure!(desc.contains(text), "{arguments}: {desc}");
    }
    let answer = qmp.execute("device_del", &json!({"id": "x"}))?;
    let expected = json!({"class": "DeviceNotFound", "desc": "Device 'x' not found"});
    ensure!(answer["error"] == expected, "{answer}");
    let generation = qmp.refused("device_del", &json!({"id": "g"}))?;
    ensure!(generation.contains(no_hotplug), "{generation}");
    for (arguments, text) in [
        (
            json!({"driver": "file", "filename": path}),
            "'node-name' must be specified",
        ),
        (file("n", &path), "Duplicate nodes with node-name='n'"),
        (
            file("m", "/nowhere"),
            "Could not open '/nowhere': No such file or directory",
        ),
        (file("m", &path), "in use by another machine"),
        (
            json!({"driver": "qcow2", "node-name": "m"}),
            "driver 'qcow2' cannot be had",
        ),
    ] {
        let desc = qmp.refused("blockdev-add", &arguments)?;
        ensure!(desc.contains(text), "{arguments}: {desc}");
    }
    let unknown = qmp.refused("blockdev-del", &json!({"node-name": "m"}))?;
    ensure!(
        unknown == "Failed to find node with node-name='m'",
        "{unknown}"
    );
    // Until the bus is full.
    for slot in 1..30 {
        qmp.ok("device_add", &rng(&format!("r{slot}")))?;
    }
    let disk = json!({"driver": "virtio-blk-pci", "drive": "n"});
    qmp.ok("device_add", &disk)?;
    let taken = qmp.refused("device_add", &disk)?;
    ensure!(
        taken.contains("already in use by another block device"),
        "{taken}"
    );
    let full = qmp.refused("device_add", &rng("more"))?;
    ensure!(
        full == "PCI: no slot/function available for virtio-rng-pci, all in use or reserved",
        "{full}"
    );
    vm.quit()?;
    Ok(())
}

#[test]
fn a_reset_keeps_what_was_plugged_and_ends_what_was_to_go() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let drive = format!("file={path},if=none,id=x");
    let more = ["-drive", &drive, "-device", "virtio-rng-pci,id=r"];
    let (mut vm, mut serial) = ready(dir.path(), &more)?;
    let qmp = &mut vm.qmp;
    let blocks = qmp.ok("query-block", &json!({}))?;
    ensure!(
        blocks[0]["device"] == "x" && blocks[0]["qdev"].is_null(),
        "{blocks}"
    );
    let disk = json!({"driver": "virtio-blk-pci", "id": "d", "drive": "x"});
    qmp.ok("device_add", &disk)?;
    qmp.ok("device_del", &json!({"id": "r"}))?;
    qmp.ok("system_reset", &json!({}))?;
    deleted(qmp, "r")?;
    serial.ready()?;
    ensure!(on_bus(qmp)? == bus(&[(2, "d")]));
    // A drive goes with its device.
    qmp.ok("device_del", &json!({"id": "d"}))?;
    eject(&mut serial, 2)?;
    deleted(qmp, "d")?;
    ensure!(qmp.ok("query-block", &json!({}))? == json!([]));
    vm.quit()?;
    Ok(())
}

#[test]
fn people_plug_and_look_in_their_words() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = image(dir.path(), "d.img")?;
    let node = format!("file,node-name=n,filename={path},read-only=on");
    let (mut vm, mut serial) = ready(dir.path(), &["-blockdev", &node])?;
    let qmp = &mut vm.qmp;
    ensure!(human(qmp, "device_add virtio-blk-pci,id=d,drive=n,addr=1f")?.is_empty());
    let text = human(qmp, "info pci")?;
    let expected = "  Bus  0, device   0, function 0:
    Host bridge: PCI device 1b36:0008
      PCI subsystem 1af4:1100
      id \"\"
  Bus  0, device  31, function 0:
    SCSI controller: PCI device 1af4:1042
      PCI subsystem 1af4:1100
      BAR0: 64 bit memory at 0xffffffffffffffff [0x00007ffe].
      id \"d\"
";
    ensure!(text == expected, "{text}");
    let text = human(qmp, "info block")?;
    let expected = format!(
        "n: {path} (raw, read-only)\n    Attached to:      /machine/peripheral/d/virtio-backend\n    \
         Cache mode:       writeback\n"
    );
    ensure!(text == expected, "{text}");
    let twice = human(qmp, "device_add virtio-rng-pci,id=d")?;
    ensure!(twice == "Error: Duplicate device ID 'd'\n", "{twice}");
    let nobody = human(qmp, "device_del x")?;
    ensure!(nobody == "Error: Device 'x' not found\n", "{nobody}");
    ensure!(human(qmp, "device_del d")?.is_empty());
    eject(&mut serial, 31)?;
    deleted(qmp, "d")?;
    vm.quit()?;
    Ok(())
}

/// A clone that waits for its state, with these devices.
fn clone_with(dir: &Path, devices: &[&str]) -> Result<QemuVm> {
    let mut all = memory("template", CLONE);
    all.extend(words(&["-incoming", "defer"]));
    for device in devices {
        all.extend(words(&["-device", device]));
    }
    let mut vm = QemuVm::start(dir, "c", &all)?;
    vm.qmp.capability("x-ignore-shared")?;
    Ok(vm)
}

fn load(qmp: &mut Qmp) -> Result<Value> {
    let uri = json!({"uri": "file:state", "exit-on-error": false});
    qmp.ok("migrate-incoming", &uri)?;
    qmp.migrated()
}

#[test]
fn a_state_has_what_was_plugged_and_what_has_gone_is_not_in_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut template = memory("template", "share=on");
    template.extend(words(&[
        "-kernel",
        "embedded",
        "-device",
        "virtio-rng-pci,id=old",
    ]));
    let mut vm = QemuVm::start(dir.path(), "t", &template)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    let qmp = &mut vm.qmp;
    let rng = |id: &str, addr: &str| json!({"driver": "virtio-rng-pci", "id": id, "addr": addr});
    qmp.ok("device_add", &rng("new", "4"))?;
    qmp.ok("device_add", &rng("going", "6"))?;
    qmp.ok("device_del", &json!({"id": "old"}))?;
    eject(&mut serial, 1)?;
    deleted(qmp, "old")?;
    qmp.ok("device_del", &json!({"id": "going"}))?;
    qmp.ok("stop", &json!({}))?;
    qmp.capability("x-ignore-shared")?;
    qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    let end = qmp.migrated()?;
    ensure!(end["status"] == "completed", "{end}");
    vm.quit()?;

    // One device comes before the state does, by the monitor.
    let (new, going) = (
        "virtio-rng-pci,id=new,addr=4",
        "virtio-rng-pci,id=going,addr=6",
    );
    let mut vm = clone_with(dir.path(), &[new])?;
    vm.qmp.ok("device_add", &rng("going", "6"))?;
    let end = load(&mut vm.qmp)?;
    ensure!(end["status"] == "completed", "{end}");
    let mut serial = vm.serial()?;
    vm.qmp.ok("cont", &json!({}))?;
    ensure!(on_bus(&mut vm.qmp)? == bus(&[(4, "new"), (6, "going")]));
    // Its guest was asked before the freeze, and did not answer. It may be asked again.
    vm.qmp.ok("device_del", &json!({"id": "going"}))?;
    eject(&mut serial, 6)?;
    deleted(&mut vm.qmp, "going")?;
    // Others come and go in the clone.
    vm.qmp.ok("device_add", &rng("own", "6"))?;
    ensure!(on_bus(&mut vm.qmp)? == bus(&[(4, "new"), (6, "own")]));
    for (id, slot) in [("own", 6), ("new", 4)] {
        vm.qmp.ok("device_del", &json!({"id": id}))?;
        eject(&mut serial, slot)?;
        deleted(&mut vm.qmp, id)?;
    }
    vm.quit()?;
    for (devices, text) in [
        (&[new][..], "has a device \"virtio-rng\""),
        (
            &[new, going, "virtio-rng-pci,id=old,addr=1"],
            "lacks the device \"virtio-rng old\"",
        ),
        (
            &[new, "virtio-rng-pci,id=going,addr=7"],
            "it was in PCI slot 6, the machine has it in 7",
        ),
    ] {
        let mut vm = clone_with(dir.path(), devices)?;
        let end = load(&mut vm.qmp)?;
        ensure!(end["status"] == "failed", "{end}");
        let finished = vm.quit()?;
        ensure!(finished.stderr.contains(text), "{}", finished.stderr);
    }
    Ok(())
}

#[test]
fn a_machine_has_the_bus_from_the_start_by_either_front() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let printed = |words: &[&str]| -> Result<String> {
        Ok(finish(&mut pando(words)?)?.expect_code(0)?.stdout)
    };
    let qemu = [
        "qemu",
        "-kernel",
        "embedded",
        "-serial",
        "null",
        "-print-machine",
    ];
    let text = printed(&qemu)?;
    ensure!(text.contains("\npci = true\n"), "{text}");
    let file = dir.path().join("m.toml");
    fs::write(&file, &text)?;
    let file = file.display().to_string();
    let again = printed(&["run", "--machine", &file, "--print-machine"])?;
    ensure!(again == text, "{again}");
    let mut microvm = qemu.to_vec();
    microvm.extend(["-machine", "microvm"]);
    ensure!(!printed(&microvm)?.contains("pci"), "a bus");
    let bare = words(&["-machine", "microvm", "-m", "64M", "-S"]);
    let mut vm = QemuVm::start(dir.path(), "m", &bare)?;
    let none = vm
        .qmp
        .refused("device_add", &json!({"driver": "virtio-rng-pci"}))?;
    ensure!(
        none == "No 'PCI' bus found for device 'virtio-rng-pci'",
        "{none}"
    );
    vm.quit()?;
    Ok(())
}

#[test]
fn a_vsock_that_is_plugged_has_its_socket() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("own.sock");
    let (mut vm, mut serial) = ready(dir.path(), &[])?;
    let device = json!({
        "driver": "vhost-vsock-pci", "id": "v", "guest-cid": 77, "addr": "4",
        "x-uds-path": socket.display().to_string(),
    });
    vm.qmp.ok("device_add", &device)?;
    ensure!(socket.exists(), "there is no {}", socket.display());
    vm.qmp.ok("device_del", &json!({"id": "v"}))?;
    eject(&mut serial, 4)?;
    deleted(&mut vm.qmp, "v")?;
    ensure!(!socket.exists(), "{} is left", socket.display());
    vm.quit()?;
    Ok(())
}

#[test]
fn devices_of_all_kinds_have_ids_of_their_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let kinds = [
        "virtio-rng-pci,id=r",
        "pcie-root-port,id=r",
        r#"{"driver": "virtio-balloon-pci", "id": "r"}"#,
        "pc-dimm,id=r,memdev=m",
        "vmgenid,id=r",
    ];
    for first in kinds {
        for second in kinds {
            let mut command = pando(&["qemu", "-nodefaults", "-S", "-m", "64M,slots=2,maxmem=1G"])?;
            command.args(["-object", "memory-backend-ram,id=m,size=64M"]);
            command.args(["-device", first, "-device", second]);
            finish(command.current_dir(dir.path()))?
                .expect_code(1)?
                .expect_error(&["Duplicate ID 'r' for device"])?;
        }
    }
    Ok(())
}
