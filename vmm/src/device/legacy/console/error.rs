#![forbid(unsafe_code)]
//! Why a console cannot be opened.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::device::socket::SocketError;

/// Why a console cannot be opened or attached.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// Standard input or output is closed.
    #[error("cannot use standard input and output as serial console")]
    Stdio(#[source] io::Error),
    /// The output file cannot be made.
    #[error("cannot write serial output to {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("cannot make a pseudo-terminal for the serial console")]
    Pty(#[source] io::Error),
    /// Nobody can listen on its socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The descriptor cannot be made non-blocking.
    #[error("cannot use the given descriptor as serial console")]
    Descriptor(#[source] io::Error),
    /// The event that wakes the console's thread cannot be made.
    #[error("cannot make the serial console's event")]
    Event(#[source] io::Error),
    /// The console's thread cannot be made.
    #[error("cannot start the serial console's thread")]
    Thread(#[source] io::Error),
    /// A console feeds one UART.
    #[error("the serial console is attached already")]
    Attached,
}
