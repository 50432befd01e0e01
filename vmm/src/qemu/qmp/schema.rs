#![forbid(unsafe_code)]
//! `query-qmp-schema`: what there is, and nothing else.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::arguments::{Arg, Kind, may};
use super::commands::COMMANDS;
use super::device_types::DEVICE_TYPES;
use super::types::{ARGUMENTS, EVENTS, LISTS, Members, RETURNS, Shape, TYPES, WORDS};
use crate::qemu::migration::capability::NAMES;

/// The type of what brings nothing.
const EMPTY: &str = "q_empty";

/// The schema.
pub fn schema() -> Value {
    let mut entities = vec![
        builtin("str", "string"),
        builtin("int", "int"),
        builtin("number", "number"),
        builtin("bool", "boolean"),
        builtin("any", "value"),
        json!({"name": EMPTY, "meta-type": "object", "members": []}),
    ];
    const NEGOTIATE: &[Arg] = &[may("enable", Kind::List)];
    entities.extend(command("qmp_capabilities", NEGOTIATE));
    for known in COMMANDS {
        entities.extend(command(known.name, known.args));
    }
    for (name, arg_type) in EVENTS {
        let arg_type = if arg_type.is_empty() { EMPTY } else { arg_type };
        entities.push(json!({"name": name, "meta-type": "event", "arg-type": arg_type}));
    }
    let types = TYPES.iter().chain(DEVICE_TYPES);
    entities.extend(types.map(|(name, shape)| entity(name, shape)));
    let capabilities: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
    entities.push(words("MigrationCapability", &capabilities));
    let lists: BTreeSet<String> = entities.iter().flat_map(lists_of).collect();
    entities.extend(lists.iter().map(|name| {
        let element = name.trim_matches(['[', ']']);
        json!({"name": name, "meta-type": "array", "element-type": element})
    }));
    Value::Array(entities)
}

/// Names of the list types that an entity mentions.
fn lists_of(entity: &Value) -> Vec<String> {
    let own = ["arg-type", "ret-type"].map(|field| &entity[field]);
    let members = entity["members"].as_array().into_iter().flatten();
    own.into_iter()
        .chain(members.map(|member| &member["type"]))
        .filter_map(Value::as_str)
        .filter(|name| name.starts_with('['))
        .map(str::to_owned)
        .collect()
}

fn builtin(name: &str, json_type: &str) -> Value {
    json!({"name": name, "meta-type": "builtin", "json-type": json_type})
}

fn words(name: &str, values: &[&str]) -> Value {
    let members: Vec<Value> = values.iter().map(|word| json!({"name": word})).collect();
    json!({"name": name, "meta-type": "enum", "members": members, "values": values})
}

fn entity(name: &str, shape: &Shape) -> Value {
    match shape {
        Shape::Enum(values) => words(name, values),
        Shape::Object {
            members,
            tag,
            variants,
        } => {
            let members: Vec<Value> = members
                .iter()
                .map(|(name, kind)| match name.strip_suffix('?') {
                    Some(name) => json!({"name": name, "type": kind, "default": null}),
                    None => json!({"name": name, "type": kind}),
                })
                .collect();
            let mut entity = json!({"name": name, "meta-type": "object", "members": members});
            if let Some(tag) = tag {
                entity["tag"] = json!(tag);
                entity["variants"] = variants
                    .iter()
                    .map(|(case, name)| json!({"case": case, "type": name}))
                    .collect();
            }
            entity
        }
    }
}

fn of(table: Members, name: &str) -> Option<&'static str> {
    let found = table.iter().find(|(known, _)| *known == name);
    found.map(|(_, named)| *named)
}

fn command(name: &str, args: &[Arg]) -> Vec<Value> {
    let own_type = format!("{name}-arg");
    let arg_type = match of(ARGUMENTS, name) {
        Some(named) => named,
        None if args.is_empty() => EMPTY,
        None => &own_type,
    };
    let mut entities = vec![json!({
        "name": name,
        "meta-type": "command",
        "arg-type": arg_type,
        "ret-type": of(RETURNS, name).unwrap_or(EMPTY),
        "allow-oob": false,
    })];
    if arg_type == own_type {
        let members: Vec<Value> = args.iter().map(|arg| member(name, arg)).collect();
        entities.push(json!({"name": own_type, "meta-type": "object", "members": members}));
    }
    entities
}

fn member(command: &str, arg: &Arg) -> Value {
    let mut own = LISTS.iter().chain(WORDS);
    let own = own.find(|(known, name, _)| *known == command && *name == arg.name);
    let kind = own.map_or(arg.kind.schema_name(), |(.., kind)| kind);
    let mut member = json!({"name": arg.name, "type": kind});
    if !arg.required {
        member["default"] = Value::Null;
    }
    member
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_is_named_is_there_once() {
        let Value::Array(entities) = schema() else {
            panic!("a list")
        };
        let names: Vec<&str> = entities.iter().filter_map(|e| e["name"].as_str()).collect();
        let distinct: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(distinct.len(), names.len());
        for entity in &entities {
            for field in ["arg-type", "ret-type", "element-type"] {
                if let Some(name) = entity[field].as_str() {
                    assert!(names.contains(&name), "{name}");
                }
            }
            for part in ["members", "variants"] {
                for member in entity[part].as_array().into_iter().flatten() {
                    let kind = member["type"].as_str();
                    assert!(kind.is_none_or(|kind| names.contains(&kind)), "{member}");
                }
            }
            // Every list says of what.
            assert_ne!(entity["element-type"], "any", "{entity}");
        }
        for (name, _) in RETURNS.iter().chain(ARGUMENTS) {
            assert!(COMMANDS.iter().any(|known| known.name == *name), "{name}");
        }
    }
}
