#![forbid(unsafe_code)]
//! The monitor for people: a few words of it.

pub mod words;

use std::fmt::Write;

use serde_json::Value;

use super::migration::address;
use super::qmp::message::{self, QmpError};
use super::vm::{Vm, pci_text, query_pci};
use super::words::{Form, Props};

/// What there is, with a line of help.
pub const COMMANDS: &[(&str, &str)] = &[
    ("help", "this"),
    ("info status", "what the machine is doing"),
    ("info name", "its name"),
    ("info uuid", "its UUID"),
    ("info version", "whose behaviour this is"),
    ("info kvm", "KVM"),
    ("info cpus", "vCPUs and their threads"),
    ("info memdev", "memory backends"),
    ("info memory-devices", "memory modules"),
    ("info memory_size_summary", "RAM and modules"),
    ("info numa", "nodes"),
    ("info migrate", "the last save or load"),
    ("info balloon", "how much memory the guest has"),
    ("balloon", "MEBIBYTES: how much it is to have"),
    ("qom-get", "PATH PROPERTY: a property of an object"),
    ("qom-set", "PATH PROPERTY VALUE: change it"),
    ("info pci", "the bus and what is on it"),
    ("info block", "images"),
    ("device_add", "DRIVER[,PROPERTY=VALUE...]: plug a device"),
    ("device_del", "ID: ask the guest to let go of one"),
    (
        "netdev_add",
        "tap,id=ID,ifname=NAME,script=no,downscript=no: the end of a cable",
    ),
    ("netdev_del", "ID: take away one that no device has"),
    ("stop", "stop the guest"),
    ("cont", "let it run"),
    ("system_reset", "boot anew"),
    ("system_powerdown", "press the power button"),
    ("migrate", "[-d] URI: save the state"),
    ("migrate_incoming", "URI: load a state"),
    ("migrate_cancel", "call a save off"),
    ("migrate_set_capability", "NAME on|off"),
    ("quit", "end"),
];

/// Does what a line says; its answer.
pub fn execute(vm: &mut Vm, line: &str) -> String {
    let words = match words::words(line) {
        Ok(words) => words,
        Err(why) => return format!("{}\r\n", why.replace('\n', "\r\n")),
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        [] => Ok(String::new()),
        ["help" | "?"] => Ok(help("")),
        ["help" | "?", about @ ..] => return about_words(about),
        ["info"] => Ok(help("info")),
        ["info", rest @ ..] => match info(vm, rest) {
            Some(answer) => answer,
            None => return unknown(&words.join(" ")),
        },
        ["stop" | "s"] => vm.stop().map(|()| String::new()),
        ["cont" | "c"] => vm.cont().map(|()| String::new()),
        ["system_reset"] => vm.system_reset().map(|()| String::new()),
        ["system_powerdown"] => vm.system_powerdown().map(|()| String::new()),
        ["quit" | "q"] => {
            vm.quit();
            Ok(String::new())
        }
        ["migrate", uri] | ["migrate", "-d", uri] => migrate(vm, uri),
        ["migrate_incoming", uri] => address::parse(uri)
            .map_err(|error| QmpError::generic(error.to_string()))
            .and_then(|address| vm.migrate_incoming(&address, true))
            .map(|()| String::new()),
        ["migrate_cancel"] => {
            vm.cancel_migration();
            Ok(String::new())
        }
        ["device_add", ..] => device_add(vm, line),
        ["netdev_add", ..] => netdev_add(vm, line),
        ["netdev_del", id] => vm.netdev_del(id).map(|()| String::new()),
        ["qom-get", path, name] => property(vm, path, name),
        ["qom-set", path, name, value] => set_property(vm, path, name, value),
        ["balloon", size] => balloon(vm, size).map(|()| String::new()),
        ["device_del", id] => vm.device_del(id).map(|()| String::new()),
        ["migrate_set_capability", name, state @ ("on" | "off")] => {
            set_capability(vm, name, *state == "on")
        }
        [word, ..] if help(word).is_empty() => return unknown(word),
        [word, ..] => {
            return format!(
                "{word}: other arguments are expected\r\nTry \"help {word}\" for more information\r\n"
            );
        }
    };
    match result {
        Ok(text) => text.replace('\n', "\r\n"),
        Err(error) => format!("Error: {}\r\n", error.desc),
    }
}

fn unknown(words: &str) -> String {
    format!("unknown command: '{words}'\r\n")
}

/// What is said of a command.
fn about_words(words: &[&str]) -> String {
    let words = words.join(" ");
    let text = help(&words);
    if text.is_empty() {
        unknown(&words)
    } else {
        text.replace('\n', "\r\n")
    }
}

/// Lines of help: of what begins with these words, all of it where there are none.
fn help(words: &str) -> String {
    let is_about = |name: &str| {
        let rest = name.strip_prefix(words);
        words.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    };
    COMMANDS.iter().filter(|(name, _)| is_about(name)).fold(
        String::new(),
        |mut text, (name, about)| {
            let _ = writeln!(text, "{name} -- {about}");
            text
        },
    )
}

fn property(vm: &mut Vm, path: &str, name: &str) -> Result<String, QmpError> {
    let arguments = serde_json::json!({"path": path, "property": name});
    let value = command(vm, "qom-get", arguments)?;
    // Of JSON there is always a text.
    Ok(serde_json::to_string_pretty(&value).unwrap_or_default() + "\n")
}

/// The value is JSON, or else a word.
fn set_property(vm: &mut Vm, path: &str, name: &str, value: &str) -> Result<String, QmpError> {
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    let arguments = serde_json::json!({"path": path, "property": name, "value": value});
    command(vm, "qom-set", arguments).map(|_| String::new())
}

/// Does a command of the other monitor.
fn command(vm: &mut Vm, name: &str, arguments: Value) -> Result<Value, QmpError> {
    let Value::Object(arguments) = arguments else {
        return Err(QmpError::generic("arguments are an object"));
    };
    super::qmp::commands::execute(vm, name, arguments)
}

/// How much memory the guest is to have, in mebibytes.
fn balloon(vm: &mut Vm, size: &str) -> Result<(), QmpError> {
    let mebibytes = size.strip_suffix(['M', 'm']).unwrap_or(size).parse::<i64>();
    let bytes = mebibytes.ok().and_then(|size| size.checked_mul(1 << 20));
    vm.set_balloon(bytes.unwrap_or(-1))
}

fn device_add(vm: &mut Vm, line: &str) -> Result<String, QmpError> {
    vm.device_add(props("device_add", line, "driver")?)?;
    Ok(String::new())
}

fn netdev_add(vm: &mut Vm, line: &str) -> Result<String, QmpError> {
    vm.netdev_add(props("netdev_add", line, "type")?)?;
    Ok(String::new())
}

/// What is behind the command, with what the first word is of.
fn props(command: &str, line: &str, first: &str) -> Result<Props, QmpError> {
    let text = line.trim_start().strip_prefix(command);
    let text = text.unwrap_or_default().trim();
    let props = Props::parse(text, Some(first), Form::Switches);
    props.map_err(|error| QmpError::generic(error.message()))
}

fn migrate(vm: &mut Vm, uri: &str) -> Result<String, QmpError> {
    let address = address::parse(uri).map_err(|error| QmpError::generic(error.to_string()))?;
    vm.migrate(&address)?;
    Ok(String::new())
}

fn set_capability(vm: &mut Vm, name: &str, on: bool) -> Result<String, QmpError> {
    let mut arguments = serde_json::Map::new();
    let list = serde_json::json!([{"capability": name, "state": on}]);
    arguments.insert("capabilities".to_owned(), list);
    super::qmp::commands::execute(vm, "migrate-set-capabilities", arguments)?;
    Ok(String::new())
}

/// `info`; `None` where there is no such thing.
fn info(vm: &Vm, what: &[&str]) -> Option<Result<String, QmpError>> {
    Some(Ok(match what {
        ["status"] => status(vm),
        ["name"] => text(&vm.query_name()["name"]),
        ["uuid"] => format!("{}\n", vm.uuid()),
        ["version"] => {
            let (major, minor, micro) = message::QEMU_VERSION;
            format!("{major}.{minor}.{micro} ({})\n", message::PACKAGE)
        }
        ["kvm"] => "kvm support: enabled\n".to_owned(),
        ["cpus"] => each(&vm.query_cpus(), |cpu| {
            format!(
                "* CPU #{}: thread_id={}\n",
                cpu["cpu-index"], cpu["thread-id"]
            )
        }),
        ["memdev"] => each(&vm.query_memdev(), memdev) + "\n" + &vm.discards_text(),
        ["memory-devices"] => each(&vm.query_memory_devices(), dimm),
        ["memory_size_summary"] => {
            let sizes = vm.query_memory_size();
            format!(
                "base memory: {}\nplugged memory: {}\n",
                sizes["base-memory"], sizes["plugged-memory"]
            )
        }
        ["numa"] => vm.numa_text(),
        ["migrate"] => migration(vm),
        ["pci"] => return Some(vm.functions().map(|found| pci_text(&query_pci(&found)))),
        ["block"] => vm.block_text(),
        ["balloon"] => {
            return Some(vm.query_balloon().map(|answer| {
                let bytes = answer["actual"].as_u64().unwrap_or(0);
                format!("balloon: actual={}\n", bytes >> 20)
            }));
        }
        _ => return None,
    }))
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(String::new, |text| format!("{text}\n"))
}

fn each(list: &Value, show: impl Fn(&Value) -> String) -> String {
    list.as_array().into_iter().flatten().map(show).collect()
}

fn status(vm: &Vm) -> String {
    match vm.status().name() {
        "running" => "VM status: running\n".to_owned(),
        "paused" => "VM status: paused\n".to_owned(),
        other => format!("VM status: paused ({other})\n"),
    }
}

fn memdev(backend: &Value) -> String {
    let word = |name: &str| backend[name].as_str().unwrap_or("").to_owned();
    format!(
        "memory backend: {}\n  size:  {}\n  merge: {}\n  dump: {}\n  prealloc: {}\n  share: {}\n  reserve: {}\n  \
         policy: {}\n  host nodes: \n",
        word("id"),
        backend["size"],
        backend["merge"],
        backend["dump"],
        backend["prealloc"],
        backend["share"],
        backend["reserve"],
        word("policy"),
    )
}

fn dimm(device: &Value) -> String {
    let data = &device["data"];
    if device["type"] == "virtio-mem" {
        return format!(
            "Memory device [virtio-mem]: \"{}\"\n  memaddr: {:#x}\n  node: {}\n  requested-size: {}\n  size: {}\n  \
             max-size: {}\n  block-size: {}\n  memdev: {}\n",
            data["id"].as_str().unwrap_or(""),
            data["memaddr"].as_u64().unwrap_or(0),
            data["node"],
            data["requested-size"],
            data["size"],
            data["max-size"],
            data["block-size"],
            data["memdev"].as_str().unwrap_or(""),
        );
    }
    format!(
        "Memory device [dimm]: \"{}\"\n  addr: {:#x}\n  slot: {}\n  node: {}\n  size: {}\n  memdev: {}\n  hotplugged: {}\n  \
         hotpluggable: {}\n",
        data["id"].as_str().unwrap_or(""),
        data["addr"].as_u64().unwrap_or(0),
        data["slot"],
        data["node"],
        data["size"],
        data["memdev"].as_str().unwrap_or(""),
        data["hotplugged"],
        data["hotpluggable"],
    )
}

fn migration(vm: &Vm) -> String {
    let answer = vm.query_migrate();
    let Some(status) = answer["status"].as_str() else {
        return String::new();
    };
    let mut text = format!("Migration status: {status}\n");
    if let Some(why) = answer["error-desc"].as_str() {
        let _ = writeln!(text, "error: {why}");
    }
    if !answer["ram"].is_null() {
        let _ = write!(
            text,
            "total time: {} ms\ndowntime: {} ms\ntransferred ram: {} kbytes\ntotal ram: {} kbytes\n",
            answer["total-time"],
            answer["downtime"],
            answer["ram"]["transferred"].as_u64().unwrap_or(0) / 1024,
            answer["ram"]["total"].as_u64().unwrap_or(0) / 1024,
        );
    }
    text
}
