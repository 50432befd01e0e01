#![forbid(unsafe_code)]
//! COM1 of the machine of the moment: what `-serial` names, kept over a reset.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::hubs::OpenHub;
use crate::device::legacy::console::SerialTarget;
use crate::qemu::error::OptionError;
use crate::qemu::line::chardev::Chardev;
use crate::qemu::link::client::Client;
use crate::qemu::link::relay::{Extras, Relay};
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
    /// To a socket, or to an end that others use too.
    Relay(Arc<Relay>),
}

impl SerialPort {
    /// Opens it.
    pub(super) fn open(
        chardev: Option<&Chardev>,
        hubs: &[OpenHub],
        tell: Tell<'_>,
    ) -> Result<Self, OptionError> {
        let Some(chardev) = chardev else {
            return Ok(Self::Null);
        };
        if let Chardev::Hub(at) = chardev
            && let Some(hub) = hubs.get(*at)
        {
            return Ok(Self::Relay(Arc::clone(&hub.relay)));
        }
        let relay = |listener, client: Option<OwnedFd>| {
            client
                .map(Client::socket)
                .transpose()
                .and_then(|client| Relay::start(listener, client, Extras::default()))
                .map(|relay| Self::Relay(Arc::new(relay)))
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
            Self::Relay(relay) => SerialTarget::Fd(relay.port()?),
        })
    }

    /// What the machine has printed last goes out.
    pub(super) fn finish(&self) {
        if let Self::Relay(relay) = self {
            relay.finish();
        }
    }
}
