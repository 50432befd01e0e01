#![forbid(unsafe_code)]
//! Where COM1 goes.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use thiserror::Error;

use super::serial::Serial;

/// Where a serial port goes.
#[derive(Debug)]
pub enum SerialTarget {
    /// Output is dropped, there is no input.
    Null,
    /// This process's standard input and output; raw when it is a terminal.
    Stdio,
    /// Output to a file, made or emptied; no input.
    File(PathBuf),
    /// A new pseudo-terminal, see [`Console::pty_path`].
    Pty,
    /// A Unix socket to listen on.
    Unix(PathBuf),
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
        let _ = text;
        todo!()
    }
}

/// Why a console cannot be opened.
#[derive(Debug, Error)]
pub enum ConsoleError {}

/// The open end of a serial port. Dropping it ends its thread, gives the terminal back and removes
/// the socket.
#[derive(Debug)]
pub struct Console {
    output: ConsoleOutput,
}

impl Console {
    /// Opens the endpoint; nothing is read from it before [`Console::attach`].
    pub fn open(target: SerialTarget) -> Result<Self, ConsoleError> {
        let _ = target;
        todo!()
    }

    /// Where the UART writes to.
    #[must_use]
    pub fn output(&self) -> ConsoleOutput {
        self.output.clone()
    }

    /// Starts to feed `serial`. `on_quit` is called when the user of a terminal types the escape to
    /// quit (Ctrl-A x); it must not drop the console.
    pub fn attach(
        &mut self,
        serial: Arc<Mutex<Serial>>,
        on_quit: Box<dyn Fn() + Send>,
    ) -> Result<(), ConsoleError> {
        let _ = (serial, on_quit);
        todo!()
    }

    /// The terminal to open, when the target was [`SerialTarget::Pty`].
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        todo!()
    }

    /// Output bytes that were dropped because nobody read them.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        todo!()
    }
}

/// Where the UART writes to; never blocks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ConsoleOutput {}

impl ConsoleOutput {
    pub(super) fn waker(&self) -> ConsoleWaker {
        todo!()
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = bytes;
        todo!()
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Wakes the console's thread.
#[derive(Debug, Clone)]
pub(super) struct ConsoleWaker {}

impl ConsoleWaker {
    pub(super) fn wake(&self) {
        todo!()
    }
}
