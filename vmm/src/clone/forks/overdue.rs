#![forbid(unsafe_code)]
//! A root that does not answer: stopped, or hanging.

use std::fs;
use std::time::Duration;

use super::super::supervise::Supervisor;

/// A root forks within milliseconds; one that has not for so long is stopped or hangs.
const FORK_LIMIT: Duration = Duration::from_secs(10);
/// A root that is stopped while it fills its memory is given up after so long ...
const STOPPED_LIMIT: Duration = Duration::from_secs(10);
/// ... and any other after so long: half a terabyte at a gigabyte each second.
const FILL_LIMIT: Duration = Duration::from_secs(500);

impl Supervisor {
    /// Ends a root from which nothing is heard that should be. What was asked of it is asked of the
    /// next one.
    pub(in crate::clone) fn tend_root(&mut self) {
        let Some(pid) = self.forks.root_pid() else {
            return;
        };
        let silent = self.forks.silence.look();
        let why = if !self.forks.is_ready {
            let is_overdue = silent > FILL_LIMIT || (silent > STOPPED_LIMIT && is_stopped(pid));
            is_overdue.then_some("filled its memory")
        } else if self.forks.flying.is_empty() {
            self.forks.silence.heard();
            None
        } else {
            (silent > FORK_LIMIT).then_some("forked")
        };
        if let Some(undone) = why {
            self.lose_root(&format!(
                "process {pid} has not {undone} within {} s (is it stopped?), so it was ended",
                silent.as_secs()
            ));
        }
    }
}

/// Whether a signal has stopped it (proc(5), `stat`).
fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    state.starts_with(['T', 't'])
}
