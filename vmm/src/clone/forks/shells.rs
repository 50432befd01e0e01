#![forbid(unsafe_code)]
//! Single shells, as others than the pool see them.

use std::os::fd::{AsFd, BorrowedFd};

use super::{Forks, Shell};
use crate::clone::paging::Owner;
use crate::clone::supervise::Supervisor;

impl Forks {
    fn shell(&self, id: u64) -> Option<&Shell> {
        self.shells.iter().find(|shell| shell.id == id)
    }

    /// Becomes readable when the shell's process ends.
    pub(in crate::clone) fn shell_pidfd(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.shell(id).map(|shell| shell.process.as_fd())
    }

    /// The number of the shell's process.
    pub(in crate::clone) fn shell_pid(&self, id: u64) -> Option<u32> {
        self.shell(id).map(|shell| shell.process.pid())
    }

    /// Ends a shell; it is taken leave of when its end is heard of.
    pub(in crate::clone) fn kill_shell(&self, id: u64) {
        if let Some(shell) = self.shell(id) {
            shell.process.kill();
        }
    }
}

impl Supervisor {
    /// A shell did not become clone `number`: nothing of it is left, whichever of both the pager
    /// knows it as.
    pub(super) fn forget_shell(&mut self, id: u64, number: usize, why: &str) {
        tracing::warn!(shell = id, "a shell could not be used: {why}");
        self.paging.forget(Owner::Shell(id));
        self.paging.forget(Owner::Clone(number));
        self.usage.unmade();
        self.publish_counts();
    }
}
