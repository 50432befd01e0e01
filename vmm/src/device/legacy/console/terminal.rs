#![forbid(unsafe_code)]
//! Raw mode of this process's terminal, and the way back.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// The terminal that is raw at the moment, and how it was. A process has one.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Gives the terminal back as it was. Does nothing when it is not raw.
///
/// Dropping a console does this; call it before leaving the process in any other way.
pub fn restore_terminal() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((terminal, settings)) = saved {
        let _ = tcsetattr(&terminal, OptionalActions::Now, &settings);
    }
}

/// A terminal in raw mode until this is dropped.
#[derive(Debug)]
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Makes `fd` raw, but for line ends in the output, which other messages rely on.
    pub(super) fn new(fd: impl AsFd) -> io::Result<Self> {
        let terminal = rustix::io::fcntl_dupfd_cloexec(&fd, 0)?;
        let settings = tcgetattr(&terminal)?;
        let mut raw = settings.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        // The first settings are the ones to go back to.
        saved.get_or_insert((terminal, settings));
        Ok(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// What a descriptor is to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No terminal.
    Other,
    /// The terminal, and this process is in its foreground.
    Foreground,
    /// A terminal that stops this process if it reads from it or changes it.
    Background,
}

/// Finds out what `fd` is.
pub(super) fn kind(fd: impl AsFd) -> Kind {
    if !isatty(&fd) {
        return Kind::Other;
    }
    match tcgetpgrp(&fd) {
        Ok(group) if group != getpgrp() => Kind::Background,
        // A terminal that is not the controlling one does not stop anybody.
        _ => Kind::Foreground,
    }
}
