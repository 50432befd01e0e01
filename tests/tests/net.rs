#![forbid(unsafe_code)]
//! Network devices on real taps in namespaces of their own: of both command lines, of monitors, and of clones
//! on every engine.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pando_tests::command::{HANG, Running, eventually, finish, pando};
use pando_tests::network::Namespace;
use pando_tests::qemu::{QemuVm, Qmp};
use pando_tests::rig::built_program;
use pando_vmm::clone::Engine;
use pando_vmm::clone::control::PagerConfig;
use pando_vmm::clone::nets::{self, NetPattern};
use pando_vmm::clone::process::SerialPlan;
use pando_vmm::clone::supervise::{CloneOptions, RootOptions, Supervisor};
use pando_vmm::machine::HostCheck;
use pando_vmm::template::Template;
use serde_json::{Value, json};

const NETDEV: &str = "tap,id=n0,ifname=tap0,script=no,downscript=no";

fn start(dir: &Path, more: &[&str]) -> Result<QemuVm> {
    let mut all: Vec<String> = Vec::new();
    all.extend(["-m", "64M", "-kernel", "embedded"].map(str::to_owned));
    all.extend(more.iter().map(|&word| word.to_owned()));
    let vm = QemuVm::start(dir, "a", &all)?;
    vm.serial()?.ready()?;
    Ok(vm)
}

fn attached(namespace: &Namespace, tap: &str, wanted: bool) -> Result<()> {
    eventually("the tap", || namespace.is_attached(tap) == wanted)
}

/// Has the guest take out what is in a place, and waits until it is gone.
fn take_out(vm: &mut QemuVm, id: &str, slot: u16) -> Result<()> {
    vm.qmp.ok("device_del", &json!({"id": id}))?;
    let (port, bit) = (0x618 + slot / 8, 1_u16 << (slot % 8));
    vm.serial()?.ask(&format!("o {port:x} {bit:x}"))?;
    let told = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id;
    while !vm.qmp.events.iter().any(told) {
        let message = vm.qmp.receive()?;
        vm.qmp.events.push(message);
    }
    vm.qmp.events.clear();
    Ok(())
}

#[test]
fn a_machine_of_qemus_options_has_its_tap_and_others_come_and_go() -> Result<()> {
    let namespace = Namespace::new("")?;
    namespace.tap("tap0")?;
    namespace.tap("tap1")?;
    namespace.enter()?;
    let dir = tempfile::tempdir()?;
    let device = "virtio-net-pci,netdev=n0,id=nic,mac=52:54:00:00:00:07,addr=3";
    let mut vm = start(dir.path(), &["-netdev", NETDEV, "-device", device])?;
    attached(&namespace, "tap0", true)?;
    let pci = vm.qmp.ok("query-pci", &json!({}))?;
    let nic = &pci[0]["devices"][1];
    ensure!(
        nic["qdev_id"] == "nic" && nic["id"]["device"] == 0x1041,
        "{pci}"
    );
    ensure!(nic["class_info"]["desc"] == "Ethernet controller", "{pci}");

    let tap = |id: &str, name: &str| json!({"type": "tap", "id": id, "ifname": name, "script": "no", "downscript": "no"});
    vm.qmp.ok("netdev_add", &tap("n1", "tap1"))?;
    attached(&namespace, "tap1", true)?;
    let new = json!({"driver": "virtio-net-pci", "id": "new", "netdev": "n1", "addr": "5"});
    for _ in 0..3 {
        vm.qmp.ok("device_add", &new)?;
        let busy = vm.qmp.refused("netdev_del", &json!({"id": "n1"}))?;
        ensure!(busy.contains("in use by the device 'new'"), "{busy}");
        let taken = json!({"driver": "virtio-net-pci", "netdev": "n1"});
        let taken = vm.qmp.refused("device_add", &taken)?;
        ensure!(
            taken.contains("can't take value 'n1', it's in use"),
            "{taken}"
        );
        take_out(&mut vm, "new", 5)?;
        attached(&namespace, "tap1", false)?;
    }
    // A reset keeps what is there.
    vm.qmp.ok("device_add", &new)?;
    vm.qmp.ok("system_reset", &json!({}))?;
    vm.serial()?.ready()?;
    attached(&namespace, "tap0", true)?;
    attached(&namespace, "tap1", true)?;
    take_out(&mut vm, "new", 5)?;
    vm.qmp.ok("netdev_del", &json!({"id": "n1"}))?;
    take_out(&mut vm, "nic", 3)?;
    attached(&namespace, "tap0", false)?;
    vm.quit()?;
    Ok(())
}

#[test]
fn what_cannot_be_had_is_refused_by_name() -> Result<()> {
    let namespace = Namespace::new("")?;
    namespace.tap("tap0")?;
    namespace.enter()?;
    let dir = tempfile::tempdir()?;
    let mut vm = start(dir.path(), &["-netdev", NETDEV])?;
    attached(&namespace, "tap0", true)?;
    let tap = |id: &str, name: &str| json!({"type": "tap", "id": id, "ifname": name, "script": "no", "downscript": "no"});
    for (arguments, text) in [
        (tap("n0", "tap9"), "Duplicate ID 'n0' for netdev"),
        (tap("n1", "tap9"), "there is no tap \"tap9\""),
        (tap("n1", "tap0"), "cannot attach to the tap \"tap0\""),
        (
            json!({"type": "user", "id": "n1"}),
            "type=user cannot be had",
        ),
        (
            json!({"type": "tap", "id": "n1", "ifname": "tap0"}),
            "make the tap first",
        ),
    ] {
        let desc = vm.qmp.refused("netdev_add", &arguments)?;
        ensure!(desc.contains(text), "{arguments}: {desc}");
    }
    let unknown = vm.qmp.execute("netdev_del", &json!({"id": "x"}))?;
    ensure!(unknown["error"]["class"] == "DeviceNotFound", "{unknown}");
    people(&mut vm.qmp)?;
    attached(&namespace, "tap0", false)?;
    // A machine that has none of these from the start is not begun.
    for (netdev, text) in [
        (
            "tap,id=n,ifname=tap9,script=no,downscript=no",
            "there is no tap",
        ),
        (
            "tap,id=n,ifname=lo,script=no,downscript=no",
            "cannot attach to the tap",
        ),
    ] {
        let words = ["qemu", "-nodefaults", "-m", "64M", "-S", "-netdev", netdev];
        let device = ["-device", "virtio-net-pci,netdev=n"];
        for more in [&[][..], &device] {
            let mut second = pando(&[&words, more].concat())?;
            finish(&mut second)?.expect_code(1)?.expect_error(&[text])?;
        }
    }
    vm.quit()?;
    Ok(())
}

/// The netdev goes, comes, and goes, in people's words.
fn people(qmp: &mut Qmp) -> Result<()> {
    for line in [
        "netdev_del n0",
        &format!("netdev_add {NETDEV}"),
        "netdev_del n0",
    ] {
        let text = qmp.ok("human-monitor-command", &json!({"command-line": line}))?;
        ensure!(text == "", "{line}: {text}");
    }
    Ok(())
}

/// A template of the built-in guest.
fn template(dir: &Path, devices: &[&str]) -> Result<std::path::PathBuf> {
    std::fs::create_dir_all(dir)?;
    let out = dir.join("t");
    let mut command = pando(&["template", "create"])?;
    command
        .arg(&out)
        .args(["--kernel", "embedded", "--memory", "64M"]);
    command
        .args(devices)
        .args(["--ready", "serial:pando guest ready"]);
    finish(&mut command)?.expect_code(0)?;
    Ok(out)
}

#[test]
fn clones_of_every_engine_have_taps_of_their_own_in_namespaces_of_their_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = template(dir.path(), &["--net", "id=nic"])?;
    let path_without = template(&dir.path().join("without"), &["--pci"])?;
    let base = format!("pando-{}-c", std::process::id());
    let named = |number| Namespace::named(format!("{base}{number}"));
    let spaces = (0..3).map(named).collect::<Result<Vec<_>>>()?;
    for space in &spaces {
        space.tap("tap0")?;
    }
    let pattern = NetPattern {
        tap: "tap0".into(),
        netns: Some(format!("{base}%d")),
        ..NetPattern::default()
    };
    let engines = [Engine::Copy, Engine::Root, Engine::Kernel];
    let cases = engines.map(|engine| [(engine, &path, false), (engine, &path_without, true)]);
    for (engine, path, plug) in cases.into_iter().flatten() {
        let mut supervisor = Supervisor::new(CloneOptions {
            program: built_program("pando")?,
            template: path.clone(),
            name: "net".into(),
            engine,
            pager: PagerConfig::default(),
            verbosity: 0,
            overcommit: true,
            measure_memory: false,
            host_check: HostCheck::Due,
            root: RootOptions::default(),
        })?;
        let pattern = NetPattern {
            plug,
            ..pattern.clone()
        };
        let patterns = nets::check(&[pattern], Template::open(path)?.spec(), 3);
        supervisor.nets = patterns.map_err(anyhow::Error::msg)?;
        for _ in 0..3 {
            supervisor.start(&SerialPlan::Supervisor, &[]);
        }
        let deadline = Instant::now() + HANG;
        while !spaces.iter().all(|space| space.is_attached("tap0")) {
            ensure!(Instant::now() < deadline, "{engine}: a tap has nobody");
            supervisor.wait(Duration::from_millis(20))?;
        }
        drop(supervisor);
        for space in &spaces {
            attached(space, "tap0", false)?;
        }
    }
    Ok(())
}

#[test]
fn clones_on_the_command_line_say_where_their_cables_end() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = template(dir.path(), &["--net", "id=nic"])?;
    let namespace = Namespace::new("")?;
    namespace.tap("t0")?;
    namespace.tap("t1")?;
    let clone = |more: &[&str]| -> Result<std::process::Command> {
        let mut command = pando(&["clone"])?;
        command.arg(&path).args(["--count", "2"]).args(more);
        Ok(command)
    };
    let cable = format!("tap=t%d,netns={},mac=52:54:00:00:00:10", namespace.name);
    namespace.tap("own0")?;
    namespace.tap("own1")?;
    let own = format!("tap=own%d,netns={},plug", namespace.name);
    let running = Running::start(&mut clone(&["--net", &cable, "--net", &own])?)?;
    attached(&namespace, "own1", true)?;
    attached(&namespace, "t0", true)?;
    attached(&namespace, "t1", true)?;
    running.signal(rustix::process::Signal::TERM)?;
    running.finish()?;
    attached(&namespace, "t1", false)?;
    for (net, text) in [
        ("tap=t0", "is one for 2 clones"),
        ("tap=t%d,id=x", "has no network device \"x\""),
        ("tap=t%d,id=nic,plug", "\"nic\""),
        ("mac=52:54:00:00:00:10", "needs tap=NAME"),
    ] {
        finish(&mut clone(&["--net", net])?)?.expect_error(&[text])?;
    }
    // A tap that is not there ends the clone that should have it.
    let missing = format!("tap=x%d,netns={}", namespace.name);
    let ended = finish(&mut clone(&["--net", &missing])?)?;
    ensure!(ended.code != Some(0), "{}", ended.stderr);
    ensure!(
        ended.stderr.contains("there is no tap \"x0\""),
        "{}",
        ended.stderr
    );
    Ok(())
}
