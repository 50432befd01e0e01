#![forbid(unsafe_code)]
//! COM1 of the machine of the moment: what `-serial` names, kept over a reset.

use std::fs::File;
use std::io;

use crate::device::legacy::console::SerialTarget;
use crate::qemu::error::OptionError;
use crate::qemu::line::chardev::Chardev;
use crate::qemu::link::relay::Relay;
use crate::qemu::link::{Link, Pty, Tell, open_link, reason};

/// Where COM1 goes.
#[derive(Debug)]
pub(super) enum SerialPort {
    /// Nowhere.
    Null,
    /// To this process's terminal.
    Stdio,
    /// To a file.
    File(File),
    /// To a pseudo-terminal.
    Pty(Pty),
    /// To a socket.
    Socket(Relay),
}

impl SerialPort {
    /// Opens it.
    pub(super) fn open(chardev: Option<&Chardev>, tell: Tell<'_>) -> Result<Self, OptionError> {
        let Some(chardev) = chardev else {
            return Ok(Self::Null);
        };
        let relay = |listener, client| {
            Relay::start(listener, client)
                .map(Self::Socket)
                .map_err(|error| {
                    OptionError::new(format!("cannot start the serial port: {}", reason(&error)))
                })
        };
        match open_link(chardev, "serial0", tell)? {
            Link::Null => Ok(Self::Null),
            Link::Stdio => Ok(Self::Stdio),
            Link::File(file) => Ok(Self::File(file)),
            Link::Pty(pty) => Ok(Self::Pty(pty)),
            Link::Listener(listener, first) => relay(Some(listener), first),
            Link::Stream(stream) => relay(None, Some(stream)),
        }
    }

    /// The end for a new machine.
    pub(super) fn target(&self) -> io::Result<SerialTarget> {
        Ok(match self {
            Self::Null => SerialTarget::Null,
            Self::Stdio => SerialTarget::Stdio,
            Self::File(file) => SerialTarget::Fd(file.try_clone()?.into()),
            Self::Pty(pty) => SerialTarget::Fd(pty.master.try_clone()?),
            Self::Socket(relay) => SerialTarget::Fd(relay.port()?),
        })
    }
}
