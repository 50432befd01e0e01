#![forbid(unsafe_code)]
//! A clone as its supervisor knows it, and what clones have in common.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::Engine;
use super::control::{Ending, PagerConfig};
use super::pool::PoolLimits;
use super::process::{CloneProcess, SerialPlan};
use super::supervise::Supervisor;
use crate::console::GuestConsole;
use crate::device::legacy::console::SavedTerminal;
use crate::machine::HostCheck;
use crate::observe::relay::Series;

/// What clones have in common.
#[derive(Debug, Clone)]
pub struct CloneOptions {
    /// The `pando` program.
    pub program: PathBuf,
    /// The template's directory.
    pub template: PathBuf,
    /// The template's name in metrics.
    pub name: String,
    /// Where memory comes from.
    pub engine: Engine,
    /// How pagers work.
    pub pager: PagerConfig,
    /// How much clones log, as many as the `-v` of this program.
    pub verbosity: u8,
    /// Whether the clones' memory is measured for the metrics while they run.
    pub measure_memory: bool,
    /// Whether clones are started although they do not fit by arithmetic.
    pub overcommit: bool,
    /// Whether the host was compared with the template; each clone does it otherwise.
    pub host_check: HostCheck,
    /// What only engine `root` needs to know.
    pub root: RootOptions,
}

/// How engine `root` works.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RootOptions {
    /// Most bytes of guest memory that the root fills; `None` for half of what the host has free.
    pub budget_bytes: Option<u64>,
    /// How many shells wait for clones to be asked for.
    pub shells: PoolLimits,
    /// How long the root may owe an answer before it is replaced; `None` for
    /// [`FORK_DEADLINE`](super::root_care::FORK_DEADLINE).
    pub fork_deadline: Option<Duration>,
}

/// What happened to a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It runs.
    Started(usize),
    /// Its console, which the supervisor holds, has something to read or is closed.
    Output(usize),
    /// It ended; its [`Clone::ending`] says how.
    Ended(usize),
    /// One of [`END_SIGNALS`](super::END_SIGNALS) came.
    Signal,
}

/// What a clone gave back to the host in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GivenBack {
    /// Guest memory, counted each time that it went.
    pub bytes: u64,
    /// How often its guest was paused for that.
    pub pauses: u64,
}

impl GivenBack {
    /// Adds what a clone says that it gave; it may claim anything.
    pub(super) fn add(&mut self, bytes: u64, pauses: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.pauses = self.pauses.saturating_add(pauses);
    }
}

impl Supervisor {
    /// What all clones gave back to the host while they were idle.
    pub fn given_back(&self) -> GivenBack {
        let mut all = GivenBack::default();
        for clone in &self.clones {
            all.add(clone.given_back.bytes, clone.given_back.pauses);
        }
        all
    }
}

/// One clone.
#[derive(Debug)]
pub struct Clone {
    /// Its process, until it ended.
    pub process: Option<CloneProcess>,
    /// Its COM1, if the supervisor holds it; outlives the process by what it said last.
    pub console: Option<GuestConsole>,
    /// Its process number, also after it ended; 0 if it never had one.
    pub pid: u32,
    /// From the request until the guest ran.
    pub running: Option<Duration>,
    /// From the request until the guest's first output, where the supervisor holds the console.
    pub first_output: Option<Duration>,
    /// Duration of each stage of the start.
    pub stages: Vec<(String, Duration)>,
    /// How its pager reads.
    pub io: String,
    /// How it ended.
    pub ending: Option<Ending>,
    /// What it gave back to the host while it was idle.
    pub given_back: GivenBack,
    pub(super) gauges: HashMap<Series, f64>,
    /// Gives the terminal back when the clone has ended, however it did.
    pub(super) terminal: Option<SavedTerminal>,
    /// Whether the supervisor ended it for its [`Self::ending`].
    pub(super) is_condemned: bool,
    /// Its socket, if COM1 goes to one: a worker that is killed cannot remove it.
    pub(super) socket: Option<PathBuf>,
}

impl Clone {
    /// A clone whose process is to come.
    pub(super) fn new(serial: &SerialPlan, terminal: Option<SavedTerminal>) -> Self {
        Self {
            process: None,
            console: None,
            pid: 0,
            running: None,
            first_output: None,
            stages: Vec::new(),
            io: String::new(),
            ending: None,
            given_back: GivenBack::default(),
            gauges: HashMap::new(),
            terminal,
            is_condemned: false,
            socket: match serial {
                SerialPlan::Unix(path) => Some(path.clone()),
                SerialPlan::Null | SerialPlan::Supervisor | SerialPlan::Terminal => None,
            },
        }
    }

    /// A clone that never came to have a process.
    pub(super) fn failed(ending: Ending) -> Self {
        Self {
            ending: Some(ending),
            ..Self::new(&SerialPlan::Null, None)
        }
    }

    /// Whether it has a process, or will have one.
    pub fn is_live(&self) -> bool {
        self.process.is_some() || self.ending.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_claim_goes_beyond_what_a_number_holds() {
        let mut all = GivenBack::default();
        all.add(u64::MAX, u64::MAX);
        all.add(1, 1);
        assert_eq!((all.bytes, all.pauses), (u64::MAX, u64::MAX));
    }
}
