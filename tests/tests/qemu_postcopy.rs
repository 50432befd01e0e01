#![forbid(unsafe_code)]
//! Migration that would discard memory while it is sent or received: refused by name, and with the memory that
//! cannot be discarded.

use std::fs;

use anyhow::{Result, ensure};
use pando_tests::command::{finish, pando};
use pando_tests::qemu::{CLONE, QemuVm, memory, words};
use serde_json::json;

#[test]
fn what_would_discard_memory_while_it_is_sent_is_refused_by_name() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::File::create(dir.path().join("ram"))?.set_len(64 << 20)?;
    let mut options = memory("ram", CLONE);
    options.push("-S".to_owned());
    let mut vm = QemuVm::start(dir.path(), "a", &options)?;
    let mut set = |name: &str| {
        let capability = json!({"capability": name, "state": true});
        vm.qmp.refused(
            "migrate-set-capabilities",
            &json!({"capabilities": [capability]}),
        )
    };
    let fault = "Discarding RAM with readonly files is not supported: memory backend pc.ram is a template's";
    let said = set("release-ram")?;
    ensure!(
        said.starts_with("release-ram is not supported: it discards RAM while it is sent"),
        "{said}"
    );
    ensure!(said.contains(fault), "{said}");
    let said = set("postcopy-ram")?;
    ensure!(said.starts_with("Postcopy is not supported"), "{said}");
    ensure!(said.contains(fault), "{said}");
    let said = set("x-release-ram")?;
    ensure!(
        said == "Parameter 'capability' does not accept value 'x-release-ram'",
        "{said}"
    );
    let said = vm.qmp.refused("migrate-start-postcopy", &json!({}))?;
    ensure!(
        said == "Enable postcopy with migrate_set_capability before the start of migration",
        "{said}"
    );
    // None of them is on.
    let all = vm.qmp.ok("query-migrate-capabilities", &json!({}))?;
    let on = all
        .as_array()
        .into_iter()
        .flatten()
        .filter(|one| one["state"] == true);
    ensure!(on.count() == 0, "{all}");
    vm.quit()?;
    let mut incoming = memory("ram", CLONE);
    incoming.extend(words(&["-incoming", "defer"]));
    let mut vm = QemuVm::start(dir.path(), "b", &incoming)?;
    let capability = json!({"capability": "postcopy-ram", "state": true});
    let said = vm.qmp.refused(
        "migrate-set-capabilities",
        &json!({"capabilities": [capability]}),
    )?;
    let why = "Postcopy is not supported: Host backend files need to be TMPFS or HUGETLBFS only";
    ensure!(said.starts_with(why) && said.contains(fault), "{said}");
    vm.quit()?;
    for (property, text) in [
        ("x-postcopy-ram", why),
        (
            "x-release-ram",
            "release-ram discards RAM while it is sent, which a template's clones cannot do",
        ),
    ] {
        let mut options = memory("ram", CLONE);
        options.extend(words(&["-global", &format!("migration.{property}=on")]));
        let mut command = pando(&["qemu", "-nodefaults", "-nographic"])?;
        let finished = finish(command.current_dir(dir.path()).args(&options))?.expect_code(1)?;
        ensure!(finished.stderr.contains(text), "{}", finished.stderr);
    }
    Ok(())
}
