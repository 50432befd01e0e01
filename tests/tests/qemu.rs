#![forbid(unsafe_code)]
//! QEMU's way to make and use a template, through `pando qemu`, on real KVM.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Running, finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, make_template, memory, words, write};
use pando_tests::rig::built_program;
use serde_json::json;

const PAGES: u64 = 200;

fn clone_words(extra: &[&str]) -> Vec<String> {
    let mut all = memory("template", CLONE);
    all.extend(words(extra));
    all
}

fn checksum(dir: &std::path::Path) -> Result<u64> {
    Ok(xxhash_rust::xxh3::xxh3_64(&fs::read(dir.join("template"))?))
}

#[test]
fn the_recipe_of_the_templating_page() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), PAGES)?;
    fs::set_permissions(
        dir.path().join("template"),
        fs::Permissions::from_mode(0o444),
    )?;
    let before = checksum(dir.path())?;
    let mut clones = Vec::new();
    for name in ["c1", "c2"] {
        let mut clone = QemuVm::start(dir.path(), name, &clone_words(&["-incoming", "defer"]))?;
        assert_eq!(clone.qmp.status()?, "inmigrate");
        clone.qmp.capability("x-ignore-shared")?;
        clone
            .qmp
            .ok("migrate-incoming", &json!({"uri": "file:state"}))?;
        assert_eq!(clone.qmp.migrated()?, json!({"status": "completed"}));
        assert_eq!(clone.qmp.status()?, "paused");
        clone.qmp.ok("cont", &json!({}))?;
        assert_eq!(clone.qmp.status()?, "running");
        clones.push(clone);
    }
    let (mut first, mut second) = (clones[0].serial()?, clones[1].serial()?);
    assert!(first.holds(PAGES, 7)?);
    assert!(first.ask(&write(PAGES, 9))?.starts_with("ok w"));
    assert!(second.holds(PAGES, 7)?, "a clone sees another");
    assert!(first.holds(PAGES, 9)?);
    for mut clone in clones {
        clone.qmp.ok("query-status", &json!({}))?;
        assert!(clone.qmp.event_names().contains(&"RESUME"));
        clone.quit()?;
    }
    assert_eq!(checksum(dir.path())?, before, "the template was changed");
    Ok(())
}

#[test]
fn a_state_that_says_what_it_leaves_out_needs_no_capability_on_the_command_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), PAGES)?;
    let mut clone = QemuVm::start(dir.path(), "c", &clone_words(&["-incoming", "file:state"]))?;
    assert_eq!(clone.qmp.migrated()?["status"], "completed");
    clone.qmp.ok("cont", &json!({}))?;
    assert!(clone.serial()?.holds(PAGES, 7)?);
    // A save of a clone has its RAM, for its own pages are in no file.
    clone.qmp.ok("stop", &json!({}))?;
    clone.qmp.ok("migrate", &json!({"uri": "file:second"}))?;
    let end = clone.qmp.migrated()?;
    assert!(end["ram"]["normal"].as_u64().unwrap_or(0) >= PAGES, "{end}");
    clone.quit()?;
    let mut again = QemuVm::start(dir.path(), "g", &clone_words(&["-incoming", "file:second"]))?;
    assert_eq!(again.qmp.migrated()?["status"], "completed");
    again.qmp.ok("cont", &json!({}))?;
    assert!(again.serial()?.holds(PAGES, 7)?);
    again.quit()?;
    Ok(())
}

#[test]
fn ram_goes_into_the_file_and_comes_back_from_it() -> Result<()> {
    let plain = words(&["-m", "64M"]);
    for mapped in [false, true] {
        let dir = tempfile::tempdir()?;
        let mut source = plain.clone();
        source.extend(words(&["-kernel", "embedded"]));
        let mut vm = QemuVm::start(dir.path(), "s", &source)?;
        let mut serial = vm.serial()?;
        serial.ready()?;
        assert!(serial.ask(&write(PAGES, 3))?.starts_with("ok w"));
        if mapped {
            vm.qmp.capability("mapped-ram")?;
        }
        vm.qmp.capability("events")?;
        // Saved while it runs: it comes up running.
        vm.qmp
            .ok("migrate", &json!({"uri": "file:state,offset=0x1000"}))?;
        assert_eq!(vm.qmp.migrated()?["status"], "completed");
        assert!(vm.qmp.event_names().contains(&"STOP"));
        assert!(vm.qmp.event_names().contains(&"MIGRATION"));
        assert_eq!(
            vm.qmp.refused("migrate", &json!({"uri": "file:x"}))?,
            "Can't migrate the vm that was paused due to previous migration"
        );
        vm.quit()?;
        let mut target = plain.clone();
        target.extend(words(&["-incoming", "file:state,offset=0x1000"]));
        let mut vm = QemuVm::start(dir.path(), "t", &target)?;
        assert_eq!(vm.qmp.migrated()?["status"], "completed");
        assert_eq!(vm.qmp.status()?, "running");
        assert!(vm.serial()?.holds(PAGES, 3)?);
        vm.quit()?;
    }
    Ok(())
}

/// Runs a clone that must end with 1 and say this.
fn refused(dir: &std::path::Path, options: &[String], texts: &[&str]) -> Result<()> {
    let mut command = pando(&["qemu", "-nodefaults", "-S"])?;
    command.current_dir(dir).args(options);
    finish(&mut command)?.expect_code(1)?.expect_error(texts)?;
    Ok(())
}

#[test]
fn what_does_not_match_the_state_is_refused_before_anything_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), 8)?;
    let dir = dir.path();
    let plain = ["-incoming", "file:state"];
    refused(
        dir,
        &words(&["-m", "64M", "-incoming", "file:state"]),
        &["memory backend \"pc.ram\" is left out of the state, and here it has no file"],
    )?;
    let other = |from: &str, to: &str| {
        let all = clone_words(&plain);
        all.iter()
            .map(|word| word.replace(from, to))
            .collect::<Vec<_>>()
    };
    refused(
        dir,
        &other("pc.ram", "mem0"),
        &[
            "Unknown ramblock \"pc.ram\", cannot accept migration",
            "load of migration failed",
        ],
    )?;
    refused(
        dir,
        &other("q35", "pc"),
        &["Machine type received is 'pc-q35-10.0' and local is 'pc-i440fx-10.0'"],
    )?;
    refused(
        dir,
        &clone_words(&["-smp", "2", "-incoming", "file:state"]),
        &["1 vCPUs"],
    )?;
    // The same bytes in another file are as good; other bytes are not.
    fs::copy(dir.join("template"), dir.join("copy"))?;
    let mut clone = QemuVm::start(dir, "copy", &other("mem-path=template", "mem-path=copy"))?;
    assert_eq!(clone.qmp.migrated()?["status"], "completed");
    clone.quit()?;
    let mut bytes = fs::read(dir.join("copy"))?;
    bytes[0x10_0000] ^= 1;
    fs::write(dir.join("copy"), &bytes)?;
    refused(
        dir,
        &other("mem-path=template", "mem-path=copy"),
        &[
            "\"pc.ram\"",
            "does not hold what it held when the state was saved",
        ],
    )?;
    for (name, length) in [("cut", 5000), ("head", 20), ("empty", 0)] {
        let state = fs::read(dir.join("state"))?;
        fs::write(dir.join(name), &state[..length])?;
        let from = format!("file:{name}");
        let texts: &[&str] = match name {
            "empty" => &[
                "Not a migration stream",
                "load of migration failed: Invalid argument",
            ],
            _ => &["error while loading state", "Input/output error"],
        };
        refused(dir, &clone_words(&["-incoming", &from]), texts)?;
    }
    Ok(())
}

#[test]
fn a_load_that_fails_may_leave_the_machine_waiting() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), 8)?;
    let mut clone = QemuVm::start(dir.path(), "c", &clone_words(&["-incoming", "defer"]))?;
    let qmp = &mut clone.qmp;
    let error = qmp.refused("migrate-incoming", &json!({"uri": "file:none"}))?;
    assert_eq!(error, "Could not open 'none': No such file or directory");
    qmp.ok(
        "migrate-incoming",
        &json!({"uri": "file:state", "exit-on-error": false}),
    )?;
    let end = qmp.migrated()?;
    assert_eq!(
        end,
        json!({"status": "failed", "error-desc": "load of migration failed: Invalid argument"})
    );
    assert_eq!(qmp.status()?, "inmigrate");
    // `cont` before there is a state says that it may run then; the state says that it was stopped.
    qmp.ok("cont", &json!({}))?;
    assert_eq!(qmp.status()?, "inmigrate");
    assert_eq!(
        qmp.refused("migrate", &json!({"uri": "file:x"}))?,
        "Guest is waiting for an incoming migration"
    );
    qmp.capability("x-ignore-shared")?;
    qmp.ok("migrate-incoming", &json!({"uri": "file:state"}))?;
    assert_eq!(qmp.migrated()?["status"], "completed");
    assert_eq!(
        qmp.refused("migrate-incoming", &json!({"uri": "file:state"}))?,
        "The incoming migration has already been started"
    );
    let finished = clone.quit()?;
    assert!(
        finished
            .stderr
            .contains("Capability x-ignore-shared is off, but received capability is on")
    );
    Ok(())
}

#[test]
fn a_guest_that_resets_boots_anew_and_one_that_powers_off_ends() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let boots = words(&["-m", "64M", "-kernel", "embedded"]);
    let mut vm = QemuVm::start(dir.path(), "a", &boots)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    vm.qmp.ok("system_reset", &json!({}))?;
    serial.ready()?;
    serial.ask("e 5")?;
    assert_eq!(serial.ask("x")?, "ok x");
    serial.ready()?;
    assert_eq!(vm.qmp.status()?, "running");
    let resets = vm
        .qmp
        .events
        .iter()
        .filter(|event| event["event"] == "RESET");
    let guests: Vec<_> = resets.map(|event| event["data"]["guest"].clone()).collect();
    assert_eq!(guests, [json!(false), json!(true)]);
    serial.ask("p").ok();
    let event = loop {
        let event = vm.qmp.receive()?;
        if event["event"] == "SHUTDOWN" {
            break event;
        }
    };
    assert_eq!(
        event["data"],
        json!({"guest": true, "reason": "guest-shutdown"})
    );
    vm.running.finish()?.expect_code(0)?;

    let mut once = boots.clone();
    once.extend(words(&["-no-reboot", "-no-shutdown"]));
    let mut vm = QemuVm::start(dir.path(), "b", &once)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    serial.ask("x").ok();
    loop {
        if vm.qmp.receive()?["event"] == "SHUTDOWN" {
            break;
        }
    }
    assert_eq!(vm.qmp.status()?, "shutdown");
    assert_eq!(
        vm.qmp.refused("cont", &json!({}))?,
        "Resetting the Virtual Machine is required"
    );
    vm.quit()?;
    Ok(())
}

#[test]
fn a_link_by_qemus_name_acts_as_qemu() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let link = dir.path().join("qemu-system-x86_64");
    symlink(built_program("pando")?, &link)?;
    let version = finish(Command::new(&link).arg("--version"))?.expect_code(0)?;
    assert!(
        version.stdout.starts_with("QEMU emulator version 10."),
        "{}",
        version.stdout
    );
    let wrong = finish(Command::new(&link).arg("-frob"))?.expect_code(1)?;
    assert_eq!(wrong.stderr, "qemu-system-x86_64: -frob: invalid option\n");
    let wrong = finish(&mut pando(&["qemu", "-mem-path", "/x"])?)?.expect_code(1)?;
    assert!(
        wrong.stderr.starts_with("pando: -mem-path: "),
        "{}",
        wrong.stderr
    );
    assert!(wrong.stderr.contains("cannot be used for VM templating"));
    let nothing = finish(&mut pando(&["qemu", "-nodefaults", "-m", "64M"])?)?.expect_code(1)?;
    assert!(
        nothing.stderr.contains("Pando has no firmware"),
        "{}",
        nothing.stderr
    );
    Ok(())
}

#[test]
fn a_daemon_says_when_it_is_ready_and_writes_its_number() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pid_file = dir.path().join("pid");
    let log = dir.path().join("log");
    let monitor = dir.path().join("m");
    let socket = format!("unix:{},server=on,wait=off", monitor.display());
    let common = ["qemu", "-m", "64M", "-daemonize", "-serial", "null", "-S"];
    let mut command = pando(&common)?;
    command.args(["-qmp", &socket, "-d", "qmp"]);
    command.arg("-pidfile").arg(&pid_file).arg("-D").arg(&log);
    finish(&mut command)?.expect_code(0)?;
    let mut qmp = pando_tests::qemu::Qmp::open(&monitor)?;
    let pid: u32 = fs::read_to_string(&pid_file)?.trim().parse()?;
    assert_eq!(qmp.status()?, "prelaunch");
    qmp.ok("quit", &json!({}))?;
    pando_tests::command::eventually("the daemon is gone", || {
        !pando_tests::command::is_alive(pid)
    })?;
    assert!(!pid_file.exists() && !monitor.exists());
    assert!(fs::read_to_string(&log)?.contains("query-status"));
    // What is wrong is said by the one that was started.
    let wrong = finish(pando(&common)?.args(["-pidfile", "/none/pid"]))?.expect_code(1)?;
    assert!(
        wrong.stderr.contains("cannot create PID file"),
        "{}",
        wrong.stderr
    );
    Ok(())
}

#[test]
fn a_signal_ends_it_and_says_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vm = QemuVm::start(dir.path(), "a", &words(&["-m", "64M", "-S"]))?;
    vm.running.signal(rustix::process::Signal::TERM)?;
    let event = vm.qmp.receive()?;
    assert_eq!(
        event["data"],
        json!({"guest": false, "reason": "host-signal"})
    );
    let finished = vm.running.finish()?.expect_code(0)?;
    ensure!(
        finished.stderr.contains("terminating on signal 15"),
        "{}",
        finished.stderr
    );
    Ok(())
}

#[test]
fn people_have_a_monitor_too() -> Result<()> {
    use std::io::{Read, Write};
    let mut command = pando(&[
        "qemu",
        "-nodefaults",
        "-m",
        "64M",
        "-S",
        "-monitor",
        "stdio",
    ])?;
    command.stdin(std::process::Stdio::piped());
    let mut running = Running::start(&mut command)?;
    let mut stdin = running.child.stdin.take().context("no standard input")?;
    stdin.write_all(b"info status\ninfo version\nfrob\nmigrate \"file:a\nmigrate_set_capability \"events\" on\ninfo memory_size_summary\ninfo frob\ncont now\nhelp frob\nhelp info numa\nquit\n")?;
    let mut stdout = running.child.stdout.take().context("no standard output")?;
    let mut text = String::new();
    stdout.read_to_string(&mut text)?;
    assert_eq!(running.wait()?, Some(0));
    for part in [
        "(qemu) VM status: paused (prelaunch)\r\n",
        "unknown command: 'frob'",
        "(qemu) unterminated string\r\nmigrate: string expected\r\n(qemu) (qemu) ",
        "base memory: 67108864\r\n",
        "unknown command: 'info frob'\r\n",
        "cont: other arguments are expected\r\nTry \"help cont\" for more information\r\n",
        "(qemu) unknown command: 'frob'\r\n(qemu) info numa -- nodes\r\n",
        "Pando",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    Ok(())
}
