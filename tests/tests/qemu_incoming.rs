#![forbid(unsafe_code)]
//! States that come slowly, in part or damaged, and descriptors of what is memory.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use pando_tests::command::{Running, finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, make_template, memory, write};
use serde_json::json;

const PAGES: u64 = 300;

fn with(mut words: Vec<String>, more: &[&str]) -> Vec<String> {
    words.extend(more.iter().map(|&word| word.to_owned()));
    words
}

/// `pando qemu` in `dir`, started by a shell that opens `redirect` first.
fn behind(dir: &Path, redirect: &str, words: &[String]) -> Result<Command> {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            &format!("exec \"$0\" qemu -nodefaults \"$@\" {redirect}"),
        ])
        .arg(pando(&["x"])?.get_program())
        .args(words)
        .current_dir(dir);
    Ok(command)
}

/// Saves a machine whose RAM is `template`, with its RAM in the file `whole`.
fn save_with_ram(dir: &Path) -> Result<Vec<u8>> {
    let words = with(memory("template", "share=on"), &["-kernel", "embedded"]);
    let mut vm = QemuVm::start(dir, "t", &words)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    ensure!(serial.ask(&write(PAGES, 7))?.starts_with("ok w"));
    vm.qmp.ok("migrate", &json!({"uri": "file:whole"}))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    vm.quit()?;
    Ok(fs::read(dir.join("whole"))?)
}

#[test]
fn a_state_that_is_cut_or_damaged_leaves_the_file_of_a_template_as_it_is() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let whole = save_with_ram(dir)?;
    let before = fs::read(dir.join("template"))?;
    let mut damaged = whole.clone();
    let last = damaged.len() - 100;
    damaged[last] ^= 1;
    let cut = &whole[..whole.len() - 5000];
    for (name, content, why) in [
        (
            "cut",
            cut,
            "in cut cannot be used: the file is cut: it ends in page",
        ),
        (
            "damaged",
            &damaged,
            "in damaged cannot be used: its checksum is",
        ),
    ] {
        fs::write(dir.join(name), content)?;
        let ram = [
            "RAM of \"pc.ram\"",
            "load of migration failed: Input/output error",
        ];
        let uri = format!("file:{name}");
        let words = with(memory("template", "share=on"), &["-incoming", &uri]);
        let mut command = pando(&["qemu", "-nodefaults"])?;
        finish(command.args(words).current_dir(dir))?
            .expect_code(1)?
            .expect_error(&[why, ram[0], ram[1]])?;
        assert!(fs::read(dir.join("template"))? == before, "{name}");
        // Through a pipe there is no second look.
        let words = with(memory("template", "share=on"), &["-incoming", "fd:0"]);
        let mut command = pando(&["qemu", "-nodefaults"])?;
        let command = command.args(words).current_dir(dir).stdin(Stdio::piped());
        let mut running = Running::start(command)?;
        let mut input = running.child.stdin.take().context("no standard input")?;
        input.write_all(content)?;
        drop(input);
        let why = why.replace(&format!("in {name} "), "in fd:0 ");
        running
            .finish()?
            .expect_code(1)?
            .expect_error(&[&why, ram[0], ram[1]])?;
        assert!(fs::read(dir.join("template"))? == before, "{name}");
    }
    // The whole one goes there, and says what was saved.
    let words = with(memory("template", "share=on"), &["-incoming", "file:whole"]);
    let mut vm = QemuVm::start(dir, "again", &words)?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    let mut serial = vm.serial()?;
    vm.qmp.ok("cont", &json!({}))?;
    assert!(serial.holds(PAGES, 7)?);
    vm.quit()?;
    Ok(())
}

/// A machine that loads what comes on its standard input.
fn waits(dir: &Path, how: &str) -> Result<(Running, pando_tests::qemu::Qmp)> {
    let monitor = dir.join("q");
    let socket = format!("unix:{},server=on,wait=off", monitor.display());
    let words = with(
        memory("template", how),
        &["-incoming", "fd:0", "-qmp", &socket],
    );
    let mut command = pando(&["qemu", "-nodefaults"])?;
    command.args(words).current_dir(dir).stdin(Stdio::piped());
    let running = Running::start(&mut command)?;
    pando_tests::command::eventually("the monitor is there", || {
        std::os::unix::net::UnixStream::connect(&monitor).is_ok()
    })?;
    let qmp = pando_tests::qemu::Qmp::open(&monitor)?;
    Ok((running, qmp))
}

#[test]
fn a_state_that_comes_slowly_holds_up_no_monitor() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let whole = save_with_ram(dir)?;
    // Memory of its own, and the file of a template.
    for how in [CLONE, "share=on"] {
        let (mut running, mut qmp) = waits(dir, how)?;
        let mut input = running.child.stdin.take().context("no standard input")?;
        for piece in [
            &whole[..20],
            &whole[20..9000],
            &whole[9000..whole.len() - 9],
        ] {
            assert_eq!(qmp.status()?, "inmigrate");
            assert_eq!(qmp.ok("query-migrate", &json!({}))?["status"], "active");
            input.write_all(piece)?;
        }
        assert_eq!(qmp.status()?, "inmigrate");
        input.write_all(&whole[whole.len() - 9..])?;
        // The pipe stays open: what ends the state is its length.
        assert_eq!(qmp.migrated()?["status"], "completed");
        qmp.ok("quit", &json!({}))?;
        assert_eq!(running.wait()?, Some(0));
        drop(input);
    }
    // Nothing ever comes.
    let (mut running, mut qmp) = waits(dir, CLONE)?;
    let input = running.child.stdin.take();
    assert_eq!(qmp.status()?, "inmigrate");
    qmp.ok("quit", &json!({}))?;
    assert_eq!(running.wait()?, Some(0));
    drop(input);
    // It ends before it has begun.
    let (mut running, _qmp) = waits(dir, CLONE)?;
    drop(running.child.stdin.take());
    running
        .finish()?
        .expect_code(1)?
        .expect_error(&["Not a migration stream"])?;
    Ok(())
}

#[test]
fn a_descriptor_of_memory_is_no_place_for_a_state() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    make_template(dir, 8)?;
    let before = fs::read(dir.join("template"))?;
    let own = with(memory("template", "share=on"), &["-S", "-qmp", "stdio"]);
    let talk = "{'execute':'qmp_capabilities'}{'execute':'migrate','arguments':{'uri':'fd:7'}}{'execute':'quit'}";
    let ask = |words: &[String]| -> Result<String> {
        let mut command = behind(dir, "7<>template", words)?;
        let mut running = Running::start(command.stdin(Stdio::piped()))?;
        let mut input = running.child.stdin.take().context("no standard input")?;
        input.write_all(talk.as_bytes())?;
        let finished = running.finish()?.expect_code(0)?;
        Ok(finished.stdout)
    };
    let said = ask(&own)?;
    assert!(
        said.contains("fd:7 is the file of memory backend pc.ram, which nothing else may write"),
        "{said}"
    );
    // That of another machine.
    let clone = with(memory("template", CLONE), &["-incoming", "file:state"]);
    let vm = QemuVm::start(dir, "c", &clone)?;
    let other = ["-m", "64M", "-S", "-qmp", "stdio"].map(str::to_owned);
    let said = ask(&other)?;
    assert!(
        said.contains("fd:7 is the memory of a machine that is there"),
        "{said}"
    );
    vm.quit()?;
    assert!(fs::read(dir.join("template"))? == before);
    Ok(())
}
