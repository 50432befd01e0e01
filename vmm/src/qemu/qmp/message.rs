#![forbid(unsafe_code)]
//! What goes over a QMP connection: requests taken apart, answers and events put together. Pure.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value, json};

/// The version that clients are told: the QEMU whose behaviour this is.
pub const QEMU_VERSION: (u32, u32, u32) = (10, 0, 2);
/// What else `query-version` says.
pub const PACKAGE: &str = concat!("Pando ", env!("CARGO_PKG_VERSION"));

/// QEMU's classes of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Most.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// A device that is not there.
    DeviceNotActive,
    /// An object that is not there.
    DeviceNotFound,
}

/// Why a command was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// Which kind.
    pub class: Class,
    /// In words.
    pub desc: String,
}

impl QmpError {
    /// An error of the class that most are.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: Class::GenericError,
            desc: desc.into(),
        }
    }

    /// An error of another class.
    pub fn of(class: Class, desc: impl Into<String>) -> Self {
        Self {
            class,
            desc: desc.into(),
        }
    }

    /// As an answer's member.
    pub fn to_json(&self) -> Value {
        let class = match self.class {
            Class::GenericError => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
            Class::DeviceNotFound => "DeviceNotFound",
        };
        json!({"class": class, "desc": self.desc})
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command.
    pub command: String,
    /// What it is given.
    pub arguments: Map<String, Value>,
}

/// A request with the id that its answer must carry.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// As it came.
    pub id: Option<Value>,
    /// The request, or why it is none.
    pub request: Result<Request, QmpError>,
}

/// Takes a value apart that a client sent. No command is done out of band, so none can come that way.
pub fn receive(value: Value) -> Received {
    let Value::Object(mut members) = value else {
        return Received {
            id: None,
            request: Err(QmpError::generic("QMP input must be a JSON object")),
        };
    };
    let id = members.remove("id");
    Received {
        id,
        request: request(members).map_err(QmpError::generic),
    }
}

fn request(members: Map<String, Value>) -> Result<Request, String> {
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute", Value::String(text)) => command = Some(text),
            ("execute", _) => {
                return Err(format!("QMP input member '{name}' must be a string"));
            }
            ("arguments", Value::Object(object)) => arguments = object,
            ("arguments", _) => {
                return Err("QMP input member 'arguments' must be an object".to_owned());
            }
            _ => return Err(unexpected(&name)),
        }
    }
    let command = command.ok_or_else(|| "QMP input lacks member 'execute'".to_owned())?;
    Ok(Request { command, arguments })
}

fn unexpected(name: &str) -> String {
    format!("QMP input member '{name}' is unexpected")
}

/// What a client is greeted with.
pub fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": []}})
}

/// What `query-version` says.
pub fn version() -> Value {
    let (major, minor, micro) = QEMU_VERSION;
    json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": PACKAGE})
}

/// An answer.
pub fn answer(id: Option<Value>, result: Result<Value, QmpError>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": error.to_json()}),
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer
}

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// What else there is to say.
    pub data: Option<Value>,
}

impl Event {
    /// An event that happened `since_epoch` after 1970.
    pub fn to_json(&self, since_epoch: std::time::Duration) -> Value {
        let mut event = json!({
            "timestamp": {
                "seconds": since_epoch.as_secs(),
                "microseconds": since_epoch.subsec_micros(),
            },
            "event": self.name,
        });
        if let Some(data) = &self.data {
            event["data"] = data.clone();
        }
        event
    }
}

/// A value as QEMU writes it, with the end of its line.
pub fn write(value: &Value, pretty: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to memory does not fail, and the keys of these maps are texts.
    let _ = if pretty {
        value.serialize(&mut Serializer::with_formatter(
            &mut bytes,
            PrettyFormatter::with_indent(b"    "),
        ))
    } else {
        value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced))
    };
    bytes.extend(b"\r\n");
    bytes
}

/// One line, with a space behind each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(value: Value) -> String {
        receive(value).request.unwrap_err().desc
    }

    #[test]
    fn requests_are_taken_apart() {
        let received = receive(json!({"execute": "stop", "arguments": {"a": 1}, "id": [7]}));
        assert_eq!(received.id, Some(json!([7])));
        assert_eq!(received.request.unwrap().command, "stop");
        assert_eq!(refused(json!([1])), "QMP input must be a JSON object");
        assert_eq!(refused(json!({})), "QMP input lacks member 'execute'");
        assert_eq!(
            refused(json!({"execute": 5})),
            "QMP input member 'execute' must be a string"
        );
        assert_eq!(
            refused(json!({"execute": "a", "foo": 1})),
            "QMP input member 'foo' is unexpected"
        );
        assert_eq!(
            refused(json!({"execute": "a", "arguments": []})),
            "QMP input member 'arguments' must be an object"
        );
        assert!(refused(json!({"exec-oob": "a"})).contains("is unexpected"));
    }

    #[test]
    fn answers_look_like_qemus() {
        let text = |value, pretty| String::from_utf8(write(&value, pretty)).unwrap();
        let status = json!({"running": false, "list": [1, 2]});
        assert_eq!(
            text(answer(Some(json!("x")), Ok(status)), false),
            "{\"id\": \"x\", \"return\": {\"list\": [1, 2], \"running\": false}}\r\n"
        );
        let error = answer(None, Err(QmpError::generic("no")));
        assert_eq!(
            text(error, false),
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n"
        );
        assert_eq!(text(json!({}), false), "{}\r\n");
        assert!(text(json!({"a": 1}), true).contains("\n    \"a\": 1"));
        let event = Event {
            name: "STOP",
            data: None,
        };
        let event = event.to_json(std::time::Duration::from_micros(1_500_000));
        assert_eq!(
            event["timestamp"],
            json!({"seconds": 1, "microseconds": 500_000})
        );
    }
}
