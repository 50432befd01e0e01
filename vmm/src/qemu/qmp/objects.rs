#![forbid(unsafe_code)]
//! The object tree, as far as templating needs it: `/objects/ID` for each memory backend, and
//! `/machine`.

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::message::{Class, QmpError};
use crate::qemu::line::memory;
use crate::qemu::vm::Vm;
use crate::qemu::words::Props;
use crate::spec::{BackendKind, BackendSpec, DeviceSpec, Dimm};

/// Where a path leads.
enum Place<'a> {
    Root,
    Objects,
    Machine,
    Peripherals,
    Dimm(&'a Dimm),
    Balloon,
    Growing(&'a DeviceSpec),
    Backend(&'a BackendSpec),
}

fn find<'a>(vm: &'a Vm, path: &str) -> Result<Place<'a>, QmpError> {
    let not_found = || QmpError::of(Class::DeviceNotFound, format!("Device '{path}' not found"));
    match path.trim_end_matches('/') {
        "" => Ok(Place::Root),
        "/objects" => Ok(Place::Objects),
        "/machine" => Ok(Place::Machine),
        "/machine/peripheral" => Ok(Place::Peripherals),
        other if other.starts_with("/machine/peripheral/") => {
            let id = other.trim_start_matches("/machine/peripheral/");
            let id = id.trim_end_matches("/virtio-backend");
            if vm.is_balloon(id) {
                return Ok(Place::Balloon);
            }
            let dimm = vm.find_dimm(id).map(Place::Dimm);
            let growing = || vm.find_memory_device(id).map(Place::Growing);
            dimm.or_else(growing).ok_or_else(not_found)
        }
        other => {
            let id = other.strip_prefix("/objects/").unwrap_or(other);
            let backend = vm.objects().find(|backend| backend.id() == id);
            backend.map(Place::Backend).ok_or_else(not_found)
        }
    }
}

/// `qom-list`
pub fn list(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let mut properties = vec![json!({"name": "type", "type": "string"})];
    match find(vm, args.text("path"))? {
        Place::Root => properties.extend([
            json!({"name": "objects", "type": "child<container>"}),
            json!({"name": "machine", "type": format!("child<{}-machine>", vm.kind())}),
        ]),
        Place::Peripherals => {}
        Place::Balloon => {
            let all = vm.balloon_properties().into_iter();
            properties.extend(all.map(|(name, kind, _)| json!({"name": name, "type": kind})));
        }
        Place::Dimm(dimm) => {
            let names = dimm_properties(vm, dimm);
            let all = names.into_iter().map(|(name, kind, _)| json!({"name": name, "type": kind}));
            properties.extend(all);
        }
        Place::Growing(device) => {
            let names = growing_properties(vm, device);
            let all = names.into_iter().map(|(name, kind, _)| json!({"name": name, "type": kind}));
            properties.extend(all);
        }
        Place::Objects => properties.extend(vm.listed_objects().into_iter().map(|backend| {
            json!({"name": backend.id(), "type": format!("child<{}>", backend.kind().qemu_name())})
        })),
        Place::Machine => {
            properties.push(json!({"name": "memory-backend", "type": "string"}));
        }
        Place::Backend(backend) => properties.extend(
            properties_of(backend)
                .into_iter()
                .map(|(name, kind, _)| json!({"name": name, "type": kind})),
        ),
    }
    Ok(Value::Array(properties))
}

/// `qom-get`
pub fn get(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let name = args.text("property");
    let not_found = |kind: &str| QmpError::generic(format!("Property '{kind}.{name}' not found"));
    match find(vm, args.text("path"))? {
        Place::Root | Place::Objects | Place::Peripherals if name == "type" => {
            Ok(json!("container"))
        }
        Place::Root | Place::Objects | Place::Peripherals => Err(not_found("container")),
        Place::Balloon if name == "type" => Ok(json!("virtio-balloon-pci")),
        Place::Balloon => vm
            .balloon_properties()
            .into_iter()
            .find(|(known, ..)| *known == name)
            .map(|(_, _, value)| value)
            .ok_or_else(|| not_found("virtio-balloon-pci")),
        Place::Dimm(_) if name == "type" => Ok(json!("pc-dimm")),
        Place::Dimm(dimm) => dimm_properties(vm, dimm)
            .into_iter()
            .find(|(known, ..)| *known == name)
            .map(|(_, _, value)| value)
            .ok_or_else(|| not_found("pc-dimm")),
        Place::Growing(_) if name == "type" => Ok(json!("virtio-mem-pci")),
        Place::Growing(device) => growing_properties(vm, device)
            .into_iter()
            .find(|(known, ..)| *known == name)
            .map(|(_, _, value)| value)
            .ok_or_else(|| not_found("virtio-mem-pci")),
        Place::Machine => match name {
            "type" => Ok(json!(format!("{}-machine", vm.kind()))),
            "memory-backend" => Ok(json!(vm.ram_object())),
            _ => Err(not_found(&format!("{}-machine", vm.kind()))),
        },
        Place::Backend(backend) => {
            let changed = vm.changed.get(&(backend.id().to_owned(), name.to_owned()));
            if let Some(value) = changed {
                return Ok(json!(value));
            }
            if name == "type" {
                return Ok(json!(backend.kind().qemu_name()));
            }
            properties_of(backend)
                .into_iter()
                .find(|(known, ..)| *known == name)
                .map(|(_, _, value)| value)
                .ok_or_else(|| not_found(backend.kind().qemu_name()))
        }
    }
}

/// `qom-set`
pub fn set(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let name = args.text("property");
    let value = args.any("value").cloned().unwrap_or_default();
    if let Some(id) = args.text("path").strip_prefix("/machine/peripheral/")
        && vm.is_generation_device(id)
    {
        return Err(QmpError::generic(format!(
            "Attempt to set property '{name}' on device '{id}' (type 'vmgenid') after it was realized"
        )));
    }
    if let Place::Growing(device) = find(vm, args.text("path"))? {
        let id = device.id().to_owned();
        vm.set_memory_device(&id, name, &value)?;
        return Ok(json!({}));
    }
    let (id, kind) = match find(vm, args.text("path"))? {
        Place::Balloon => return set_of_balloon(vm, name, &value),
        Place::Backend(backend) => (backend.id().to_owned(), backend.kind()),
        Place::Machine if name != "memory-backend" => {
            return Err(QmpError::generic(format!(
                "Property '{}-machine.{name}' not found",
                vm.kind()
            )));
        }
        _ => {
            return Err(QmpError::generic(format!(
                "Property '{name}' cannot be set: only those of memory backends can"
            )));
        }
    };
    let is_known = matches!(
        name,
        "merge" | "dump" | "prealloc" | "share" | "reserve" | "readonly" | "discard-data"
    );
    let on = match value {
        Value::Bool(on) => on,
        _ if is_known => {
            return Err(QmpError::generic(format!(
                "Invalid parameter type for '{name}', expected: boolean"
            )));
        }
        _ => false,
    };
    match name {
        "merge" | "dump" => {
            vm.changed.insert((id, name.to_owned()), on);
            Ok(json!({}))
        }
        // What the file holds is kept in any case: there is nothing to change but the answer.
        "discard-data" if kind == BackendKind::File => {
            vm.changed.insert((id, name.to_owned()), on);
            Ok(json!({}))
        }
        "prealloc" if !on => Ok(json!({})),
        "prealloc" => {
            vm.preallocate(&id)?;
            vm.changed.insert((id, name.to_owned()), on);
            Ok(json!({}))
        }
        "share" | "reserve" => Err(QmpError::generic("cannot change property value")),
        "size" => Err(QmpError::generic(format!(
            "cannot change property size of {} ",
            kind.qemu_name()
        ))),
        "readonly" | "rom" | "mem-path" | "align" | "offset" if kind == BackendKind::File => {
            // QEMU ends some of these with a full stop.
            let stop = if matches!(name, "readonly" | "rom") {
                "."
            } else {
                ""
            };
            Err(QmpError::generic(format!(
                "cannot change property '{name}' of {}{stop}",
                kind.qemu_name()
            )))
        }
        "type" => Err(QmpError::generic(format!(
            "Property '{}.type' is not writable",
            kind.qemu_name()
        ))),
        _ => Err(QmpError::generic(format!(
            "Property '{}.{name}' not found, or one that cannot be set",
            kind.qemu_name()
        ))),
    }
}

fn set_of_balloon(vm: &mut Vm, name: &str, value: &Value) -> Result<Value, QmpError> {
    if name == "guest-stats-polling-interval" {
        vm.set_stats_interval(value)?;
        return Ok(json!({}));
    }
    let known = vm.balloon_properties();
    Err(QmpError::generic(
        if known.iter().any(|(other, ..)| *other == name) {
            format!("Property 'virtio-balloon-pci.{name}' cannot be set once the device is there")
        } else {
            format!("Property 'virtio-balloon-pci.{name}' not found")
        },
    ))
}

/// `object-add`
pub fn add(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let machine = &vm.wanted().machine;
    let defaults = memory::Defaults {
        prealloc: false,
        merge: machine.merge,
        dump: machine.dump,
    };
    let backend = Props::from_json(Value::Object(args.to_map()))
        .and_then(|props| memory::backend(props, defaults))
        .map_err(|error| QmpError::generic(error.to_string()))?;
    vm.add_object(backend)?;
    Ok(json!({}))
}

/// `object-del`
pub fn delete(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    vm.delete_object(args.text("id"))?;
    Ok(json!({}))
}

/// Properties of a memory module: name, type, value.
fn dimm_properties(vm: &Vm, dimm: &Dimm) -> Vec<(&'static str, &'static str, Value)> {
    let all = vm.dimm_facts(dimm);
    let value = |name: &'static str, kind| (name, kind, all[name].clone());
    vec![
        value("addr", "uint64"),
        value("size", "uint64"),
        value("slot", "int32"),
        value("node", "uint32"),
        value("memdev", "link<memory-backend>"),
        value("hotplugged", "bool"),
        value("hotpluggable", "bool"),
        ("realized", "bool", json!(true)),
    ]
}

/// Properties of a memory device: name, type, value.
fn growing_properties(vm: &Vm, device: &DeviceSpec) -> Vec<(&'static str, &'static str, Value)> {
    let all = vm.memory_device_facts(device);
    let value = |name: &'static str, kind| (name, kind, all[name].clone());
    vec![
        value("memaddr", "uint64"),
        value("node", "uint32"),
        value("memdev", "link<memory-backend>"),
        value("block-size", "size"),
        value("requested-size", "size"),
        value("size", "size"),
    ]
}

/// Properties of a backend: name, type, value.
fn properties_of(backend: &BackendSpec) -> Vec<(&'static str, &'static str, Value)> {
    let mut all = vec![
        ("share", "bool", json!(backend.is_shared())),
        ("size", "int", json!(backend.bytes())),
        ("merge", "bool", json!(backend.merge())),
        ("dump", "bool", json!(backend.dump())),
        ("prealloc", "bool", json!(backend.prealloc())),
        ("prealloc-threads", "int", json!(backend.prealloc_threads())),
        ("prealloc-context", "link<thread-context>", json!("")),
        ("reserve", "bool", json!(backend.reserve())),
        ("x-use-canonical-path-for-ramblock-id", "bool", json!(false)),
        ("policy", "HostMemPolicy", json!("default")),
        ("host-nodes", "int", json!([])),
    ];
    if let Some(file) = backend.file() {
        let rom = if backend.is_rom() { "on" } else { "off" };
        all.extend([
            (
                "mem-path",
                "string",
                json!(file.path().display().to_string()),
            ),
            ("readonly", "bool", json!(backend.is_readonly())),
            ("rom", "OnOffAuto", json!(rom)),
            ("offset", "int", json!(file.offset_bytes())),
            ("align", "int", json!(backend.align_bytes())),
            ("discard-data", "bool", json!(file.discard_data())),
            ("pmem", "bool", json!(false)),
        ]);
    }
    all
}
