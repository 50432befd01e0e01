#![forbid(unsafe_code)]
//! Machine files, TOML (0) and JSON (1).

use std::path::PathBuf;

use pando_vmm::config::file::MachineFile;
use pando_vmm::config::resolve_file;
use pando_vmm::spec::MachineSpec;

use crate::{parts, scratch};

/// Takes a machine file.
pub fn run(data: &[u8]) {
    let Some((kind, text)) = parts::kind(data, 2) else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let read = match kind {
        0 => MachineFile::from_toml(text),
        _ => MachineFile::from_json(text),
    };
    let Ok(mut file) = read else { return };
    // What is wrong with read-only memory is found by opening it.
    scratch::enter();
    for backend in &mut file.backend {
        if let Some(path) = &mut backend.path {
            *path = PathBuf::from(scratch::tame(&path.to_string_lossy()));
        }
    }
    print_and_read(&file, None);
}

/// Resolves a machine, prints it and reads that again.
///
/// # Panics
/// When another machine comes of it than `expected`, or than before.
pub fn print_and_read(file: &MachineFile, expected: Option<&MachineSpec>) {
    let mut file = file.clone();
    file.kernel = Some("embedded".into());
    let Ok((spec, boot)) = resolve_file(&file) else {
        return;
    };
    if let Some(expected) = expected {
        assert_eq!(&spec, expected, "another machine comes of {file:?}");
    }
    let printed = MachineFile::of(&spec, Some(&boot), file.serial.as_deref());
    let Ok(text) = printed.to_toml() else { return };
    let read = MachineFile::from_toml(&text).expect("what was printed can be read");
    let (again, boot_again) = resolve_file(&read).expect("what was printed is a machine");
    assert_eq!(again, spec, "another machine was printed:\n{text}");
    assert_eq!(boot_again.append, boot.append);
}

/// One of each table.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![parts::of(0, WHOLE.as_bytes()), parts::of(0, b"")];
    if let Ok(file) = MachineFile::from_toml(WHOLE) {
        let json = serde_json::to_vec(&file).unwrap_or_default();
        seeds.push(parts::of(1, &json));
    }
    seeds.push(parts::of(0, CLONE.as_bytes()));
    seeds
}

const WHOLE: &str = r#"
kernel = "embedded"
initrd = "i"
append = "console=ttyS0"
cpus = 2
serial = "unix:s"
[memory]
size = "128M"
slots = 2
max = "1G"
[[backend]]
id = "a"
size = "64M"
[[backend]]
id = "b"
kind = "memfd"
size = 67108864
[[backend]]
id = "c"
kind = "file"
path = "f"
size = "128M"
share = true
prealloc = true
merge = false
discard-data = true
[[node]]
id = 0
cpus = [0]
backend = "a"
[[node]]
id = 1
cpus = [1]
backend = "b"
[[distance]]
from = 0
to = 1
distance = 30
[[distance]]
from = 1
to = 0
distance = 30
[[dimm]]
id = "d"
backend = "c"
node = 0
slot = 1
[[device]]
kind = "virtio-rng"
slot = 9
[[device]]
kind = "virtio-vsock"
id = "v"
cid = 3
uds_path = "u"
[[device]]
kind = "virtio-console"
[[device.ports]]
console = true
file = "l"
[[device.ports]]
number = 3
name = "n"
uds_path = "s"
"#;

const CLONE: &str = r#"
[memory]
backend = "a"
[[backend]]
id = "a"
kind = "file"
path = "f"
size = "64M"
readonly = true
rom = "off"
align = "2M"
offset = "4K"
"#;

/// Words of the schema.
pub fn words() -> Vec<String> {
    let schema: serde_json::Value =
        serde_json::from_str(&MachineFile::schema()).unwrap_or_default();
    let mut words = Vec::new();
    collect(&schema, &mut words);
    words.sort();
    words.dedup();
    words
}

fn collect(value: &serde_json::Value, words: &mut Vec<String>) {
    if let Some(properties) = value["properties"].as_object() {
        words.extend(properties.keys().cloned());
    }
    let children = value
        .as_object()
        .into_iter()
        .flat_map(|object| object.values());
    for child in children.chain(value.as_array().into_iter().flatten()) {
        collect(child, words);
    }
}
