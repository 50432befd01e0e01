#![forbid(unsafe_code)]
//! What the supervisor does about memory and cgroups of its clones.

use super::cgroup::{CloneGroup, CloneGroups};
use super::control::Ending;
use super::member::{Clone, Event};
use super::supervise::Supervisor;
use super::usage::Usage;
use crate::observe::memory::clone::CloneMemory;
use crate::observe::metrics;
use crate::report::{chain, exit};

impl Supervisor {
    /// What the clones take of this host's memory.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Measures one clone now; `None` when it does not run or cannot be looked at. It walks the page
    /// tables of the clone, which takes a millisecond for each few hundred MiB.
    pub fn measure_clone(&mut self, number: usize) -> Option<CloneMemory> {
        let pid = self.clones.get(number)?.process.as_ref()?.pid();
        self.usage.measure_one(number, pid)
    }

    /// Starts clones in cgroups of their own from now on.
    pub fn use_cgroups(&mut self, groups: CloneGroups) {
        self.groups = Some(groups);
    }

    /// Whether the kernel's memory of each clone is known, and why not.
    pub fn kernel_accounting(&self) -> Result<(), &str> {
        match &self.groups {
            Some(groups) => groups.accounting(),
            None => Err("clones have no cgroups of their own (--cgroups)"),
        }
    }

    /// A cgroup for one more clone, if clones have some. One that cannot be had is no reason to fail.
    pub(super) fn new_group(&mut self) -> Option<CloneGroup> {
        let made = self.groups.as_mut()?.create();
        made.inspect_err(|error| tracing::warn!("{}", chain(error)))
            .ok()
    }

    /// A clone that has failed, if there is no memory for it.
    pub(super) fn refuse_without_room(&mut self, number: usize) -> Option<Clone> {
        if self.options.overcommit {
            return None;
        }
        let error = self.usage.room_for_one(self.options.engine).err()?;
        metrics::count_failure(&self.options.name);
        self.pending.push(Event::Ended(number));
        Some(Clone::failed(Ending::Failed {
            code: exit::FAILED,
            message: chain(&error),
        }))
    }
}
