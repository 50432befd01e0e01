#![forbid(unsafe_code)]
//! What monitors answer is what their schema says.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use pando_tests::qemu::{CLONE, QemuVm, make_template, memory};
use serde_json::{Value, json};

/// The schema, by name.
struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn read(vm: &mut QemuVm) -> Result<Self> {
        let list = vm.qmp.ok("query-qmp-schema", &json!({}))?;
        let entities = list.as_array().context("no list")?.iter();
        let named = entities.map(|entity| {
            let name = entity["name"].as_str().context("no name")?;
            Ok((name.to_owned(), entity.clone()))
        });
        Ok(Self(named.collect::<Result<_>>()?))
    }

    fn entity(&self, name: &str) -> Result<&Value> {
        self.0.get(name).with_context(|| format!("no type {name}"))
    }

    /// All members that an object of this type can have.
    fn members(&self, entity: &Value, value: &Value) -> Result<Vec<Value>> {
        let mut members = entity["members"].as_array().cloned().unwrap_or_default();
        if let Some(tag) = entity["tag"].as_str() {
            let variants = entity["variants"].as_array().context("no variants")?;
            let mut variants = variants.iter();
            if let Some(variant) = variants.find(|variant| variant["case"] == value[tag]) {
                let name = variant["type"].as_str().unwrap_or_default();
                members.extend(self.members(self.entity(name)?, value)?);
            }
        }
        Ok(members)
    }

    fn check(&self, name: &str, value: &Value) -> Result<()> {
        let entity = self.entity(name)?;
        let text = |field: &str| entity[field].as_str().unwrap_or_default();
        let fits = match text("meta-type") {
            "builtin" => match text("json-type") {
                "string" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "number" => value.is_number(),
                "boolean" => value.is_boolean(),
                _ => true,
            },
            "enum" => entity["values"]
                .as_array()
                .is_some_and(|all| all.contains(value)),
            "array" => {
                let list = value
                    .as_array()
                    .with_context(|| format!("{name}: {value}"))?;
                for element in list {
                    self.check(text("element-type"), element)?;
                }
                true
            }
            _ => {
                let object = value
                    .as_object()
                    .with_context(|| format!("{name}: {value}"))?;
                let members = self.members(entity, value)?;
                for member in &members {
                    let key = member["name"].as_str().unwrap_or_default();
                    match object.get(key) {
                        Some(found) => {
                            self.check(member["type"].as_str().unwrap_or_default(), found)?
                        }
                        None => ensure!(
                            member.get("default").is_some(),
                            "{name} lacks {key}: {value}"
                        ),
                    }
                }
                let known = |key: &String| members.iter().any(|member| member["name"] == *key);
                object.keys().all(known)
            }
        };
        ensure!(fits, "{value} is no {name}");
        Ok(())
    }
}

/// Asks everything that needs no argument and changes nothing.
fn ask_all(vm: &mut QemuVm, schema: &Schema) -> Result<()> {
    let commands = schema.0.values().filter(|e| e["meta-type"] == "command");
    let mut asked = 0;
    for command in commands {
        let name = command["name"].as_str().unwrap_or_default();
        if !name.starts_with("query-") {
            continue;
        }
        let answer = vm.qmp.execute(name, &json!({}))?;
        if let Some(value) = answer.get("return") {
            let kind = command["ret-type"].as_str().unwrap_or_default();
            schema.check(kind, value).with_context(|| name.to_owned())?;
            asked += 1;
        }
    }
    ensure!(asked > 15, "{asked} answers");
    for event in &vm.qmp.events {
        let name = event["event"].as_str().unwrap_or_default();
        let kind = schema.entity(name)?["arg-type"]
            .as_str()
            .unwrap_or_default();
        let data = event.get("data").cloned().unwrap_or_else(|| json!({}));
        schema.check(kind, &data).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn answers_and_events_are_what_the_schema_says() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let words = [
        "-m",
        "64M,slots=1,maxmem=1G",
        "-object",
        "memory-backend-ram,id=d,size=128M",
        "-device",
        "pc-dimm,id=dimm0,memdev=d",
        "-name",
        "web",
        "-kernel",
        "embedded",
    ];
    let mut vm = QemuVm::start(dir.path(), "a", &words.map(str::to_owned))?;
    let schema = Schema::read(&mut vm)?;
    let list: Vec<Value> = schema.0.values().cloned().collect();
    schema.check("[SchemaInfo]", &Value::Array(list))?;
    ask_all(&mut vm, &schema)?;
    vm.qmp.capability("events")?;
    vm.qmp.ok("migrate", &json!({"uri": "file:s"}))?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    ask_all(&mut vm, &schema)?;
    let of_migration = |event: &&Value| {
        let name = event["event"].as_str().unwrap_or_default();
        name.starts_with("MIGRATION") || name == "STOP"
    };
    let shown = |event: &Value| match &event["data"] {
        Value::Null => event["event"].as_str().unwrap_or_default().to_owned(),
        data => data["status"]
            .as_str()
            .map_or(data["pass"].to_string(), str::to_owned),
    };
    let events: Vec<String> = vm
        .qmp
        .events
        .iter()
        .filter(of_migration)
        .map(shown)
        .collect();
    assert_eq!(
        events,
        ["setup", "1", "active", "STOP", "device", "2", "completed"]
    );
    for path in ["/", "/objects", "/machine", "/objects/d"] {
        let list = vm.qmp.ok("qom-list", &json!({"path": path}))?;
        schema.check("[ObjectPropertyInfo]", &list)?;
    }
    vm.quit()?;
    Ok(())
}

#[test]
fn a_clone_without_a_kernel_stands_still_after_a_reset() -> Result<()> {
    let dir = tempfile::tempdir()?;
    make_template(dir.path(), 8)?;
    let mut words = memory("template", CLONE);
    words.extend(["-incoming", "file:state"].map(str::to_owned));
    let mut vm = QemuVm::start(dir.path(), "c", &words)?;
    assert_eq!(vm.qmp.migrated()?["status"], "completed");
    vm.qmp.ok("cont", &json!({}))?;
    let mut serial = vm.serial()?;
    // The guest resets itself.
    serial.send("x\n")?;
    vm.running.wait_stderr("there is nothing to boot")?;
    while !vm.qmp.event_names().contains(&"RESET") {
        assert_eq!(vm.qmp.status()?, "running");
    }
    vm.qmp.ok("stop", &json!({}))?;
    assert_eq!(vm.qmp.status()?, "paused");
    vm.qmp.ok("system_reset", &json!({}))?;
    vm.qmp.ok("cont", &json!({}))?;
    assert_eq!(vm.qmp.status()?, "running");
    vm.quit()?;
    Ok(())
}
