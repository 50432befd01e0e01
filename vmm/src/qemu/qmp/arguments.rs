#![forbid(unsafe_code)]
//! The arguments of a command, checked against what it declares. Pure.

use serde_json::{Map, Value};

use super::message::QmpError;

/// What an argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A text.
    Str,
    /// A whole number.
    Int,
    /// A switch.
    Bool,
    /// A list.
    List,
    /// Anything.
    Any,
}

impl Kind {
    /// The name of the type in the schema.
    pub fn schema_name(self) -> &'static str {
        match self {
            Self::Str => "str",
            Self::Int => "int",
            Self::Bool => "bool",
            Self::List => "[any]",
            Self::Any => "any",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Str => value.is_string(),
            Self::Int => value.is_i64() || value.is_u64(),
            Self::Bool => value.is_boolean(),
            Self::List => value.is_array(),
            Self::Any => true,
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Str => "string",
            Self::Int => "integer",
            Self::Bool => "boolean",
            Self::List => "array",
            Self::Any => "any",
        }
    }
}

/// One argument.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Whether it must be there.
    pub required: bool,
}

/// An argument that must be there.
pub const fn must(name: &'static str, kind: Kind) -> Arg {
    Arg {
        name,
        kind,
        required: true,
    }
}

/// An argument that may be there.
pub const fn may(name: &'static str, kind: Kind) -> Arg {
    Arg {
        name,
        kind,
        required: false,
    }
}

/// Arguments that fit what is declared.
#[derive(Debug)]
pub struct Arguments(Map<String, Value>);

impl Arguments {
    /// Checks arguments; with `open` there may be others too.
    pub fn check(
        given: Map<String, Value>,
        declared: &[Arg],
        open: bool,
    ) -> Result<Self, QmpError> {
        for arg in declared {
            match given.get(arg.name) {
                None if arg.required => {
                    return Err(QmpError::generic(format!(
                        "Parameter '{}' is missing",
                        arg.name
                    )));
                }
                Some(value) if !arg.kind.fits(value) => {
                    return Err(QmpError::generic(format!(
                        "Invalid parameter type for '{}', expected: {}",
                        arg.name,
                        arg.kind.expected()
                    )));
                }
                _ => (),
            }
        }
        let known = |name: &str| declared.iter().any(|arg| arg.name == name);
        match given.keys().find(|name| !open && !known(name)) {
            Some(name) => Err(QmpError::generic(format!(
                "Parameter '{name}' is unexpected"
            ))),
            None => Ok(Self(given)),
        }
    }

    /// A text; empty when it is not there.
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).and_then(Value::as_str).unwrap_or("")
    }

    /// A text, if it is there.
    pub fn maybe_text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }

    /// A switch, if it is there.
    pub fn switch(&self, name: &str) -> Option<bool> {
        self.0.get(name).and_then(Value::as_bool)
    }

    /// A list; empty when it is not there.
    pub fn list(&self, name: &str) -> &[Value] {
        self.0
            .get(name)
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice)
    }

    /// Whatever it is.
    pub fn any(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// All of them.
    pub fn to_map(&self) -> Map<String, Value> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arguments_are_checked_in_qemus_words() {
        let declared = [must("id", Kind::Str), may("force", Kind::Bool)];
        let check = |value: Value| {
            let Value::Object(map) = value else {
                panic!("an object")
            };
            Arguments::check(map, &declared, false).map_err(|error| error.desc)
        };
        assert_eq!(check(json!({"id": "a"})).unwrap().text("id"), "a");
        assert_eq!(check(json!({})).unwrap_err(), "Parameter 'id' is missing");
        assert_eq!(
            check(json!({"id": 5})).unwrap_err(),
            "Invalid parameter type for 'id', expected: string"
        );
        assert_eq!(
            check(json!({"id": "a", "x": 1})).unwrap_err(),
            "Parameter 'x' is unexpected"
        );
    }
}
