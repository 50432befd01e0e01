#![forbid(unsafe_code)]
//! Devices in other processes: a disk of QEMU's storage daemon on memory that is shared, and every machine
//! that cannot have one, with the reason.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{create_template, eventually, finish, pando, signal_pid};
use pando_tests::qemu::{CLONE, QemuVm, image, memory, words};
use pando_vmm::payload::protocol::READY_LINE;
use rustix::process::Signal;
use serde_json::{Value, json};

const SHARED: &str = "memory-backend-memfd,id=pc.ram,size=64M,share=on";

/// The daemon, on `socket` in a folder.
struct Daemon(Child);

impl Daemon {
    fn start(dir: &Path) -> Result<Self> {
        let _ = fs::remove_file(dir.join("socket"));
        image(dir, "image")?;
        let child = Command::new("qemu-storage-daemon")
            .current_dir(dir)
            .args(["--blockdev", "file,node-name=d,filename=image", "--export"])
            .arg("vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=socket,writable=on")
            .stdin(Stdio::null())
            .spawn()
            .context("qemu-storage-daemon: run tests/setup")?;
        let daemon = Self(child);
        let socket = dir.join("socket");
        eventually("the daemon listens", || {
            // Its path is there before it listens, which nobody else can see.
            socket.exists() && listening("socket")
        })?;
        Ok(daemon)
    }
}

/// Whether somebody listens at a path of this name: the kernel's own list says so.
fn listening(name: &str) -> bool {
    let all = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let mut lines = all.lines();
    lines.any(|line| line.contains(" 00010000 ") && line.ends_with(name))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Options of a machine on one backend with a disk of another process.
fn with_disk(object: &str) -> Vec<String> {
    words(&[
        "-m",
        "64M",
        "-object",
        object,
        "-machine",
        "q35,memory-backend=pc.ram",
        "-chardev",
        "socket,id=vu,path=socket",
        "-device",
        "vhost-user-blk-pci,chardev=vu,id=vb0,num-queues=1",
    ])
}

/// What a command line is refused with.
fn refused(dir: &Path, options: &[String]) -> Result<String> {
    let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
    let finished = finish(command.current_dir(dir).args(options))?.expect_code(1)?;
    Ok(finished.stderr)
}

fn ids(functions: &Value) -> Vec<&str> {
    let devices = functions[0]["devices"].as_array().into_iter().flatten();
    let ids = devices.filter_map(|device| device["qdev_id"].as_str());
    ids.filter(|id| !id.is_empty()).collect()
}

#[test]
fn a_disk_of_another_process_is_there_goes_and_comes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut daemon = Daemon::start(dir.path())?;
    let mut options = with_disk(SHARED);
    options.extend(words(&["-kernel", "embedded"]));
    let mut vm = QemuVm::start(dir.path(), "a", &options)?;
    vm.serial()?.ready()?;
    let functions = vm.qmp.ok("query-pci", &json!({}))?;
    ensure!(ids(&functions) == ["vb0"], "{functions}");
    let device = &functions[0]["devices"][1];
    ensure!(device["id"]["device"] == 0x1042 && device["class_info"]["class"] == 0x100);
    // No image of this process.
    ensure!(vm.qmp.ok("query-block", &json!({}))? == json!([]));
    // One device has the chardev.
    let more = json!({"driver": "vhost-user-blk-pci", "id": "vb1", "chardev": "vu"});
    let error = vm.qmp.refused("device_add", &more)?;
    ensure!(
        error.contains("can't find value 'vu', or it's in use"),
        "{error}"
    );
    let error = vm.qmp.refused(
        "device_add",
        &json!({"driver": "vhost-user-blk-pci", "chardev": "zz"}),
    )?;
    ensure!(error.contains("can't find value 'zz'"), "{error}");
    // A daemon that is killed is no end of the machine, which can be stopped and goes on.
    daemon.0.kill()?;
    daemon.0.wait()?;
    for _ in 0..3 {
        vm.qmp.ok("stop", &json!({}))?;
        vm.qmp.ok("cont", &json!({}))?;
    }
    ensure!(vm.qmp.status()? == "running");
    // A reset makes the machine anew, on another daemon.
    drop(daemon);
    let _daemon = Daemon::start(dir.path())?;
    vm.qmp.ok("system_reset", &json!({}))?;
    let functions = vm.qmp.ok("query-pci", &json!({}))?;
    ensure!(ids(&functions) == ["vb0"], "{functions}");
    vm.qmp.ok("device_del", &json!({"id": "vb0"}))?;
    ensure!(vm.qmp.status()? == "running");
    let netdev = json!({"type": "vhost-user", "id": "n", "chardev": "vu"});
    let error = vm.qmp.refused("netdev_add", &netdev)?;
    ensure!(
        error.contains("cannot be added while the machine runs"),
        "{error}"
    );
    vm.quit()?;
    Ok(())
}

#[test]
fn a_daemon_that_stands_still_is_not_waited_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    let mut options = words(&[
        "-object",
        SHARED,
        "-machine",
        "q35,memory-backend=pc.ram",
        "-m",
        "64M",
    ]);
    options.extend(words(&[
        "-kernel",
        "embedded",
        "-chardev",
        "socket,id=vu,path=socket",
    ]));
    let mut vm = QemuVm::start(dir.path(), "a", &options)?;
    vm.serial()?.ready()?;
    signal_pid(daemon.0.id(), Signal::STOP)?;
    let device = json!({"driver": "vhost-user-blk-pci", "id": "vb0", "chardev": "vu"});
    let begun = Instant::now();
    let error = vm.qmp.refused("device_add", &device)?;
    ensure!(begun.elapsed() < Duration::from_secs(10));
    let why = "cannot make the vhost-user device \"vb0\": the vhost-user backend at socket does not answer \
               GET_FEATURES within 2000 ms";
    ensure!(error.contains(why), "{error}");
    ensure!(vm.qmp.status()? == "running");
    signal_pid(daemon.0.id(), Signal::CONT)?;
    // It lets go of the one that gave up first.
    eventually("it answers", || vm.qmp.ok("device_add", &device).is_ok())?;
    let functions = vm.qmp.ok("query-pci", &json!({}))?;
    ensure!(ids(&functions) == ["vb0"], "{functions}");
    vm.quit()?;
    Ok(())
}

#[test]
fn a_reset_without_the_daemon_ends_the_machine_with_the_reason() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    let mut options = with_disk(SHARED);
    options.extend(words(&["-kernel", "embedded"]));
    let mut vm = QemuVm::start(dir.path(), "a", &options)?;
    vm.serial()?.ready()?;
    drop(daemon);
    vm.qmp.ok("system_reset", &json!({}))?;
    let finished = vm.running.finish()?.expect_code(1)?;
    let why = "cannot make the vhost-user device \"vb0\": failed to connect to 'socket'";
    ensure!(finished.stderr.contains(why), "{}", finished.stderr);
    Ok(())
}

#[test]
fn a_machine_file_has_a_disk_of_another_process() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let _daemon = Daemon::start(dir.path())?;
    let text = "kernel = 'embedded'\n[memory]\nbackend = 'm'\n[[backend]]\nid = 'm'\nkind = 'memfd'\n\
                size = '64M'\nshare = true\n[[device]]\nkind = 'vhost-user-blk'\nid = 'vb0'\nsocket = 'socket'\n";
    fs::write(dir.path().join("vm.toml"), text)?;
    let mut command = pando(&["run", "--machine", "vm.toml", "--print-machine"])?;
    let finished = finish(command.current_dir(dir.path()))?.expect_code(0)?;
    for line in [
        "kind = \"vhost-user-blk\"",
        "socket = \"socket\"",
        "slot = 1",
    ] {
        ensure!(finished.stdout.contains(line), "{}", finished.stdout);
    }
    let mut command = pando(&["run", "--machine", "vm.toml"])?;
    command.current_dir(dir.path()).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = String::new();
    while line.trim_end() != READY_LINE.trim_end() {
        line.clear();
        ensure!(lines.read_line(&mut line)? > 0, "the guest said nothing");
    }
    let mut input = child.stdin.take().context("no input")?;
    input.write_all(&pando_vmm::payload::protocol::Command::PowerOff.encode())?;
    ensure!(child.wait()?.success());
    Ok(())
}

#[test]
fn a_state_goes_on_with_the_disk_of_another_process() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let _daemon = Daemon::start(dir.path())?;
    let object = "memory-backend-file,id=pc.ram,mem-path=ram,size=64M,share=on";
    let mut options = with_disk(object);
    options.extend(words(&["-kernel", "embedded"]));
    let mut vm = QemuVm::start(dir.path(), "a", &options)?;
    vm.serial()?.ready()?;
    vm.qmp.ok("stop", &json!({}))?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    let saved = vm.qmp.migrated()?;
    ensure!(saved["status"] == "completed", "{saved}");
    vm.quit()?;
    let mut options = with_disk(object);
    options.extend(words(&["-incoming", "defer"]));
    let mut vm = QemuVm::start(dir.path(), "b", &options)?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp
        .ok("migrate-incoming", &json!({"uri": "file:state"}))?;
    let loaded = vm.qmp.migrated()?;
    ensure!(loaded["status"] == "completed", "{loaded}");
    vm.qmp.ok("cont", &json!({}))?;
    ensure!(vm.serial()?.ask("i")?.starts_with("ok"));
    vm.quit()?;
    // And so can a clone's state without the device not be loaded with it.
    let mut clone = memory("ram", CLONE);
    clone.extend(words(&["-incoming", "defer"]));
    let mut vm = QemuVm::start(dir.path(), "c", &clone)?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok(
        "migrate-incoming",
        &json!({"uri": "file:state", "exit-on-error": false}),
    )?;
    let loaded = vm.qmp.migrated()?;
    ensure!(loaded["status"] == "failed", "{loaded}");
    vm.quit()?;
    Ok(())
}

#[test]
fn memory_that_is_not_shared_is_refused_before_the_machine_is_made() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let _daemon = Daemon::start(dir.path())?;
    fs::File::create(dir.path().join("ram"))?.set_len(64 << 20)?;
    let why = "device \"vb0\": vhost-user-blk shares all guest memory with another process, and memory backend \
               \"pc.ram\" ";
    for (object, texts) in [
        (
            "memory-backend-file,id=pc.ram,mem-path=ram,size=64M,share=off,readonly=on,rom=off",
            [
                "is a clone's (share=off,readonly=on,rom=off)",
                "take the device off the line",
            ],
        ),
        (
            "memory-backend-file,id=pc.ram,mem-path=ram,size=64M,share=off",
            ["is private (share=off)", "say share=on"],
        ),
        (
            "memory-backend-memfd,id=pc.ram,size=64M,share=off",
            ["is private (share=off)", "say share=on"],
        ),
        (
            "memory-backend-ram,id=pc.ram,size=64M",
            [
                "has no file that another process could map",
                "consider using -object memory-backend-file share=on",
            ],
        ),
    ] {
        let said = refused(dir.path(), &with_disk(object))?;
        ensure!(said.contains(why), "{said}");
        ensure!(texts.iter().all(|text| said.contains(text)), "{said}");
    }
    // RAM of Pando's own making, and a network.
    let mut options = words(&["-chardev", "socket,id=vu,path=socket", "-netdev"]);
    options.extend(words(&[
        "vhost-user,id=n0,chardev=vu",
        "-device",
        "virtio-net-pci,netdev=n0",
    ]));
    let said = refused(dir.path(), &options)?;
    ensure!(
        said.contains("vhost-user-net shares all guest memory"),
        "{said}"
    );
    ensure!(
        said.contains("memory backend \"pc.ram\" has no file"),
        "{said}"
    );
    Ok(())
}

#[test]
fn backends_that_are_missing_are_named_and_chardevs_that_lead_to_none() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let said = refused(dir.path(), &with_disk(SHARED))?;
    ensure!(
        said.contains("Failed to connect to 'socket': No such file or directory"),
        "{said}"
    );
    fs::write(dir.path().join("socket"), "")?;
    let said = refused(dir.path(), &with_disk(SHARED))?;
    ensure!(
        said.contains("\"vb0\": failed to connect to 'socket'"),
        "{said}"
    );
    for (chardev, device, text) in [
        (
            "socket,id=vu,path=socket,server=on,wait=off",
            "chardev=vu",
            "leave server=on out",
        ),
        (
            "socket,id=vu,host=127.0.0.1,port=1",
            "chardev=vu",
            "is no Unix socket",
        ),
        ("null,id=vu", "chardev=vu", "is no Unix socket"),
        ("null,id=x", "chardev=vu", "can't find value 'vu'"),
        ("null,id=x", "id=v", "chardev is mandatory"),
        (
            "socket,id=vu,path=socket",
            "chardev=vu,num-queues=4",
            "num-queues=4 cannot be had",
        ),
    ] {
        let options = [
            "-chardev",
            chardev,
            "-device",
            &format!("vhost-user-blk-pci,{device}"),
        ];
        let said = refused(dir.path(), &words(&options))?;
        ensure!(said.contains(text), "{said}");
    }
    Ok(())
}

#[test]
fn devices_of_the_multi_process_kind_are_refused_with_the_memory_that_they_would_need() -> Result<()>
{
    let dir = tempfile::tempdir()?;
    fs::File::create(dir.path().join("ram"))?.set_len(64 << 20)?;
    let mut options = memory("ram", CLONE);
    options.extend(words(&["-device", "x-pci-proxy-dev,id=p0"]));
    let said = refused(dir.path(), &options)?;
    ensure!(
        said.contains("x-pci-proxy-dev,id=p0: fd parameter not specified for p0"),
        "{said}"
    );
    let proxy = |object: &str, fd: &str| {
        let machine = [
            "-m",
            "64M",
            "-object",
            object,
            "-machine",
            "q35,memory-backend=pc.ram",
        ];
        let device = format!("x-pci-proxy-dev,id=p0,fd={fd}");
        let all = [machine.as_slice(), &["-device", &device]].concat();
        // Standard input is a socket.
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
        command.current_dir(dir.path()).args(&all);
        command.stdin(std::os::fd::OwnedFd::from(theirs));
        let finished = finish(&mut command)?.expect_code(1)?;
        drop(ours);
        anyhow::Ok(finished.stderr)
    };
    let clone = "memory-backend-file,id=pc.ram,mem-path=ram,size=64M,share=off,readonly=on,rom=off";
    ensure!(proxy(clone, "999")?.contains("proxy: fd 999 is not a socket"));
    ensure!(proxy(clone, "zz")?.contains("File descriptor named 'zz' has not been found"));
    let said = proxy(clone, "0")?;
    let why = "it shares all guest memory with another process, and memory backend \"pc.ram\" is a clone's";
    ensure!(
        said.contains("device 'x-pci-proxy-dev' cannot be had"),
        "{said}"
    );
    ensure!(said.contains(why), "{said}");
    let said = proxy(SHARED, "0")?;
    ensure!(
        said.contains("Pando has no multi-process devices"),
        "{said}"
    );
    ensure!(!said.contains("pc.ram\" is"), "{said}");
    for (option, value) in [
        ("-machine", "x-remote"),
        ("-object", "x-remote-object,id=robj1,devid=lsi0,fd=3"),
    ] {
        let said = refused(dir.path(), &words(&[option, value]))?;
        ensure!(
            said.contains("Pando has no multi-process devices"),
            "{said}"
        );
        ensure!(said.contains("which a template's clones cannot"), "{said}");
    }
    Ok(())
}

#[test]
fn no_template_is_made_with_a_device_that_its_clones_cannot_have() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (option, kind) in [
        ("--vhost-user-blk", "vhost-user-blk"),
        ("--vhost-user-net", "vhost-user-net"),
    ] {
        let out = dir.path().join("template");
        let finished = create_template(&out, &[option, "/run/none"])?.expect_code(2)?;
        let why = format!(
            "device {kind} is a {kind:?}: it shares all guest memory with another process, which clones cannot do"
        );
        ensure!(finished.stderr.contains(&why), "{}", finished.stderr);
        ensure!(!out.exists());
    }
    // A plain machine without shared memory has its own refusal.
    let mut command = pando(&[
        "run",
        "--kernel",
        "embedded",
        "--vhost-user-blk",
        "/run/none",
    ])?;
    let finished = finish(&mut command)?.expect_code(2)?;
    let why = "memory backend \"ram0\" has no file that another process could map";
    ensure!(finished.stderr.contains(why), "{}", finished.stderr);
    Ok(())
}
