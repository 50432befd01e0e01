#![forbid(unsafe_code)]
//! Two nodes and a memory module, each with a file of its own: a template and its clones, and every
//! way in which the files or options do not belong together.

use std::fs;
use std::path::Path;

use anyhow::Result;
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, write};
use serde_json::json;

const PAGES: u64 = 100;

/// Options of the machine; backend `n` is on `files[n]`, by `how`.
fn machine(files: [&str; 3], how: [&str; 3]) -> Vec<String> {
    let object = |number: usize, bytes: &str| {
        let (file, how) = (files[number], how[number]);
        format!("memory-backend-file,id=m{number},mem-path={file},size={bytes},{how}")
    };
    let words = [
        "-m",
        "64M,slots=2,maxmem=1G",
        "-smp",
        "2",
        "-object",
        &object(0, "32M"),
        "-object",
        &object(1, "32M"),
        "-object",
        &object(2, "128M"),
        "-numa",
        "node,nodeid=0,cpus=0,memdev=m0",
        "-numa",
        "node,nodeid=1,cpus=1,memdev=m1",
        "-device",
        "pc-dimm,id=dimm0,memdev=m2,node=1",
        "-machine",
        "q35",
    ];
    words.map(str::to_owned).to_vec()
}

fn with(mut words: Vec<String>, more: &[&str]) -> Vec<String> {
    words.extend(more.iter().map(|&word| word.to_owned()));
    words
}

fn make_template(dir: &Path) -> Result<()> {
    let words = with(
        machine(["f0", "f1", "f2"], ["share=on"; 3]),
        &["-kernel", "embedded"],
    );
    let mut vm = QemuVm::start(dir, "t", &words)?;
    let mut serial = vm.serial()?;
    serial.ready()?;
    assert!(serial.ask(&write(PAGES, 5))?.starts_with("ok w"));
    let devices = vm.qmp.ok("query-memory-devices", &json!({}))?;
    assert_eq!(devices[0]["data"]["memdev"], "/objects/m2");
    let sizes = vm.qmp.ok("query-memory-size-summary", &json!({}))?;
    assert_eq!(
        sizes,
        json!({"base-memory": 64 << 20, "plugged-memory": 128 << 20})
    );
    vm.qmp.ok("stop", &json!({}))?;
    vm.qmp.capability("x-ignore-shared")?;
    vm.qmp.ok("migrate", &json!({"uri": "file:state"}))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    // Nobody writes the files now, so clones may read them while this one is still there.
    let mut clone = QemuVm::start(dir, "early", &clone_of(["f0", "f1", "f2"]))?;
    assert_eq!(clone.qmp.migrated()?["status"], "completed");
    assert!(
        vm.qmp
            .refused("cont", &json!({}))?
            .contains("clones run on f0")
    );
    clone.quit()?;
    vm.quit()?;
    Ok(())
}

fn clone_of(files: [&str; 3]) -> Vec<String> {
    with(machine(files, [CLONE; 3]), &["-incoming", "file:state"])
}

fn refused(dir: &Path, words: &[String], text: &str) -> Result<()> {
    let mut command = pando(&["qemu", "-nodefaults"])?;
    finish(command.current_dir(dir).args(words))?
        .expect_code(1)?
        .expect_error(&[text])?;
    Ok(())
}

#[test]
fn each_backend_of_a_template_is_its_own_file_and_a_wrong_mixture_is_refused_by_id() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    make_template(dir)?;
    let before = ["f0", "f1", "f2"].map(|name| fs::read(dir.join(name)).ok());
    let mut clone = QemuVm::start(dir, "c", &clone_of(["f0", "f1", "f2"]))?;
    assert_eq!(clone.qmp.migrated()?["status"], "completed");
    clone.qmp.ok("cont", &json!({}))?;
    let mut serial = clone.serial()?;
    assert!(serial.holds(PAGES, 5)?);
    assert!(serial.ask(&write(PAGES, 6))?.starts_with("ok w"));
    clone.quit()?;
    assert_eq!(
        before,
        ["f0", "f1", "f2"].map(|name| fs::read(dir.join(name)).ok())
    );

    refused(
        dir,
        &clone_of(["f1", "f0", "f2"]),
        "memory backend \"m0\": f1 does not hold",
    )?;
    let words = clone_of(["f0", "f1", "f2"]);
    let swapped = |a: &str, b: &str| -> Vec<String> {
        words
            .iter()
            .map(|word| word.replace(a, "?").replace(b, a).replace('?', b))
            .collect()
    };
    refused(
        dir,
        &swapped("memdev=m0", "memdev=m1"),
        "memory backend \"m0\" is at 0x0 in the state",
    )?;
    let no_module: Vec<String> = {
        let at = words
            .iter()
            .position(|word| word.contains("id=m2"))
            .unwrap_or(0);
        let device = words
            .iter()
            .position(|word| word.contains("pc-dimm"))
            .unwrap_or(0);
        let gone = [at - 1, at, device - 1, device];
        let all = words.iter().enumerate();
        all.filter(|(at, _)| !gone.contains(at))
            .map(|(_, word)| word.clone())
            .collect()
    };
    refused(
        dir,
        &no_module,
        "Unknown ramblock \"m2\", cannot accept migration",
    )?;
    let anonymous: Vec<String> = words
        .iter()
        .map(|word| {
            if word.contains("id=m1") {
                "memory-backend-ram,id=m1,size=32M".to_owned()
            } else {
                word.clone()
            }
        })
        .collect();
    refused(
        dir,
        &anonymous,
        "memory backend \"m1\" is left out of the state",
    )?;
    Ok(())
}

#[test]
fn another_topology_than_the_states_is_refused_with_both_values() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    make_template(dir)?;
    let words = clone_of(["f0", "f1", "f2"]);
    for (here, other, why) in [
        (
            "slots=2",
            "slots=3",
            "slots for memory modules is 2 in the state and 3 here",
        ),
        (
            "maxmem=1G",
            "maxmem=2G",
            "(maxmem) is 1073741824 in the state and 2147483648",
        ),
        (
            "id=dimm0",
            "id=dimm1",
            "is called \"dimm0\" in the state and \"dimm1\" here",
        ),
        (
            "memdev=m2,node=1",
            "memdev=m2,node=0",
            "is in NUMA node 1 in the state and 0 here",
        ),
        (
            "memdev=m2",
            "memdev=m2,addr=0x140000000",
            "is at 0x100000000 in the state and 0x140000000",
        ),
        (
            "nodeid=0,cpus=0,",
            "nodeid=0,cpus=0-1,",
            "vCPU 1 is in NUMA node 1 in the state and 0 here",
        ),
    ] {
        let changed: Vec<String> = words
            .iter()
            .map(|word| {
                word.replace(here, other).replace("nodeid=1,cpus=1", {
                    if other.contains("0-1") {
                        "nodeid=1"
                    } else {
                        "nodeid=1,cpus=1"
                    }
                })
            })
            .collect();
        refused(dir, &changed, why)?;
    }
    let far = with(words.clone(), &["-numa", "dist,src=0,dst=1,val=31"]);
    refused(dir, &far, "to 1 is 20 in the state and 31 here")?;
    Ok(())
}

#[test]
fn a_machine_is_printed_as_the_file_that_makes_it_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut command = pando(&["qemu", "-print-machine", "-kernel", "embedded"])?;
    command.args(machine(["f0", "f1", "f2"], ["share=on"; 3]));
    let uuid = "8a1b7f0e-32a5-4f4b-9c7e-0123456789ab";
    command.args(["-name", "web", "-uuid", uuid]);
    command.args(["-smbios", "type=1,serial=S1"]);
    let printed = finish(&mut command)?.expect_code(0)?.stdout;
    let id = format!("name = \"web\"\nuuid = \"{uuid}\"\n\n[system]\nserial = \"S1\"\n");
    assert!(printed.contains(&id), "{printed}");
    let file = dir.path().join("machine.toml");
    fs::write(&file, &printed)?;
    let mut again = pando(&["run", "--print-machine", "--machine"])?;
    let again = finish(again.arg(&file))?.expect_code(0)?;
    assert_eq!(again.stdout, printed);
    Ok(())
}

#[test]
fn a_clone_of_a_template_that_may_still_be_written_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let words = with(machine(["f0", "f1", "f2"], ["share=on"; 3]), &["-S"]);
    let vm = QemuVm::start(dir.path(), "t", &words)?;
    let clone = with(machine(["f0", "f1", "f2"], [CLONE; 3]), &["-S"]);
    refused(dir.path(), &clone, "memory backend m0: f0 is in use")?;
    vm.quit()?;
    Ok(())
}
