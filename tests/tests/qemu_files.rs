#![forbid(unsafe_code)]
//! Nothing but its machine writes the file of a template, and a guest that is told to stop stands.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, make_template, memory, words};
use serde_json::{Value, json};

const PAGES: u64 = 20;

fn clone_words(extra: &[&str]) -> Vec<String> {
    let mut all = memory("template", CLONE);
    all.extend(words(extra));
    all
}

fn checksum(dir: &Path) -> Result<u64> {
    Ok(xxhash_rust::xxh3::xxh3_64(&fs::read(dir.join("template"))?))
}

fn qemu(dir: &Path, all: &[String]) -> Result<Command> {
    let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
    command.current_dir(dir).args(all);
    Ok(command)
}

#[test]
fn no_state_log_or_port_goes_into_the_file_of_a_template() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), PAGES)?;
    std::os::unix::fs::symlink("template", dir.path().join("link"))?;
    let before = checksum(dir.path())?;
    for option in [
        &["-serial", "file:link"][..],
        &["-pidfile", "template"],
        &["-D", "./template"],
        &["-chardev", "file,id=c,path=template,append=on", "-mon", "c"],
    ] {
        let all = clone_words(&[&["-incoming", "file:state"], option].concat());
        finish(&mut qemu(dir.path(), &all)?)?
            .expect_code(1)?
            .expect_error(&[
                "is the file of memory backend pc.ram, which nothing else may write",
            ])?;
        assert_eq!(checksum(dir.path())?, before, "{option:?}");
    }
    let mut clone = QemuVm::start(dir.path(), "c", &clone_words(&["-incoming", "file:state"]))?;
    clone.qmp.migrated()?;
    for uri in ["file:template", "file:link,offset=0x4000000"] {
        let why = clone.qmp.refused("migrate", &json!({"uri": uri}))?;
        assert!(
            why.contains("it is the memory of a machine that is there"),
            "{why}"
        );
    }
    for option in [["-serial", "file:template"], ["-D", "template"]] {
        let all = [&["-m", "64M", "-kernel", "embedded"][..], &option[..]].concat();
        finish(&mut qemu(dir.path(), &words(&all))?)?
            .expect_code(1)?
            .expect_error(&["is the memory of a machine that is there"])?;
    }
    assert_eq!(checksum(dir.path())?, before);
    clone.qmp.ok("cont", &json!({}))?;
    assert!(clone.serial()?.holds(PAGES, 7)?);
    clone.quit()?;
    Ok(())
}

#[test]
fn a_saved_machine_is_not_reset_while_clones_run_on_its_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut all = memory("template", "share=on");
    all.extend(words(&["-kernel", "embedded"]));
    let mut template = QemuVm::start(dir.path(), "t", &all)?;
    template.serial()?.ready()?;
    template.qmp.capability("x-ignore-shared")?;
    template.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    template.qmp.migrated()?;
    let before = checksum(dir.path())?;
    let mut clone = QemuVm::start(dir.path(), "c", &clone_words(&["-incoming", "file:state"]))?;
    clone.qmp.migrated()?;
    let why = template.qmp.refused("system_reset", &json!({}))?;
    assert!(why.contains("clones run on template"), "{why}");
    assert_eq!(template.qmp.status()?, "postmigrate");
    assert_eq!(checksum(dir.path())?, before);
    clone.quit()?;
    template.qmp.ok("system_reset", &json!({}))?;
    assert_eq!(template.qmp.status()?, "paused");
    template.quit()?;
    Ok(())
}

#[test]
fn what_is_loaded_is_a_file_and_memory_is_of_the_kind_that_was_saved() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let module = |how: &str| {
        let mut all = memory("template", if how == "share=on" { how } else { CLONE });
        all[1] = "64M,slots=1,maxmem=256M".to_owned();
        let object = format!("memory-backend-file,id=md,mem-path=module,size=32M,{how}");
        all.extend(words(&["-object", &object, "-device", "pc-dimm,memdev=md"]));
        all
    };
    let mut all = module("share=on");
    all.extend(words(&["-kernel", "embedded"]));
    let mut template = QemuVm::start(dir.path(), "t", &all)?;
    template.serial()?.ready()?;
    template.qmp.capability("x-ignore-shared")?;
    template.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    template.qmp.migrated()?;
    template.quit()?;
    let mut all = module("readonly=on");
    all.extend(words(&["-incoming", "file:state"]));
    finish(&mut qemu(dir.path(), &all)?)?
        .expect_code(1)?
        .expect_error(&["memory backend \"md\" is memory that the guest writes in the state"])?;

    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        dir.path().join("fifo"),
        rustix::fs::Mode::RUSR,
    )?;
    let mut all = module(CLONE);
    all.extend(words(&["-incoming", "defer"]));
    let mut clone = QemuVm::start(dir.path(), "c", &all)?;
    for path in ["fifo", ".", "/dev/zero"] {
        let uri = format!("file:{path}");
        let why = clone
            .qmp
            .refused("migrate-incoming", &json!({"uri": uri}))?;
        assert!(why.contains("it is no regular file"), "{why}");
    }
    assert_eq!(clone.qmp.status()?, "inmigrate");
    clone.quit()?;
    Ok(())
}

/// A kernel that is `code`, for 64-bit mode.
fn kernel(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 0x10_0000;
    const OFFSET: u64 = 0x1000;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for value in [AT, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let bytes = code.len() as u64;
    for value in [OFFSET, AT, AT, bytes, bytes, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend(code);
    file
}

#[test]
fn a_guest_that_resets_for_ever_stops_and_is_saved() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // mov al, 0xfe; out 0x64, al; again
    fs::write(
        dir.path().join("resets"),
        kernel(b"\xb0\xfe\xe6\x64\xeb\xfa"),
    )?;
    let mut vm = QemuVm::start(dir.path(), "a", &words(&["-m", "64M", "-kernel", "resets"]))?;
    for _ in 0..20 {
        vm.qmp.ok("stop", &json!({}))?;
        assert_eq!(vm.qmp.status()?, "paused");
        vm.qmp.ok("query-memdev", &json!({}))?;
        assert_eq!(vm.qmp.status()?, "paused");
        vm.qmp.ok("cont", &json!({}))?;
    }
    vm.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    vm.quit()?;
    Ok(())
}

#[test]
fn what_a_command_brings_about_comes_behind_its_answer() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = QemuVm::start(
        dir.path(),
        "a",
        &words(&["-m", "64M", "-kernel", "embedded", "-S"]),
    )?;
    let order = |vm: &mut QemuVm, command: &str| -> Result<[String; 2]> {
        vm.qmp
            .send(format!("{{\"execute\": \"{command}\"}}\n").as_bytes())?;
        let name = |message: Value| message["event"].as_str().unwrap_or("answer").to_owned();
        Ok([name(vm.qmp.receive()?), name(vm.qmp.receive()?)])
    };
    assert_eq!(order(&mut vm, "cont")?, ["RESUME", "answer"]);
    assert_eq!(order(&mut vm, "stop")?, ["STOP", "answer"]);
    assert_eq!(order(&mut vm, "system_reset")?, ["answer", "RESET"]);
    assert_eq!(order(&mut vm, "system_powerdown")?, ["answer", "POWERDOWN"]);
    assert_eq!(order(&mut vm, "quit")?, ["answer", "SHUTDOWN"]);
    vm.running.finish()?.expect_code(0)?;
    Ok(())
}

#[test]
fn a_daemon_that_cannot_load_its_state_fails_where_it_was_started() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("garbage"), "garbage garbage")?;
    for (uri, why) in [
        ("none", "Could not open 'none'"),
        ("garbage", "Not a migration stream"),
    ] {
        let uri = format!("file:{uri}");
        let all = words(&["-m", "64M", "-incoming", &uri, "-daemonize"]);
        finish(&mut qemu(dir.path(), &all)?)?
            .expect_code(1)?
            .expect_error(&[why])?;
    }
    // A second machine does not take the first one's PID file away.
    let boots = ["-m", "64M", "-kernel", "embedded", "-pidfile", "pid"];
    let first = QemuVm::start(dir.path(), "a", &words(&boots))?;
    finish(&mut qemu(dir.path(), &words(&boots))?)?
        .expect_code(1)?
        .expect_error(&["cannot create PID file: Cannot lock pid file"])?;
    let number = fs::read_to_string(dir.path().join("pid"))?;
    assert_eq!(number.trim(), first.running.pid().to_string());
    first.quit()?;
    assert!(!dir.path().join("pid").exists());
    Ok(())
}

#[test]
fn an_option_that_is_wrong_costs_the_file_of_a_template_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), PAGES)?;
    let before = checksum(dir.path())?;
    for option in [
        &["-qmp", "unix:/no/such/place,server=on,wait=off"][..],
        &["-monitor", "unix:/no/such/place,server=on,wait=off"],
        &[
            "-chardev",
            "socket,id=c,path=/no/such/place,server=on,wait=off",
        ],
        &["-serial", "file:/no/such/place"],
        &["-pidfile", "/no/such/place"],
        &["-D", "/no/such/place"],
        &["-initrd", "nothing"],
        &["-drive", "file=nothing,if=virtio,format=raw"],
        &[
            "-object",
            "memory-backend-file,id=m1,size=64M,mem-path=nothing,readonly=on",
        ],
        &["-device", "vhost-user-blk-pci,chardev=nothing"],
        &["-cpu", "host,+nothing"],
    ] {
        let mut all = memory("template", "share=on");
        all.extend(words(&["-kernel", "embedded"]));
        all.extend(words(option));
        let finished = finish(&mut qemu(dir.path(), &all)?)?.expect_code(1)?;
        assert!(finished.stderr.contains("noth") || finished.stderr.contains("/no/such/place"));
        assert_eq!(checksum(dir.path())?, before, "{option:?}");
    }
    Ok(())
}

#[test]
fn what_nothing_uses_is_there_all_the_same() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let all = words(&[
        "-m",
        "64M,slots=1,maxmem=1G",
        "-object",
        "memory-backend-ram,id=later,size=64M",
        "-object",
        "memory-backend-file,id=made,size=64M,mem-path=made,share=on",
        "-chardev",
        "file,id=f,path=output",
        "-chardev",
        "null,id=n,logfile=log",
        "-chardev",
        "socket,id=s,path=listens,server=on,wait=off",
        "-device",
        "virtio-rng-pci",
        "-kernel",
        "embedded",
    ]);
    let mut vm = QemuVm::start(dir.path(), "m", &all)?;
    assert_eq!(fs::metadata(dir.path().join("made"))?.len(), 64 << 20);
    for name in ["output", "log"] {
        assert!(dir.path().join(name).is_file(), "{name}");
    }
    let mut client = UnixStream::connect(dir.path().join("listens"))?;
    client.write_all(b"nobody reads this")?;
    let devices = vm.qmp.ok("query-memdev", &json!({}))?;
    let ids: Vec<&str> = devices
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|device| device["id"].as_str())
        .collect();
    assert_eq!(ids.len(), 3, "{devices}");
    let module = json!({"driver": "pc-dimm", "id": "d0", "memdev": "later"});
    vm.qmp.ok("device_add", &module)?;
    vm.qmp.ok("object-del", &json!({"id": "made"}))?;
    let why = vm.qmp.refused("object-del", &json!({"id": "later"}))?;
    assert_eq!(why, "object 'later' is in use, can not be deleted");
    vm.quit()?;
    Ok(())
}
