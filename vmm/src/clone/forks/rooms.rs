#![forbid(unsafe_code)]
//! Room for the descriptors of processes that a root forks. Without room the kernel drops what comes
//! beside a message: the fork would be a process that nobody can watch, or wait for.

use std::os::fd::OwnedFd;

use crate::clone::supervise::Supervisor;
use crate::root::protocol::FromRoot;

impl Supervisor {
    /// A descriptor that is closed when that of a fork is to come; what to say when there is none left.
    pub(super) fn room_for_a_process(&self) -> Result<OwnedFd, String> {
        rustix::io::fcntl_dupfd_cloexec(&self.epoll, 0)
            .map_err(|errno| format!("no descriptor is left for its process: {errno}"))
    }

    /// A message has come that room was made for: where it is not the end of a fork, the room is taken
    /// again.
    pub(super) fn keep_room(&mut self, message: &FromRoot) {
        let has_landed = matches!(
            message,
            FromRoot::Forked { .. } | FromRoot::NotForked { .. }
        );
        if !has_landed && self.forks.rooms.len() < self.forks.flying.len() {
            self.forks.rooms.extend(self.room_for_a_process());
        }
    }
}
