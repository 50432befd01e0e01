#![forbid(unsafe_code)]
//! A root process as its supervisor sees it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use super::protocol::{FromRoot, RangeFaults, RootConfig, ToRoot};
use crate::clone::control::{Channel, ControlError};
use crate::clone::process::{ChildProcess, SpawnError};

/// The hidden subcommand that a root runs.
pub const ROOT_COMMAND: &str = "root-worker";

/// A root that was started; dropping it ends it, and leaves its clones alone.
#[derive(Debug)]
pub struct RootProcess {
    process: ChildProcess,
    channel: Channel,
}

impl RootProcess {
    /// Starts `program` as a root. Must be called on a thread that lives as long as the root.
    pub fn start(program: &Path, config: RootConfig) -> Result<Self, SpawnError> {
        let (channel, theirs) = Channel::pair()?;
        channel.send(&ToRoot::Start(config), &[])?;
        let mut command = Command::new(program);
        command
            .arg(ROOT_COMMAND)
            // One heap for all threads of a clone: each more would be mapped, cut to size and faulted
            // in on the way to the guest's first instruction. Its threads hardly allocate. And what was
            // large is unmapped when it is freed, not kept in the heap for each fork to copy.
            .env(
                "GLIBC_TUNABLES",
                "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=1048576",
            )
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null());
        let process = ChildProcess::spawn(&mut command)?;
        Ok(Self { process, channel })
    }

    /// Asks for a fork whose control socket is `theirs`, and which begins in `cgroup`, the directory of
    /// one. With `is_wanted` its orders are given as soon as this returns: it makes nothing ahead of
    /// them.
    pub fn fork(
        &self,
        id: u64,
        is_wanted: bool,
        theirs: BorrowedFd<'_>,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<(), ControlError> {
        let descriptors: Vec<_> = [Some(theirs), cgroup].into_iter().flatten().collect();
        self.channel
            .send(&ToRoot::Fork { id, is_wanted }, &descriptors)
    }

    /// Says what clones asked pagers for.
    pub fn note_hole_faults(&self, faults: Vec<RangeFaults>) -> Result<(), ControlError> {
        self.channel.send(&ToRoot::HoleFaults(faults), &[])
    }

    /// The next message; `None` when the root is ending.
    pub fn receive(&self) -> Result<Option<(FromRoot, Vec<OwnedFd>)>, ControlError> {
        self.channel.receive()
    }

    /// Becomes readable when there is a message.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The process, without a word to it any more.
    pub fn into_process(self) -> ChildProcess {
        self.process
    }
}
