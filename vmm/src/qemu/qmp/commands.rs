#![forbid(unsafe_code)]
//! Every QMP command that Pando has: the dispatcher, `query-commands`, the schema and
//! `docs/qemu.md` read this table.

use serde_json::{Map, Value, json};

use super::arguments::{Arg, Arguments, Kind, may, must};
use super::message::{self, Class, QmpError};
use super::{devices, migration, objects, parameters, schema};
use crate::qemu::hmp;
use crate::qemu::vm::{MAX_FDS, Vm};

/// What a command does.
pub type Run = fn(&mut Vm, &Arguments) -> Result<Value, QmpError>;

/// One command.
#[derive(Debug, Clone, Copy)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it is given.
    pub args: &'static [Arg],
    /// Whether there may be other arguments, which depend on these.
    pub open: bool,
    /// One line for the documentation.
    pub about: &'static str,
    run: Run,
}

const fn command(
    name: &'static str,
    args: &'static [Arg],
    about: &'static str,
    run: Run,
) -> Command {
    Command {
        name,
        args,
        open: false,
        about,
        run,
    }
}

const fn query(name: &'static str, about: &'static str, run: Run) -> Command {
    command(name, &[], about, run)
}

/// All commands but `qmp_capabilities`, which the monitor itself answers.
pub const COMMANDS: &[Command] = &[
    query(
        "query-version",
        "the QEMU whose behaviour this is, and the version of Pando",
        |_, _| Ok(message::version()),
    ),
    query("query-commands", "these commands", |_, _| Ok(names())),
    query(
        "query-qmp-schema",
        "these commands with their arguments",
        |_, _| Ok(schema::schema()),
    ),
    query("query-status", "what the machine is doing", |vm, _| {
        Ok(vm.query_status())
    }),
    query("query-name", "`-name`", |vm, _| Ok(vm.query_name())),
    query("query-uuid", "`-uuid`", |vm, _| {
        Ok(json!({"UUID": vm.uuid().to_string()}))
    }),
    query("query-kvm", "KVM, always", |_, _| {
        Ok(json!({"enabled": true, "present": true}))
    }),
    query("query-target", "x86_64", |_, _| {
        Ok(json!({"arch": "x86_64"}))
    }),
    query(
        "query-current-machine",
        "what the machine can do",
        |_, _| Ok(json!({"wakeup-suspend-support": false})),
    ),
    query("query-cpus-fast", "vCPUs and their threads", |vm, _| {
        Ok(vm.query_cpus())
    }),
    query(
        "query-hotpluggable-cpus",
        "vCPUs, none of which can be added later",
        |vm, _| Ok(vm.query_hotpluggable_cpus()),
    ),
    query("query-iothreads", "none", |_, _| Ok(json!([]))),
    query("query-memdev", "memory backends", |vm, _| {
        Ok(vm.query_memdev())
    }),
    query(
        "query-memory-devices",
        "memory modules, and memory that grows",
        |vm, _| Ok(vm.query_memory_devices()),
    ),
    query(
        "query-memory-size-summary",
        "RAM and modules in bytes",
        |vm, _| Ok(vm.query_memory_size()),
    ),
    query(
        "x-query-discards",
        "which memory may be discarded, who needs that, and who was refused; QEMU has no such command",
        |vm, _| Ok(vm.query_discards()),
    ),
    query("query-balloon", "how much memory the guest has", |vm, _| {
        vm.query_balloon()
    }),
    command(
        "balloon",
        &[must("value", Kind::Int)],
        "how much memory the guest is to have, in bytes: it gives the rest away",
        |vm, args| {
            let value = args.any("value").and_then(Value::as_i64);
            done(vm.set_balloon(value.unwrap_or(i64::MAX)))
        },
    ),
    query(
        "query-vm-generation-id",
        "what `-device vmgenid` shows, else an error",
        |vm, _| vm.query_generation_id(),
    ),
    query("stop", "stop the guest", |vm, _| done(vm.stop())),
    query("cont", "let the guest run", |vm, _| done(vm.cont())),
    query("quit", "end", |vm, _| {
        vm.quit();
        Ok(json!({}))
    }),
    query("system_reset", "boot anew", |vm, _| done(vm.system_reset())),
    query("system_powerdown", "press the power button", |vm, _| {
        done(vm.system_powerdown())
    }),
    Command {
        open: true,
        ..command(
            "object-add",
            &[must("qom-type", Kind::Str), must("id", Kind::Str)],
            "a memory backend, for a device that is added later",
            objects::add,
        )
    },
    command(
        "object-del",
        &[must("id", Kind::Str)],
        "take away one that was added",
        objects::delete,
    ),
    Command {
        open: true,
        ..command(
            "device_add",
            &[
                must("driver", Kind::Str),
                may("bus", Kind::Str),
                may("id", Kind::Str),
            ],
            "plug a device: `pc-dimm` or `virtio-mem-pci` with its `memdev`, `virtio-blk-pci` with its `drive`, `virtio-net-pci` with its `netdev`, `virtio-rng-pci`, `vhost-vsock-pci` with its `guest-cid`, `vhost-user-blk-pci` with its `chardev`, `virtio-balloon-pci`",
            devices::add,
        )
    },
    command(
        "device_del",
        &[must("id", Kind::Str)],
        "ask the guest to let go of one; `DEVICE_DELETED` comes when it has",
        devices::delete,
    ),
    query("query-pci", "the bus and what is on it", devices::pci),
    Command {
        open: true,
        ..command(
            "blockdev-add",
            &[must("driver", Kind::Str)],
            "an image for a device: `file`, or `raw` with its `file`",
            devices::blockdev_add,
        )
    },
    command(
        "blockdev-del",
        &[must("node-name", Kind::Str)],
        "take away one that no device has",
        devices::blockdev_del,
    ),
    Command {
        open: true,
        ..command(
            "netdev_add",
            &[must("type", Kind::Str), must("id", Kind::Str)],
            "the end of a cable for a device: `tap` with its `ifname`, `script` and `downscript` no",
            devices::netdev_add,
        )
    },
    command(
        "netdev_del",
        &[must("id", Kind::Str)],
        "take away one that no device has",
        devices::netdev_del,
    ),
    query(
        "query-block",
        "images that devices have, and drives",
        |vm, _| Ok(vm.query_block()),
    ),
    query("query-named-block-nodes", "all images", |vm, _| {
        Ok(vm.query_named_block_nodes())
    }),
    command(
        "qom-list",
        &[must("path", Kind::Str)],
        "properties of an object",
        objects::list,
    ),
    command(
        "qom-get",
        &[must("path", Kind::Str), must("property", Kind::Str)],
        "a property",
        objects::get,
    ),
    command(
        "qom-set",
        &[
            must("path", Kind::Str),
            must("property", Kind::Str),
            must("value", Kind::Any),
        ],
        "change `merge`, `dump` or `prealloc` of a backend, as far as QEMU lets one, `guest-stats-polling-interval` of a balloon, or `requested-size` of a `virtio-mem-pci`",
        objects::set,
    ),
    command(
        "getfd",
        &[must("fdname", Kind::Str)],
        "take a descriptor that came with this command",
        get_fd,
    ),
    command(
        "closefd",
        &[must("fdname", Kind::Str)],
        "let go of one",
        close_fd,
    ),
    command(
        "migrate",
        &[
            may("uri", Kind::Str),
            may("channels", Kind::List),
            may("detach", Kind::Bool),
            may("resume", Kind::Bool),
        ],
        "save the machine's state: `file:PATH`, `file:PATH,offset=N`, `fd:NAME`",
        migration::migrate,
    ),
    command(
        "migrate-incoming",
        &[
            may("uri", Kind::Str),
            may("channels", Kind::List),
            may("exit-on-error", Kind::Bool),
        ],
        "load a state (`-incoming defer`)",
        migration::incoming,
    ),
    query("migrate_cancel", "call a save off", migration::cancel),
    command(
        "migrate-continue",
        &[must("state", Kind::Str)],
        "an error: a save never waits",
        |vm, _| Err(vm.not_waiting()),
    ),
    query(
        "migrate-start-postcopy",
        "an error: there is no postcopy",
        |_, _| {
            Err(QmpError::generic(
                "Enable postcopy with migrate_set_capability before the start of migration",
            ))
        },
    ),
    command(
        "migrate-set-capabilities",
        &[must("capabilities", Kind::List)],
        "`x-ignore-shared`, `mapped-ram`, `events`, `validate-uuid`",
        migration::set_capabilities,
    ),
    query(
        "query-migrate-capabilities",
        "what is on",
        migration::capabilities,
    ),
    Command {
        open: true,
        ..command(
            "migrate-set-parameters",
            &[],
            "parameters; none changes how a file is written",
            parameters::set,
        )
    },
    query("query-migrate-parameters", "parameters", parameters::query),
    query("query-migrate", "the last save or load", |vm, _| {
        Ok(vm.query_migrate())
    }),
    command(
        "human-monitor-command",
        &[must("command-line", Kind::Str), may("cpu-index", Kind::Int)],
        "a line of the monitor for people",
        |vm, args| Ok(Value::String(hmp::execute(vm, args.text("command-line")))),
    ),
];

/// Commands of QEMU that Pando does not have, with what to say of them.
const REFUSED: &[(&str, &str)] = &[
    (
        "snapshot-save",
        "states are files of their own: use migrate file:PATH",
    ),
    (
        "savevm",
        "states are files of their own: use migrate file:PATH",
    ),
    ("x-exit-preconfig", "there is no such state"),
];

/// Does a command.
pub fn execute(vm: &mut Vm, name: &str, arguments: Map<String, Value>) -> Result<Value, QmpError> {
    tracing::debug!(target: "pando_vmm::qemu::qmp", name, "command");
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        let mut desc = format!("The command {name} has not been found");
        if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            desc = format!("{desc}: {why}");
        }
        return Err(QmpError::of(Class::CommandNotFound, desc));
    };
    let arguments = Arguments::check(arguments, command.args, command.open)?;
    (command.run)(vm, &arguments)
}

/// `qmp_capabilities`: there are none to enable.
pub fn negotiate(arguments: &Map<String, Value>) -> Result<(), QmpError> {
    let checked = Arguments::check(arguments.clone(), &[may("enable", Kind::List)], false)?;
    match checked.list("enable").first().map(Value::as_str) {
        None => Ok(()),
        Some(Some("oob")) => Err(QmpError::generic("Capability oob not available")),
        Some(other) => Err(QmpError::generic(format!(
            "Parameter 'enable' does not accept value '{}'",
            other.unwrap_or("?")
        ))),
    }
}

fn done(result: Result<(), QmpError>) -> Result<Value, QmpError> {
    result.map(|()| json!({}))
}

fn names() -> Value {
    let names = COMMANDS.iter().map(|command| command.name);
    std::iter::once("qmp_capabilities")
        .chain(names)
        .map(|name| json!({"name": name}))
        .collect()
}

fn get_fd(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let name = args.text("fdname");
    let Some(fd) = vm.passed.pop() else {
        return Err(QmpError::generic(
            "No file descriptor supplied via SCM_RIGHTS",
        ));
    };
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(QmpError::generic(
            "Parameter 'fdname' expects a name not starting with a digit",
        ));
    }
    if vm.fds.len() >= MAX_FDS && !vm.fds.contains_key(name) {
        return Err(QmpError::generic(format!(
            "there are {MAX_FDS} descriptors, the most that are kept: use closefd"
        )));
    }
    vm.fds.insert(name.to_owned(), fd);
    Ok(json!({}))
}

fn close_fd(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let name = args.text("fdname");
    match vm.fds.remove(name) {
        Some(_) => Ok(json!({})),
        None => Err(QmpError::generic(format!(
            "File descriptor named '{name}' not found"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_command_is_there_twice_or_both_taken_and_refused() {
        for (at, command) in COMMANDS.iter().enumerate() {
            let name = command.name;
            assert!(
                COMMANDS[at + 1..].iter().all(|other| other.name != name),
                "{name}"
            );
            assert!(
                REFUSED.iter().all(|(refused, _)| *refused != name),
                "{name}"
            );
        }
    }
}
