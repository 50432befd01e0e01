#![forbid(unsafe_code)]
use std::path::Path;

use super::*;
use crate::arch::x86_64::boot::KernelImage;
use crate::config::{ConfigError, resolve_file};
use crate::spec::MachineSpec;

const WHOLE: &str = r#"
kernel = "embedded"
append = "quiet"
cpus = 2
serial = "null"
name = "web"
uuid = "8a1b7f0e-32a5-4f4b-9c7e-0123456789ab"

[system]
manufacturer = "Aspen"
serial = "S1"

[memory]
size = "128M"
slots = 2
max = "1G"

[[backend]]
id = "m0"
kind = "file"
path = "m0.mem"
size = "64M"
share = true
prealloc = true
merge = false

[[backend]]
id = "m1"
kind = "file"
path = "m1.mem"
size = 67108864
readonly = true
rom = "off"
offset = "1M"

[[backend]]
id = "d0"
kind = "memfd"
size = "128M"
dump = false

[[node]]
cpus = [0]
backend = "m0"

[[node]]
cpus = [1]
backend = "m1"

[[distance]]
from = 0
to = 1
distance = 31

[[dimm]]
id = "dimm0"
backend = "d0"
node = 1
"#;

fn machine(text: &str) -> MachineSpec {
    resolve_file(&MachineFile::from_toml(text).unwrap())
        .unwrap()
        .0
}

#[test]
fn a_file_makes_the_machine_that_it_prints_again() {
    let file = MachineFile::from_toml(WHOLE).unwrap();
    let (spec, boot) = resolve_file(&file).unwrap();
    assert!(matches!(boot.kernel, KernelImage::Embedded { .. }));
    let ids: Vec<&str> = spec.backends().iter().map(|b| b.id()).collect();
    assert_eq!(ids, ["m0", "m1", "d0"]);
    let identity = spec.identity();
    assert_eq!(identity.name.as_deref(), Some("web"));
    assert_eq!(
        identity.uuid.unwrap().to_string(),
        "8a1b7f0e-32a5-4f4b-9c7e-0123456789ab"
    );
    let system = identity.system.as_ref().unwrap();
    assert_eq!(
        (system.manufacturer.as_str(), system.serial.as_str()),
        ("Aspen", "S1")
    );
    let printed = MachineFile::of(&spec, Some(&boot), Some("null"));
    let text = printed.to_toml().unwrap();
    let again = MachineFile::from_toml(&text).unwrap();
    assert_eq!(again, printed);
    assert_eq!(resolve_file(&again).unwrap(), (spec, boot), "{text}");
    let json = serde_json::to_string(&printed).unwrap();
    assert_eq!(MachineFile::from_json(&json).unwrap(), printed);
}

#[test]
fn a_file_that_says_little_is_a_machine_too() {
    let spec = machine("kernel = 'embedded'");
    assert_eq!((spec.cpus().get(), spec.ram_bytes()), (1, 512 << 20));
    assert_eq!(spec.backends()[0].id(), "ram0");
    let text = MachineFile::of(&spec, None, None).to_toml().unwrap();
    assert!(
        text.contains("size = \"512M\"") && !text.contains("node"),
        "{text}"
    );
    let none = resolve_file(&MachineFile::default()).unwrap_err();
    assert!(matches!(none, ConfigError::NoKernel));
}

#[test]
fn what_it_cannot_say_is_refused_with_its_place() {
    let refused = |text: &str| MachineFile::from_toml(text).unwrap_err();
    let unknown = refused("cpus = 1\nmoon = true");
    assert!(
        unknown.contains("line 2") && unknown.contains("moon"),
        "{unknown}"
    );
    let size = refused("[memory]\nsize = \"12X\"");
    assert!(size.contains("'12X' is no size"), "{size}");
    let below = refused("[memory]\nsize = -1");
    assert!(below.contains("below zero"), "{below}");
    let uuid = refused("uuid = '8a1b'");
    assert!(uuid.contains("\"8a1b\" is no UUID"), "{uuid}");
    let missing = refused("[[backend]]\nid = 'a'");
    assert!(missing.contains("size"), "{missing}");
    let json = MachineFile::from_json("{\"cpus\": 1, \"cpu\": 2}").unwrap_err();
    assert!(json.contains("cpu") && json.contains("line 1"), "{json}");
}

#[test]
fn files_are_read_by_name_or_by_what_they_begin_with() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    for (name, text) in [
        ("a.toml", "cpus = 2"),
        ("a.json", "{\"cpus\": 2}"),
        ("a", " {\"cpus\": 2}"),
    ] {
        assert_eq!(MachineFile::read(&write(name, text)).unwrap().cpus, Some(2));
    }
    let text = |path: &Path| MachineFile::read(path).unwrap_err().to_string();
    assert!(text(dir.path()).contains("cannot read machine file"));
    assert!(text(&write("b.json", "cpus = 2")).contains("b.json is not right"));
    let long = write("long.toml", &"#".repeat(1 << 21));
    assert!(text(&long).contains("more than 1048576 bytes"));
}

#[test]
fn sizes_are_printed_with_the_greatest_unit_that_is_exact() {
    for (bytes, text) in [
        (0, "0B"),
        (4097, "4097B"),
        (65536, "64K"),
        (1 << 30, "1G"),
        (1536 << 20, "1536M"),
        (2 << 40, "2T"),
    ] {
        assert_eq!(Bytes(bytes).to_string(), text);
    }
}

/// Run with `PANDO_WRITE_SCHEMA=1` to write it anew.
#[test]
fn the_schema_in_the_documents_is_that_of_this_program() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/machine.schema.json");
    if std::env::var_os("PANDO_WRITE_SCHEMA").is_some() {
        fs::write(&path, MachineFile::schema()).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == MachineFile::schema(),
        "docs/machine.schema.json is not current: run this test with PANDO_WRITE_SCHEMA=1"
    );
}

#[test]
fn devices_are_read_and_printed_again() {
    let text = "kernel = 'k'\n\
        [[device]]\nkind = 'virtio-blk'\npath = 'a.img'\nreadonly = true\nserial = 's'\nbps = '20M'\niops = 90\niops_burst = 7\n\
        [[device]]\nkind = 'virtio-rng'\nslot = 7\n\
        [[device]]\nkind = 'virtio-blk'\nid = 'data'\npath = 'b.img'\nsnapshot = true\n";
    let file = MachineFile::from_toml(text).unwrap();
    let (spec, boot) = crate::config::resolve_file(&file).unwrap();
    let slots: Vec<_> = spec.devices().iter().map(|d| (d.id(), d.slot())).collect();
    assert_eq!(slots, [("disk0", 1), ("rng0", 7), ("data", 2)]);
    let limits = spec.devices()[0].limits();
    let rates = [limits.bytes, limits.requests]
        .map(|rate| rate.map(|rate| (rate.per_second(), rate.burst())));
    assert_eq!(rates, [Some((20 << 20, 2 << 20)), Some((90, 7))]);
    let printed = MachineFile::of(&spec, Some(&boot), None);
    let again = MachineFile::from_toml(&printed.to_toml().unwrap()).unwrap();
    assert_eq!(crate::config::resolve_file(&again).unwrap().0, spec);
    let wrong = |text: &str| MachineFile::from_toml(&format!("[[device]]\n{text}")).unwrap_err();
    assert!(wrong("kind = 'virtio-rng'\npath = 'x'").contains("unknown field `path`"));
    assert!(wrong("kind = 'virtio-blk'").contains("missing field `path`"));
    assert!(wrong("kind = 'floppy'").contains("unknown variant `floppy`"));
}
