#![forbid(unsafe_code)]
//! The end of a root, and of whatever else was killed.

use std::thread;
use std::time::{Duration, Instant};

use crate::clone::supervise::Supervisor;
use crate::observe::metrics;

/// How long is waited at the end for processes that were killed.
const DYING_LIMIT: Duration = Duration::from_secs(2);

impl Supervisor {
    pub(super) fn drop_root(&mut self) {
        if let Some(root) = self.forks.root.take() {
            let _ = rustix::event::epoll::delete(&self.epoll, root.channel());
            // One whose disk does not answer may take long to end: nobody waits for that.
            self.end_shell(root.into_process());
        }
        self.forks.is_ready = false;
        self.forks.filled = None;
        metrics::set_root_memory(&self.options.name, 0);
    }

    /// Takes the ends of what was killed; leaves what has not ended soon.
    pub(in crate::clone) fn leave_dying(&mut self) {
        let deadline = Instant::now() + DYING_LIMIT;
        self.reap_shells();
        while !self.forks.dying.is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            self.reap_shells();
        }
        for process in self.forks.dying.drain(..) {
            let pid = process.pid();
            tracing::warn!(pid, "a process was killed and has not ended: it is left");
            process.leave();
        }
    }
}
