#![forbid(unsafe_code)]
//! Where a state goes to or comes from: `file:PATH`, `fd:NAME`, and the form with channels.

use std::path::PathBuf;

use serde_json::Value;

use crate::qemu::error::OptionError;
use crate::qemu::words::size;

/// Where a state is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateAddress {
    /// In a file.
    File {
        /// Which.
        path: PathBuf,
        /// Where in it the state begins, in bytes.
        offset_bytes: u64,
    },
    /// Behind a descriptor: a number of this process, or a name that `getfd` gave.
    Fd(String),
}

/// Reads a `uri`.
pub fn parse(uri: &str) -> Result<StateAddress, OptionError> {
    match uri.split_once(':') {
        Some(("file", rest)) => {
            let (path, offset) = match rest.rsplit_once(",offset=") {
                Some((path, offset)) => (
                    path,
                    size::parse(offset, 1).ok_or_else(|| bad_offset(offset))?,
                ),
                None => (rest, 0),
            };
            Ok(StateAddress::File {
                path: path.into(),
                offset_bytes: offset,
            })
        }
        Some(("fd", name)) => Ok(StateAddress::Fd(name.to_owned())),
        Some((protocol @ ("tcp" | "unix" | "rdma" | "exec" | "vsock"), _)) => {
            Err(OptionError::new(format!(
                "unknown migration protocol: {uri}: Pando has no {protocol}:, it saves to files; use file:PATH \
                 or fd:NAME"
            )))
        }
        _ => Err(OptionError::new(format!(
            "unknown migration protocol: {uri}"
        ))),
    }
}

/// What the host's function says is wrong with it.
fn bad_offset(offset: &str) -> OptionError {
    let digits = offset.strip_prefix('-').unwrap_or(offset);
    let is_number = digits.starts_with(|c: char| c.is_ascii_digit())
        && !digits
            .trim_end_matches(char::is_alphabetic)
            .contains(|c: char| !c.is_ascii_digit());
    let is_out_of_range = is_number && (digits != offset || digits.ends_with(char::is_alphabetic));
    let why = if is_out_of_range {
        "Numerical result out of range"
    } else {
        "Invalid argument"
    };
    OptionError::new(format!("file URI has bad offset {offset}: {why}"))
}

/// Reads one element of `channels`.
pub fn channel(value: &Value) -> Result<StateAddress, OptionError> {
    let text = |value: &Value, name: &str| {
        value[name]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| OptionError::new(format!("Parameter 'channels[0].{name}' is missing")))
    };
    if text(value, "channel-type")? != "main" {
        return Err(OptionError::new("Channel list has no main entry"));
    }
    let address = &value["addr"];
    match text(address, "transport")?.as_str() {
        "file" => Ok(StateAddress::File {
            path: text(address, "filename")?.into(),
            offset_bytes: address["offset"].as_u64().unwrap_or(0),
        }),
        other => Err(OptionError::new(format!(
            "unknown migration transport: {other}: Pando saves to files; use transport file"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_are_read() {
        let file = |path: &str, offset_bytes| StateAddress::File {
            path: path.into(),
            offset_bytes,
        };
        assert_eq!(parse("file:/a:b"), Ok(file("/a:b", 0)));
        assert_eq!(parse("file:s,offset=0x1000"), Ok(file("s", 4096)));
        assert_eq!(parse("fd:3"), Ok(StateAddress::Fd("3".into())));
        let main = json!({"channel-type": "main", "addr": {"transport": "file", "filename": "s", "offset": 0}});
        assert_eq!(channel(&main), Ok(file("s", 0)));
        let message = |uri| parse(uri).unwrap_err().to_string();
        assert_eq!(message("bogus:x"), "unknown migration protocol: bogus:x");
        assert!(message("exec:cat>s").contains("use file:PATH"));
        channel(&json!({})).unwrap_err();
    }
}
