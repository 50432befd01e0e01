//! Clones: a template and fresh memory joined to a machine that runs, each in a process of its own.
//!
//! ```text
//! supervisor (one process)                     worker (one process a clone)
//!   Supervisor::start --- Start, serial fd --->  Template::open
//!                                                pager serving, GuestRam
//!                                                Machine::restore, resume
//!   Event::Started   <--- Started, stages -----
//!   PagerStats       <--- Metrics, each second -
//!   Event::Ended     <--- Ended ---------------  power-off, reset, stop or failure
//! ```
//!
//! A clone whose supervisor dies ends with it, and one that dies takes nobody along.

pub mod admit;
mod attend;
pub mod brought;
mod bury;
pub mod cgroup;
pub mod channel;
pub mod closing;
pub mod consoles;
pub mod control;
pub mod forked;
mod forks;
pub mod give_back;
mod hear;
mod hole_faults;
pub mod instantiate;
pub mod learn;
pub mod marks;
pub mod member;
pub mod nets;
pub mod paging;
pub mod placement;
pub mod pool;
pub mod process;
pub mod record;
mod resources;
pub mod root_care;
pub mod sight;
mod silence;
pub mod supervise;
#[cfg(test)]
mod testing;
mod token;
pub mod usage;
pub mod vsock;
pub mod warm;
pub mod worker;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Signals that end a supervisor, its clones and a demonstration in order: interrupt and quit from
/// a terminal, its loss, and the request to end.
pub const END_SIGNALS: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// Where a clone's memory comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Anonymous memory; the pager installs every page. Nothing is shared with other clones.
    #[default]
    Copy,
    /// A fork of the template's root process: what the root holds is shared copy-on-write, the
    /// pager process brings the rest.
    Root,
    /// A private mapping of the file: no pager. The baseline.
    Kernel,
}

impl Engine {
    /// All engines, the default first.
    pub const ALL: [Self; 3] = [Self::Copy, Self::Root, Self::Kernel];

    /// Its name on the command line and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Root => "root",
            Self::Kernel => "kernel",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|engine| engine.name() == text)
            .ok_or_else(|| format!("'{text}' is no engine: the engines are copy, root and kernel"))
    }
}
