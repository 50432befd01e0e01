#![forbid(unsafe_code)]
//! Character devices that COM1 and monitors have in common (`mux=on`, `mon:`), or whose output is kept
//! (`logfile=`).

use std::path::PathBuf;

use super::chardev::{Chardev, NamedChardev, Role};
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;

/// A file that gets a copy of what a character device shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// Which.
    pub path: PathBuf,
    /// Whether what is in it stays.
    pub append: bool,
}

/// A character device between an end and those who use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hub {
    /// What messages call it.
    pub label: String,
    /// Its end.
    pub chardev: Chardev,
    /// The copy.
    pub log: Option<Log>,
    /// Whether several use it, one after the other, by Ctrl-A c.
    pub mux: bool,
    /// Whether COM1 is one of them: it comes first.
    pub has_serial: bool,
}

impl Log {
    /// Reads `logfile` and `logappend`.
    pub(super) fn read(props: &mut Props) -> Result<Option<Self>, OptionError> {
        let append = props.switch("logappend")?.unwrap_or(false);
        Ok(props.text("logfile")?.map(|path| Self {
            path: path.into(),
            append,
        }))
    }
}

/// All hubs of a command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hubs(Vec<Hub>);

impl Hubs {
    /// All of them, in the order of the numbers that [`Chardev::Hub`] has.
    pub fn all(&self) -> &[Hub] {
        &self.0
    }

    /// The hub that `mon:` makes of an end.
    pub(super) fn of_mon(&mut self, chardev: Chardev) -> Chardev {
        let label = format!("compat_mux{}", self.0.len());
        self.add(NamedChardev {
            id: label,
            chardev,
            mux: true,
            log: None,
        })
    }

    /// What a user of a named device gets: itself, or a hub.
    pub(super) fn of_named(&mut self, named: NamedChardev) -> Chardev {
        if !named.mux && named.log.is_none() {
            return named.chardev;
        }
        match self.0.iter().position(|hub| hub.label == named.id) {
            Some(at) => Chardev::Hub(at),
            None => self.add(named),
        }
    }

    /// Has a device opened that nothing uses, as QEMU opens it: its file is made, its socket takes clients. One
    /// that leads to somebody who listens is for a device that comes later, which connects when it does.
    pub(super) fn open_unused(&mut self, named: NamedChardev) {
        let is_later = match named.chardev {
            Chardev::Null => named.log.is_none(),
            Chardev::Socket { role, .. } => role == Role::Client,
            _ => false,
        };
        if !is_later {
            // As one that several may use: nobody has to.
            self.of_named(NamedChardev { mux: true, ..named });
        }
    }

    fn add(&mut self, named: NamedChardev) -> Chardev {
        self.0.push(Hub {
            label: named.id,
            chardev: named.chardev,
            log: named.log,
            mux: named.mux,
            has_serial: false,
        });
        Chardev::Hub(self.0.len() - 1)
    }

    /// Notes that COM1 is one of a hub's users.
    pub(super) fn give_serial(&mut self, chardev: Option<&Chardev>) {
        if let Some(Chardev::Hub(at)) = chardev
            && let Some(hub) = self.0.get_mut(*at)
        {
            hub.has_serial = true;
        }
    }

    /// Refuses a monitor on a device that has a log and one user.
    pub(super) fn check_monitor(&self, chardev: &Chardev) -> Result<(), OptionError> {
        match chardev {
            Chardev::Hub(at) if self.0.get(*at).is_some_and(|hub| !hub.mux) => {
                Err(OptionError::new(
                    "logfile cannot be had for a monitor: -d qmp -D FILE logs what it is asked",
                ))
            }
            _ => Ok(()),
        }
    }
}
