#![forbid(unsafe_code)]
//! The end of a root.

use crate::clone::supervise::Supervisor;
use crate::observe::metrics;

impl Supervisor {
    pub(super) fn drop_root(&mut self) {
        if let Some(root) = self.forks.root.take() {
            let _ = rustix::event::epoll::delete(&self.epoll, root.channel());
            // One whose disk does not answer may take long to end: clones do not wait for that.
            if !self.forks.is_ended {
                self.end_shell(root.into_process());
            }
        }
        self.forks.is_ready = false;
        self.forks.filled = None;
        metrics::set_root_memory(&self.options.name, 0);
    }
}
