#![forbid(unsafe_code)]
//! Raw mode of this process's terminal, and the way back.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError, TryLockError};

use rustix::process::getpgrp;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

use crate::sandbox::sigbus;

/// The terminal that is raw at the moment, and how it was. A process has one.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Gives the terminal back as it was. Does nothing when it is not raw.
fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((terminal, settings)) = saved {
        let _ = tcsetattr(&terminal, OptionalActions::Now, &settings);
    }
}

/// Gives the terminal back from a signal handler that ends the process: system calls only, no
/// memory is taken or given back, and no lock is waited for. A thread that holds it is making the
/// terminal raw or giving it back this very moment.
fn restore_in_signal() {
    let saved = match SAVED.try_lock() {
        Ok(saved) => saved,
        Err(TryLockError::Poisoned(error)) => error.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some((terminal, settings)) = &*saved
        && kind(terminal) == Kind::Foreground
    {
        let _ = tcsetattr(terminal, OptionalActions::Now, settings);
    }
}

/// How a terminal was before another process got it: given back when this is dropped.
///
/// A process that makes a terminal raw gives it back itself, unless it is killed; whoever started it
/// keeps this for that.
#[derive(Debug)]
pub struct SavedTerminal {
    terminal: OwnedFd,
    settings: Termios,
}

impl SavedTerminal {
    /// Notes how `fd` is; `None` when it is no terminal, or one in whose background this process is.
    pub fn save(fd: impl AsFd) -> Option<Self> {
        if kind(&fd) != Kind::Foreground {
            return None;
        }
        Some(Self {
            settings: tcgetattr(&fd).ok()?,
            terminal: rustix::io::fcntl_dupfd_cloexec(&fd, 0).ok()?,
        })
    }
}

impl Drop for SavedTerminal {
    fn drop(&mut self) {
        // From the background it would stop this process; the shell has set its own mode then.
        if kind(&self.terminal) == Kind::Foreground {
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.settings);
        }
    }
}

/// A terminal in raw mode until this is dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes `fd` raw, but for line ends in the output, which other messages rely on.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        let terminal = rustix::io::fcntl_dupfd_cloexec(&fd, 0)?;
        let settings = tcgetattr(&terminal)?;
        let mut raw = settings.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        sigbus::before_exit(restore_in_signal);
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        // The first settings are the ones to go back to.
        saved.get_or_insert((terminal, settings));
        Ok(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// What a descriptor is to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No terminal.
    Other,
    /// The terminal, and this process is in its foreground.
    Foreground,
    /// A terminal that stops this process if it reads from it or changes it.
    Background,
}

/// Finds out what `fd` is.
pub fn kind(fd: impl AsFd) -> Kind {
    if !isatty(&fd) {
        return Kind::Other;
    }
    match tcgetpgrp(&fd) {
        Ok(group) if group != getpgrp() => Kind::Background,
        // A terminal that is not the controlling one does not stop anybody.
        _ => Kind::Foreground,
    }
}
