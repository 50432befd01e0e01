#![forbid(unsafe_code)]
//! A balloon by QEMU's monitor commands: what they answer with and without one, and that all fronts make the same.

use anyhow::{Result, ensure};
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, image, memory, ready, words};
use serde_json::json;

#[test]
fn a_balloon_comes_by_the_monitor_and_answers_from_then_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // A bus on which it is plugged.
    let (mut vm, mut serial) = ready(dir.path(), &["-device", "virtio-rng-pci,id=r"])?;
    let none = vm.qmp.execute("query-balloon", &json!({}))?;
    ensure!(none["error"]["class"] == "DeviceNotActive", "{none}");
    let balloon = json!({"driver": "virtio-balloon-pci", "id": "b0"});
    vm.qmp.ok("device_add", &balloon)?;
    let another = json!({"driver": "virtio-balloon-pci", "id": "b1"});
    let refused = vm.qmp.refused("device_add", &another)?;
    ensure!(
        refused.contains("Only one balloon device is supported"),
        "{refused}"
    );
    let all = json!({"actual": 64 << 20});
    ensure!(vm.qmp.ok("query-balloon", &json!({}))? == all);
    // The built-in guest gives nothing away.
    vm.qmp.ok("balloon", &json!({"value": 32 << 20}))?;
    vm.qmp.ok("balloon", &json!({"value": 1_u64 << 40}))?;
    ensure!(vm.qmp.ok("query-balloon", &json!({}))? == all);
    for value in [0, -5] {
        let refused = vm.qmp.refused("balloon", &json!({"value": value}))?;
        ensure!(
            refused.contains("Parameter 'value' expects a size"),
            "{refused}"
        );
    }
    ensure!(serial.ask("i")?.starts_with("ok"), "the guest goes on");
    vm.quit()?;
    Ok(())
}

#[test]
fn statistics_are_those_that_nobody_has_given_yet() -> Result<()> {
    let dir = tempfile::tempdir()?;
    image(dir.path(), "tpl")?;
    std::fs::File::create(dir.path().join("tpl"))?.set_len(64 << 20)?;
    let mut options = memory("tpl", CLONE);
    options.extend(words(&[
        "-device",
        "virtio-balloon-pci,id=b0,deflate-on-oom=on",
        "-S",
    ]));
    let mut vm = QemuVm::start(dir.path(), "a", &options)?;
    let of = |name: &str| json!({"path": "/machine/peripheral/b0", "property": name});
    let set = |value: i64| {
        let name = "guest-stats-polling-interval";
        json!({"path": "/machine/peripheral/b0", "property": name, "value": value})
    };
    let stats = vm.qmp.ok("qom-get", &of("guest-stats"))?;
    ensure!(stats["last-update"] == 0, "{stats}");
    ensure!(stats["stats"]["stat-free-memory"] == u64::MAX, "{stats}");
    ensure!(
        stats["stats"]
            .as_object()
            .is_some_and(|all| all.len() == 16),
        "{stats}"
    );
    ensure!(vm.qmp.ok("qom-get", &of("deflate-on-oom"))? == true);
    ensure!(
        vm.qmp
            .refused("qom-get", &of("nope"))?
            .contains("'virtio-balloon-pci.nope' not found")
    );
    vm.qmp.ok("qom-set", &set(2))?;
    ensure!(vm.qmp.ok("qom-get", &of("guest-stats-polling-interval"))? == 2);
    ensure!(
        vm.qmp
            .refused("qom-set", &set(-1))?
            .contains("must be greater than zero")
    );
    ensure!(
        vm.qmp
            .refused("qom-set", &set(i64::MAX))?
            .contains("too big")
    );
    let discards = vm.qmp.ok("x-query-discards", &json!({}))?;
    let expected = json!({"id": "pc.ram", "discard": "off", "required-by": []});
    ensure!(discards["backends"] == json!([expected]), "{discards}");
    ensure!(discards["refused"]["balloon"] == 0, "{discards}");
    let line = json!({"command-line": "info memdev"});
    let text = vm.qmp.ok("human-monitor-command", &line)?;
    ensure!(
        text.as_str()
            .is_some_and(|text| text.contains("discard: off for pc.ram")),
        "{text}"
    );
    vm.quit()?;
    Ok(())
}

#[test]
fn the_fronts_make_the_same_balloon() -> Result<()> {
    let native = [
        "run",
        "--kernel",
        "embedded",
        "--balloon=free-page-reporting,id=b0",
        "--print-machine",
    ];
    let native = finish(&mut pando(&native)?)?.expect_code(0)?;
    let qemu = [
        "qemu",
        "-kernel",
        "embedded",
        "-device",
        "virtio-balloon-pci,id=b0,free-page-reporting=on",
        "-print-machine",
    ];
    let qemu = finish(&mut pando(&qemu)?)?.expect_code(0)?;
    let device = |text: &str| {
        let at = text.find("[[device]]").unwrap_or(text.len());
        text[at..].trim().to_owned()
    };
    let expected =
        "[[device]]\nkind = \"virtio-balloon\"\nid = \"b0\"\nslot = 1\nfree-page-reporting = true";
    ensure!(device(&native.stdout) == expected, "{}", native.stdout);
    ensure!(device(&qemu.stdout) == expected, "{}", qemu.stdout);
    Ok(())
}

#[test]
fn memory_that_no_clone_has_is_not_discarded_to_zero() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for how in ["share=on,discard=zero", "readonly=on,discard=zero"] {
        let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
        let finished = finish(command.current_dir(dir.path()).args(memory("tpl", how)))?;
        finished
            .expect_code(1)?
            .expect_error(&["memory backend pc.ram: discard=zero is for the memory of a clone"])?;
    }
    Ok(())
}

#[test]
fn clones_without_a_balloon_are_not_asked_to_inflate_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plain = dir.path().join("plain");
    pando_tests::command::create_template(&plain, &[])?.expect_code(0)?;
    let mut command = pando(&["clone"])?;
    let finished = finish(command.arg(&plain).args(["--inflate", "1M"]))?;
    finished
        .expect_code(2)?
        .expect_error(&["has no balloon: create it with --balloon"])?;
    let mut command = pando(&["clone"])?;
    let finished = finish(
        command
            .arg(&plain)
            .args(["--discard", "zero", "--engine", "kernel"]),
    )?;
    finished
        .expect_code(2)?
        .expect_error(&["give --engine copy or root"])?;
    Ok(())
}
