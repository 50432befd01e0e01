#![forbid(unsafe_code)]
//! Ends of ports and monitors, opened: what a [`Chardev`] names, as descriptors.

pub mod client;
pub mod mux;
pub mod relay;
mod socket;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

pub use socket::{Listener, SocketPath};

use crate::qemu::error::OptionError;
use crate::qemu::line::chardev::{Address, Chardev, Role};
use crate::sys::lock::is_locked;

/// An open end.
#[derive(Debug)]
pub enum Link {
    /// Nothing is there.
    Null,
    /// Standard input and output.
    Stdio,
    /// A file, written only.
    File(File),
    /// The master of a pseudo-terminal.
    Pty(Pty),
    /// A socket on which clients come and go.
    Listener(Listener, Option<OwnedFd>),
    /// A connection that was made from here.
    Stream(OwnedFd),
}

/// A pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    /// The end that is read and written here.
    pub master: OwnedFd,
    /// What others open.
    pub path: PathBuf,
    /// Keeps it alive while nobody has it open.
    _terminal: OwnedFd,
}

/// What a link tells a person while it is opened.
pub type Tell<'a> = &'a mut dyn FnMut(&str);

/// Opens what `chardev` names; `label` is what messages call it. A server that is to wait waits
/// here for its first client.
pub fn open_link(chardev: &Chardev, label: &str, tell: Tell<'_>) -> Result<Link, OptionError> {
    match chardev {
        Chardev::Null => Ok(Link::Null),
        Chardev::Stdio => Ok(Link::Stdio),
        Chardev::File { path, append } => {
            open_file(path, *append).map(Link::File).map_err(|error| {
                OptionError::new(format!(
                    "Could not open '{}': {}",
                    path.display(),
                    reason(&error)
                ))
            })
        }
        Chardev::Pty => {
            let pty = pty().map_err(|error| {
                OptionError::new(format!("Failed to create PTY: {}", reason(&error)))
            })?;
            tell(&format!(
                "char device redirected to {} (label {label})",
                pty.path.display()
            ));
            Ok(Link::Pty(pty))
        }
        Chardev::Socket { address, role } => socket(address, *role, tell),
        // Whoever uses one is given it, opened.
        Chardev::Hub(_) => Err(OptionError::new(
            "a device that several use is inside another",
        )),
    }
}

/// A file to write to, emptied unless `append`; never one that is memory.
pub fn open_file(path: &Path, append: bool) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .append(append)
        .truncate(false)
        .open(path)?;
    if is_locked(&file).unwrap_or(false) {
        return Err(io::Error::other(
            "it is the memory of a machine that is there: name another file",
        ));
    }
    if !append && file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Ok(file)
}

fn socket(address: &Address, role: Role, tell: Tell<'_>) -> Result<Link, OptionError> {
    match role {
        Role::Client => socket::connect(address).map(Link::Stream).map_err(|error| {
            OptionError::new(format!(
                "Failed to connect to '{}': {}",
                shown(address),
                reason(&error)
            ))
        }),
        Role::Server { wait } => {
            let listener = Listener::bind(address).map_err(|error| {
                OptionError::new(format!(
                    "Failed to bind socket to {}: {}",
                    shown(address),
                    reason(&error)
                ))
            })?;
            let mut first = None;
            if wait {
                let kind = match address {
                    Address::Unix(_) => "unix",
                    Address::Tcp(_) => "tcp",
                };
                tell(&format!(
                    "info: QEMU waiting for connection on: disconnected:{kind}:{},server=on",
                    shown(address)
                ));
                while first.is_none() {
                    listener.wait();
                    first = listener.accept();
                }
            }
            Ok(Link::Listener(listener, first))
        }
    }
}

fn shown(address: &Address) -> String {
    match address {
        Address::Unix(path) => path.display().to_string(),
        Address::Tcp(address) => address.to_string(),
    }
}

/// What the system said, as C says it: without its number.
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

fn pty() -> io::Result<Pty> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = open(&name, flags, Mode::empty())?;
    let mut settings = tcgetattr(terminal.as_fd())?;
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings)?;
    Ok(Pty {
        master,
        path: PathBuf::from(std::ffi::OsString::from_vec(name.into_bytes())),
        _terminal: terminal,
    })
}
