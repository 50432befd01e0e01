#![forbid(unsafe_code)]
//! Character devices that COM1 and monitors have in common, opened.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::Sender;

use super::Message;
use crate::qemu::error::OptionError;
use crate::qemu::line::chardev::Chardev;
use crate::qemu::line::hub::{Hub, Log};
use crate::qemu::link::client::Client;
use crate::qemu::link::relay::{Extras, Relay};
use crate::qemu::link::{Link, Pty, Tell, open_file, open_link, reason};

/// One of them.
#[derive(Debug)]
pub(super) struct OpenHub {
    pub(super) relay: Arc<Relay>,
    /// Keeps its terminal alive.
    _pty: Option<Pty>,
}

/// Opens all of them.
pub(super) fn open(
    hubs: &[Hub],
    sender: &Sender<Message>,
    tell: Tell<'_>,
) -> Result<Vec<OpenHub>, OptionError> {
    hubs.iter().map(|hub| one(hub, sender, tell)).collect()
}

fn one(hub: &Hub, sender: &Sender<Message>, tell: Tell<'_>) -> Result<OpenHub, OptionError> {
    let cannot = |error: io::Error| {
        let why = reason(&error);
        OptionError::new(format!(
            "cannot start character device {}: {why}",
            hub.label
        ))
    };
    let log = hub.log.as_ref().map(open_log).transpose()?;
    let (mut pty, mut listener) = (None, None);
    let client = match open_link(&hub.chardev, &hub.label, tell)? {
        Link::Null => Some(Client::file(None)),
        Link::Stdio => Some(Client::stdio()),
        Link::File(file) => Some(Client::file(Some(file))),
        Link::Stream(stream) => Some(Client::socket(stream)),
        Link::Pty(new) => {
            let master = new.master.try_clone().map_err(cannot)?;
            pty = Some(new);
            Some(Client::socket(master))
        }
        Link::Listener(new, first) => {
            listener = Some(new);
            first.map(Client::socket)
        }
    };
    let sender = sender.clone();
    let extras = Extras {
        // As of COM1 alone on a terminal.
        has_escapes: hub.mux || hub.chardev == Chardev::Stdio,
        monitor_first: !hub.has_serial,
        log,
        // The machine's thread may be gone, and all with it.
        on_quit: Some(Box::new(move || {
            let _ = sender.send(Message::Quit);
        })),
    };
    let client = client.transpose().map_err(cannot)?;
    let relay = Relay::start(listener, client, extras).map_err(cannot)?;
    Ok(OpenHub {
        relay: Arc::new(relay),
        _pty: pty,
    })
}

fn open_log(log: &Log) -> Result<File, OptionError> {
    open_file(&log.path, log.append).map_err(|error| {
        OptionError::new(format!(
            "Unable to open logfile {}: {}",
            log.path.display(),
            reason(&error)
        ))
    })
}

impl super::Vm {
    /// The end of a monitor on hub `at`.
    pub fn monitor_on_hub(&self, at: usize, for_people: bool) -> io::Result<OwnedFd> {
        let hub = self.hubs.get(at);
        let hub = hub.ok_or_else(|| io::Error::other("there is no such character device"))?;
        hub.relay.monitor(for_people)
    }

    /// What the machine has printed last goes out; terminals are given back.
    pub(super) fn finish_ports(&self) {
        self.serial.finish();
        for hub in &self.hubs {
            hub.relay.finish();
        }
    }
}
