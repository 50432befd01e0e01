#![forbid(unsafe_code)]
//! A VM that is neither template nor clone: boot, run, end.

use std::fs;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use pando_pager::{Pager, PagerError, PagerOptions, Serving};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

use crate::arch::x86_64::boot::BootSource;
use crate::device::legacy::console::{ParseTargetError, SerialTarget};
use crate::machine::{Connections, Failure, Machine, MachineError, Outcome};
use crate::memory::provide::{MachineMemory, ProvideError, provide};
use crate::spec::MachineSpec;

/// Why a VM did not run or did not end well.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// Where COM1 was to go.
    #[error("--serial cannot be used")]
    Serial(#[from] ParseTargetError),
    /// The guest's RAM.
    #[error("cannot give the VM its memory")]
    Memory(#[from] ProvideError),
    /// Pages that could not be read from a backend's file.
    #[error("guest memory could not be read: {what}")]
    MemoryLost {
        /// Which, and why.
        what: String,
    },
    /// The pager.
    #[error("the pager of the VM's memory failed")]
    Pager(#[from] PagerError),
    /// The machine.
    #[error("the VM cannot start")]
    Machine(#[from] MachineError),
    /// Signals cannot be watched.
    #[error("cannot watch for signals")]
    Signals(#[from] io::Error),
    /// The thread that waits for signals.
    #[error(
        "cannot start the thread that waits for signals: is the limit of processes (ulimit -u, \
         pids.max) reached?"
    )]
    Thread(#[source] io::Error),
    /// The guest failed.
    #[error("the VM failed: {0}")]
    Failed(Failure),
}

/// The template that the pager of such a VM names in its metrics.
const NO_TEMPLATE: &str = "none";

/// Boots a machine on the memory that its backends describe and runs it until its guest powers off,
/// asks for a reset, fails, or a signal comes. `on_pty` gets the terminal to open when COM1 goes to a
/// new one.
pub fn run(
    spec: &MachineSpec,
    boot: &BootSource,
    serial: &str,
    on_pty: &mut dyn FnMut(&Path),
) -> Result<Outcome, LaunchError> {
    let serial: SerialTarget = serial.parse()?;
    let options = PagerOptions {
        template: NO_TEMPLATE.to_owned(),
        ..PagerOptions::default()
    };
    let MachineMemory { ram, pager, files } = provide(spec, options)?;
    let connections = Connections::open(spec, serial)?;
    let machine = Machine::boot(spec, ram, boot, connections)?;
    let health = pager.as_ref().map(Pager::<Serving>::health);
    if let Some(health) = &health {
        // Before a vCPU can touch a page that cannot be had.
        let (on_poison, on_failure) = (machine.handle(), machine.handle());
        health.set_on_poison(Box::new(move |page| on_poison.stop(page.to_string())));
        health.set_on_failure(Box::new(move |why| on_failure.stop(why)));
    }
    let machine = machine.resume()?;
    let handle = machine.handle();
    let (mut signals, end) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // As `nohup` asks.
        if signal == SIGHUP && is_ignored(signal) {
            continue;
        }
        signal_hook::low_level::pipe::register(signal, end.try_clone()?)?;
    }
    // Ends with the process: it waits for a signal, which need never come.
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.read(&mut [0]).is_ok() {
                handle.stop("a signal asked for it");
            }
        })
        .map_err(LaunchError::Thread)?;
    if let Some(pty) = machine.pty_path() {
        on_pty(pty);
    }
    let outcome = machine.wait();
    let lost = health.and_then(|health| health.poisoned().into_iter().next());
    if let Some(pager) = pager {
        pager.stop()?;
    }
    drop(files);
    match (lost, outcome) {
        (Some(page), _) => Err(LaunchError::MemoryLost {
            what: page.to_string(),
        }),
        (None, Outcome::Failed(failure)) => Err(LaunchError::Failed(failure)),
        (None, outcome) => Ok(outcome),
    }
}

/// Whether this process ignores a signal, as far as the kernel tells.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
