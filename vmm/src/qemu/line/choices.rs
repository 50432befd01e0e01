#![forbid(unsafe_code)]
//! `-machine help` and the like: what can be named behind an option.

use super::argv::Argument;
use super::wanted::LOG_ITEMS;

/// What a memory backend can be told.
const OBJECT_OPTIONS: [&str; 16] = [
    "align=<int>",
    "discard-data=<bool>",
    "discard=<off|zero>",
    "dump=<bool>",
    "mem-path=<string>",
    "merge=<bool>",
    "offset=<int>",
    "prealloc-threads=<int>",
    "prealloc=<bool>",
    "readonly=<bool>",
    "reserve=<bool>",
    "rom=<OnOffAuto>",
    "seal=<bool>",
    "share=<bool>",
    "size=<int>",
    "x-use-canonical-path-for-ramblock-id=<bool>",
];

/// The list that `help` behind an option asks for; `None` when it does not.
pub fn of(argument: &Argument) -> Option<String> {
    // Behind an object's name stands what it can be told.
    let asked = argument.value.rsplit_once(',');
    if argument.name == "object"
        && let Some((kind, "help" | "?")) = asked
        && kind.starts_with("memory-backend-")
    {
        return Some(format!(
            "{kind} options:\n  {}\n",
            OBJECT_OPTIONS.join("\n  ")
        ));
    }
    if !matches!(argument.value.as_str(), "help" | "?") {
        return None;
    }
    let (title, names): (&str, &[&str]) = match argument.name {
        "machine" | "M" => (
            "Supported machines are:",
            &[
                "q35",
                "pc",
                "microvm",
                "pc-q35-VERSION",
                "pc-i440fx-VERSION",
            ],
        ),
        "cpu" => ("Available CPUs:", &["host", "max"]),
        "accel" => ("Accelerators supported:", &["kvm"]),
        "device" => (
            "Devices:",
            &[
                "pc-dimm",
                "virtio-blk-pci",
                "virtio-net-pci",
                "virtio-rng-pci",
                "virtio-serial-pci",
                "virtconsole",
                "virtserialport",
                "vhost-user-blk-pci",
                "vhost-vsock-pci",
                "vmgenid",
            ],
        ),
        "object" => (
            "List of user creatable objects:",
            &[
                "memory-backend-file",
                "memory-backend-memfd",
                "memory-backend-ram",
                "memory-backend-shm",
                "rng-builtin",
                "rng-random",
            ],
        ),
        "chardev" => (
            "Available chardev backend types:",
            &["file", "null", "pty", "socket", "stdio"],
        ),
        "d" => ("Log items (comma separated):", &LOG_ITEMS),
        _ => return None,
    };
    Some(format!("{title}\n  {}\n", names.join("\n  ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_lists_what_there_is_and_nothing_else_does() {
        let ask = |name, value: &str| {
            of(&Argument {
                name,
                value: value.to_owned(),
                typed: String::new(),
            })
        };
        assert!(ask("cpu", "help").unwrap().contains("\n  host\n"));
        assert!(ask("d", "?").unwrap().contains("\n  qmp\n"));
        assert_eq!(ask("cpu", "host"), None);
        assert_eq!(ask("kernel", "help"), None);
    }
}
