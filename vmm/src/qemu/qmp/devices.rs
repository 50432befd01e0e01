#![forbid(unsafe_code)]
//! Devices and images: `device_add`, `blockdev-add` and what belongs to them.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::message::QmpError;
use crate::qemu::vm::{Vm, query_pci};
use crate::qemu::words::Props;

/// Most objects inside each other: a format, its file, and what that has.
const MAX_DEPTH: usize = 4;

/// `device_add`
pub fn add(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    vm.device_add(props(args.to_map())?)?;
    Ok(json!({}))
}

/// `device_del`
pub fn delete(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    vm.device_del(args.text("id"))?;
    Ok(json!({}))
}

/// `blockdev-add`
pub fn blockdev_add(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let mut flat = Map::new();
    flatten("", args.to_map(), MAX_DEPTH, &mut flat)?;
    vm.blockdev_add(props(flat)?)?;
    Ok(json!({}))
}

/// `blockdev-del`
pub fn blockdev_del(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    vm.blockdev_del(args.text("node-name"))?;
    Ok(json!({}))
}

/// `netdev_add`
pub fn netdev_add(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    let mut flat = Map::new();
    flatten("", args.to_map(), MAX_DEPTH, &mut flat)?;
    vm.netdev_add(props(flat)?)?;
    Ok(json!({}))
}

/// `netdev_del`
pub fn netdev_del(vm: &mut Vm, args: &Arguments) -> Result<Value, QmpError> {
    vm.netdev_del(args.text("id"))?;
    Ok(json!({}))
}

/// `query-pci`
pub fn pci(vm: &mut Vm, _: &Arguments) -> Result<Value, QmpError> {
    Ok(query_pci(&vm.functions()?))
}

fn props(members: Map<String, Value>) -> Result<Props, QmpError> {
    Props::from_json(Value::Object(members)).map_err(|error| QmpError::generic(error.message()))
}

/// Members of objects inside others, with a dot between the names; switches as words, as on a command line.
fn flatten(
    prefix: &str,
    members: Map<String, Value>,
    depth: usize,
    flat: &mut Map<String, Value>,
) -> Result<(), QmpError> {
    for (name, value) in members {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(inner) if depth > 0 => {
                flatten(&format!("{name}."), inner, depth - 1, flat)?;
            }
            Value::Object(_) => {
                return Err(QmpError::generic(format!(
                    "Parameter '{name}' is unexpected"
                )));
            }
            Value::Bool(on) => {
                flat.insert(name, json!(if on { "on" } else { "off" }));
            }
            other => {
                flat.insert(name, other);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(members) => members,
            other => panic!("{other} is no object"),
        }
    }

    #[test]
    fn objects_inside_others_are_words_with_dots() {
        let nested = members(json!({
            "driver": "raw", "read-only": true, "file": {"driver": "file", "filename": "d"},
            "cache": {"direct": false},
        }));
        let mut flat = Map::new();
        flatten("", nested, MAX_DEPTH, &mut flat).unwrap();
        let expected = json!({
            "driver": "raw", "read-only": "on", "file.driver": "file", "file.filename": "d",
            "cache.direct": "off",
        });
        assert_eq!(Value::Object(flat), expected);
    }

    #[test]
    fn objects_without_end_are_refused() {
        let mut value = json!(1);
        for _ in 0..100 {
            value = json!({"a": value});
        }
        let error = flatten("", members(value), MAX_DEPTH, &mut Map::new()).unwrap_err();
        let text = "'a.a.a.a.a' is unexpected";
        assert!(error.desc.contains(text), "{}", error.desc);
    }
}
