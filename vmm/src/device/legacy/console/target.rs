#![forbid(unsafe_code)]
//! What a user can ask a serial port to be.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Where a serial port goes.
#[derive(Debug)]
pub enum SerialTarget {
    /// Output is dropped, there is no input.
    Null,
    /// This process's standard input and output; raw when it is a terminal.
    Stdio,
    /// Output to a file, made or emptied; no input.
    File(PathBuf),
    /// A new pseudo-terminal, see [`Console::pty_path`](super::Console::pty_path).
    Pty,
    /// A Unix socket to listen on, for one client at a time. What the guest prints while there is
    /// none is kept for the next, up to [`BACKLOG_BYTES`](super::BACKLOG_BYTES).
    Unix(PathBuf),
    /// Not known yet: output is kept until [`Console::bind`](super::Console::bind) says where it
    /// goes.
    Later,
    /// An open descriptor (socket, pipe, terminal), which is made non-blocking.
    Fd(OwnedFd),
}

/// A target that could not be understood.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("serial target {text:?} is none of null, stdio, pty, file:PATH, unix:PATH")]
pub struct ParseTargetError {
    text: String,
}

impl FromStr for SerialTarget {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, ParseTargetError> {
        let path = |path: &str| (!path.is_empty()).then(|| PathBuf::from(path));
        let target = match text.split_once(':') {
            None if text == "null" => Some(Self::Null),
            None if text == "stdio" => Some(Self::Stdio),
            None if text == "pty" => Some(Self::Pty),
            Some(("file", rest)) => path(rest).map(Self::File),
            Some(("unix", rest)) => path(rest).map(Self::Unix),
            _ => None,
        };
        target.ok_or_else(|| ParseTargetError {
            text: text.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_documented() {
        let parse = |text: &str| format!("{:?}", text.parse::<SerialTarget>().unwrap());
        assert_eq!(parse("null"), "Null");
        assert_eq!(parse("stdio"), "Stdio");
        assert_eq!(parse("pty"), "Pty");
        assert_eq!(parse("file:/tmp/a:b"), r#"File("/tmp/a:b")"#);
        assert_eq!(parse("unix:c.sock"), r#"Unix("c.sock")"#);
    }

    #[test]
    fn what_is_no_target_is_quoted() {
        for text in [
            "", "tty", "file", "file:", "unix:", "null:", "Null", "pty:/x",
        ] {
            let error = text.parse::<SerialTarget>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
