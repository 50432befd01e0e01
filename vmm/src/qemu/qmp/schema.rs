#![forbid(unsafe_code)]
//! `query-qmp-schema`: what there is, and nothing else.

use serde_json::{Value, json};

use super::arguments::{Arg, Kind, may};
use super::commands::COMMANDS;

/// Names of all events.
pub const EVENTS: &[&str] = &[
    "STOP",
    "RESUME",
    "RESET",
    "SHUTDOWN",
    "POWERDOWN",
    "MIGRATION",
];

/// The schema.
pub fn schema() -> Value {
    let mut entities = vec![
        builtin("str", "string"),
        builtin("int", "int"),
        builtin("bool", "boolean"),
        builtin("any", "value"),
        json!({"name": "[any]", "meta-type": "array", "element-type": "any"}),
        json!({"name": "q_empty", "meta-type": "object", "members": []}),
    ];
    const NEGOTIATE: &[Arg] = &[may("enable", Kind::List)];
    entities.extend(command("qmp_capabilities", NEGOTIATE));
    for known in COMMANDS {
        entities.extend(command(known.name, known.args));
    }
    entities.extend(
        EVENTS
            .iter()
            .map(|name| json!({"name": name, "meta-type": "event", "arg-type": "any"})),
    );
    Value::Array(entities)
}

fn builtin(name: &str, json_type: &str) -> Value {
    json!({"name": name, "meta-type": "builtin", "json-type": json_type})
}

fn command(name: &str, args: &[Arg]) -> Vec<Value> {
    let type_name = format!("{name}-arg");
    let members: Vec<Value> = args.iter().map(member).collect();
    let arg_type = if args.is_empty() {
        "q_empty"
    } else {
        &type_name
    };
    let mut entities = vec![json!({
        "name": name,
        "meta-type": "command",
        "arg-type": arg_type,
        "ret-type": "any",
        "allow-oob": false,
    })];
    if !args.is_empty() {
        entities.push(json!({"name": type_name, "meta-type": "object", "members": members}));
    }
    entities
}

fn member(arg: &Arg) -> Value {
    let mut member = json!({"name": arg.name, "type": arg.kind.schema_name()});
    if !arg.required {
        member["default"] = Value::Null;
    }
    member
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_is_named_is_there() {
        let Value::Array(entities) = schema() else {
            panic!("a list")
        };
        let names: Vec<&str> = entities.iter().filter_map(|e| e["name"].as_str()).collect();
        for entity in &entities {
            for field in ["arg-type", "ret-type", "element-type"] {
                if let Some(name) = entity[field].as_str() {
                    assert!(names.contains(&name), "{name}");
                }
            }
            for member in entity["members"].as_array().into_iter().flatten() {
                assert!(names.contains(&member["type"].as_str().unwrap()));
            }
        }
    }
}
