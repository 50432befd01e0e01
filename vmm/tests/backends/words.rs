#![forbid(unsafe_code)]
//! As much of QEMU's command line as the recorded cases need.

use std::path::Path;

use pando_vmm::config::{ConfigError, check_parts};
use pando_vmm::spec::{
    BackendKind, BackendOptions, BackendSpec, CpuCount, DimmParts, Identity, MachineParts,
    MachineSpec, MemoryParts, NodeParts, OnOffAuto, SpecError,
};

/// A number of bytes with one of QEMU's suffixes.
fn bytes(text: &str) -> u64 {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).unwrap();
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        other => panic!("unit {other:?}"),
    };
    digits.parse::<u64>().unwrap() << shift
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split(',').filter_map(|pair| pair.split_once('='))
}

fn is_on(text: &str) -> bool {
    text == "on"
}

fn object(text: &str) -> Result<BackendSpec, SpecError> {
    let mut options = BackendOptions {
        kind: match text.split(',').next() {
            Some("memory-backend-file") => BackendKind::File,
            Some("memory-backend-ram") => BackendKind::Ram,
            Some("memory-backend-memfd") => BackendKind::Memfd,
            other => panic!("object {other:?}"),
        },
        ..BackendOptions::default()
    };
    for (key, value) in pairs(text) {
        match key {
            "id" => options.id = value.into(),
            "mem-path" => options.path = Some(value.into()),
            "size" => options.bytes = bytes(value),
            "share" => options.share = Some(is_on(value)),
            "readonly" => options.readonly = is_on(value),
            "rom" if is_on(value) => options.rom = OnOffAuto::On,
            "rom" => options.rom = OnOffAuto::Off,
            "offset" => options.offset_bytes = bytes(value),
            "align" => options.align_bytes = bytes(value),
            "prealloc" => options.prealloc = is_on(value),
            "merge" => options.merge = is_on(value),
            "dump" => options.dump = is_on(value),
            "discard-data" => options.discard_data = is_on(value),
            other => panic!("property {other}"),
        }
    }
    Ok(BackendSpec::from_options(options)?)
}

/// The machine of a command line; `$D` stands for `dir`.
pub(crate) fn machine(args: &[String], dir: &Path) -> Result<MachineSpec, ConfigError> {
    let mut parts = MachineParts {
        cpus: CpuCount::ONE,
        backends: vec![],
        ram_backend: None,
        memory: MemoryParts::default(),
        nodes: vec![],
        distances: vec![],
        identity: Identity::default(),
        dimms: vec![],
        pci: false,
        devices: vec![],
        generation_id: false,
    };
    for pair in args.chunks(2) {
        let value = pair[1].replace("$D", dir.to_str().unwrap());
        match pair[0].as_str() {
            "-m" => {
                parts.memory.bytes = value.split(',').next().map(bytes);
                for (key, value) in pairs(&value) {
                    match key {
                        "slots" => parts.memory.slots = value.parse().unwrap(),
                        "maxmem" => parts.memory.max_bytes = Some(bytes(value)),
                        other => panic!("-m {other}"),
                    }
                }
            }
            "-object" => parts.backends.push(object(&value)?),
            "-machine" => {
                let named = pairs(&value).find(|(key, _)| *key == "memory-backend");
                parts.ram_backend = named.map(|(_, id)| id.to_owned());
            }
            "-smp" => parts.cpus = CpuCount::new(value.parse().unwrap())?,
            "-numa" => parts.nodes.push(node(&value)),
            "-device" => parts.dimms.push(dimm(&value)),
            other => panic!("option {other}"),
        }
    }
    // QEMU has objects that nothing uses; a machine has not.
    let used: Vec<String> = (parts.nodes.iter().filter_map(|node| node.backend.clone()))
        .chain(parts.dimms.iter().map(|dimm| dimm.backend.clone()))
        .chain(parts.ram_backend.clone())
        .collect();
    parts
        .backends
        .retain(|backend| used.iter().any(|id| id == backend.id()));
    check_parts(parts)
}

fn node(text: &str) -> NodeParts {
    let mut node = NodeParts::default();
    for (key, value) in pairs(text) {
        match key {
            "nodeid" => node.id = Some(value.parse().unwrap()),
            "cpus" => node.cpus.push(value.parse().unwrap()),
            "memdev" => node.backend = Some(value.into()),
            other => panic!("-numa {other}"),
        }
    }
    node
}

fn dimm(text: &str) -> DimmParts {
    let mut dimm = DimmParts::default();
    for (key, value) in pairs(text) {
        match key {
            "id" => dimm.id = value.into(),
            "memdev" => dimm.backend = value.into(),
            "slot" => dimm.slot = Some(value.parse().unwrap()),
            "node" => dimm.node = value.parse().unwrap(),
            "addr" => dimm.guest_address = Some(bytes(value)),
            other => panic!("-device pc-dimm {other}"),
        }
    }
    dimm
}
