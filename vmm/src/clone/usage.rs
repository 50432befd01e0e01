#![forbid(unsafe_code)]
//! What clones take of this host's memory, measured in passing.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Engine;
use super::admit::limits::MemoryLimit;
use super::admit::{AdmitError, admit_one, idle_bytes};
use crate::host::cgroups::Membership;
use crate::observe::memory::available_bytes;
use crate::observe::memory::clone::{CloneMemory, MemoryTotal};
use crate::observe::memory::marginal::{Marginal, MarginalCost};
use crate::observe::memory::ram::MemoryPlace;
use crate::observe::metrics;

/// How often clones are measured.
const PERIOD: Duration = Duration::from_secs(1);
/// How long after a start the host's memory is looked at: that takes as long as a part of a start,
/// so one look serves all starts of a burst.
const SAMPLE_DELAY: Duration = Duration::from_millis(2);
/// Most clones that are measured at a time; the others have their turn later.
const CLONES_AT_ONCE: usize = 64;
/// How long measuring may take at a time. The kernel walks the page tables of each process, which
/// takes a millisecond for each few hundred MiB.
const TIME_AT_ONCE: Duration = Duration::from_millis(20);
/// Measuring rests this many times as long as it took: it takes a twentieth of a thread at most,
/// however big the clones are.
const REST: u32 = 20;

/// What is known of one clone.
#[derive(Debug, Default)]
struct Known {
    /// Where its RAM lies; nothing while it has not started.
    places: Vec<MemoryPlace>,
    /// A pager installs pages of it that it did not write.
    is_paged: bool,
    /// Its own cgroup, if it has one.
    cgroup: Option<PathBuf>,
    is_alive: bool,
    /// What it took when it was measured last.
    memory: Option<CloneMemory>,
}

/// What all clones of a template take, as last measured.
#[derive(Debug, Default)]
pub struct Usage {
    clones: Vec<Known>,
    /// Whose turn it is.
    next: usize,
    not_before: Option<Instant>,
    marginal: Marginal,
    /// What the last starts in a row showed; it stays when they end.
    cost: Option<MarginalCost>,
    /// Processes that are alive, and those of them that run.
    made: u64,
    running: u64,
    /// When the host's memory is looked at next.
    sample_at: Option<Instant>,
    /// Where this process is limited; found out with the first clone.
    membership: OnceCell<Membership>,
    most: MemoryTotal,
}

impl Usage {
    /// What a clone took when it was measured last; `None` if it never was.
    pub fn of(&self, clone: usize) -> Option<&CloneMemory> {
        self.clones.get(clone)?.memory.as_ref()
    }

    /// The sum over clones when most of them were known.
    pub fn most(&self) -> &MemoryTotal {
        &self.most
    }

    /// What one more clone costs, as the last starts in a row showed it.
    pub fn marginal(&self) -> Option<MarginalCost> {
        self.cost
    }

    /// Whether there is memory for one more clone.
    pub(super) fn room_for_one(&self, engine: Engine) -> Result<(), AdmitError> {
        let membership = self.membership.get_or_init(Membership::of_self);
        let each = self
            .cost
            .map_or(idle_bytes(engine), |cost| cost.whole_bytes());
        match MemoryLimit::within(membership) {
            Some(limit) => admit_one(each, &limit),
            None => Ok(()),
        }
    }

    /// A process for a clone has been made.
    pub(super) fn made(&mut self) {
        self.made += 1;
        self.ask_sample();
    }

    fn ask_sample(&mut self) {
        self.sample_at
            .get_or_insert_with(|| Instant::now() + SAMPLE_DELAY);
    }

    /// Looks at the host's memory, if clones came or started since and none is about to.
    pub(super) fn sample_if_due(&mut self) {
        let is_due = self.sample_at.is_some_and(|at| Instant::now() >= at);
        if is_due {
            self.sample_at = None;
            self.sample();
        }
    }

    fn sample(&mut self) {
        if let Some(available) = available_bytes() {
            self.marginal.sample(self.made, self.running, available);
        }
    }

    /// A process that was made is gone, and never was a clone.
    pub(super) fn unmade(&mut self) {
        self.made = self.made.saturating_sub(1);
    }

    /// A clone runs, with its RAM at `places`, which a pager fills or not, and in a cgroup of its own
    /// or none.
    pub(super) fn started(
        &mut self,
        template: &str,
        clone: usize,
        places: Option<Vec<MemoryPlace>>,
        is_paged: bool,
        cgroup: Option<PathBuf>,
    ) {
        if self.clones.len() <= clone {
            self.clones.resize_with(clone + 1, Known::default);
        }
        let Some(places) = places else {
            tracing::warn!(
                clone,
                "its ranges of RAM are not those of the template: its memory is not measured"
            );
            metrics::count_unmeasured(template, "places");
            return;
        };
        self.clones[clone] = Known {
            places,
            is_paged,
            cgroup,
            is_alive: true,
            memory: None,
        };
        self.running += 1;
        self.ask_sample();
        if let Some(cost) = self.marginal.cost() {
            metrics::set_marginal(template, cost.bytes);
            self.cost = Some(cost);
        }
    }

    /// Measures some clones if it is time; `pid` gives the process of each that lives.
    pub(super) fn measure(&mut self, template: &str, pid: impl Fn(usize) -> Option<u32>) {
        let start = Instant::now();
        let clones = self.clones.len();
        if clones == 0 || self.not_before.is_some_and(|time| start < time) {
            return;
        }
        let mut measured = 0;
        for _ in 0..clones {
            if measured == CLONES_AT_ONCE || start.elapsed() >= TIME_AT_ONCE {
                break;
            }
            self.next %= clones;
            let known = &mut self.clones[self.next];
            if let Some(pid) = pid(self.next).filter(|_| known.is_alive) {
                measured += 1;
                match CloneMemory::of(pid, &known.places, known.is_paged, known.cgroup.as_deref()) {
                    Ok(memory) => known.memory = Some(memory),
                    Err(error) => {
                        // Nearly always one that is just ending.
                        tracing::debug!(clone = self.next, %error, "cannot be measured");
                        metrics::count_unmeasured(template, "error");
                    }
                }
            }
            self.next += 1;
        }
        self.publish(template);
        self.not_before = Some(Instant::now() + PERIOD.max(start.elapsed() * REST));
    }

    /// Measures one clone now, whoever's turn it is; `None` when it does not run or cannot be looked at.
    pub(super) fn measure_one(&mut self, clone: usize, pid: u32) -> Option<CloneMemory> {
        let known = self.clones.get_mut(clone).filter(|known| known.is_alive)?;
        let cgroup = known.cgroup.as_deref();
        known.memory = CloneMemory::of(pid, &known.places, known.is_paged, cgroup).ok();
        known.memory
    }

    /// A clone's process has ended and takes nothing any more.
    pub(super) fn ended(&mut self, template: &str, clone: usize) {
        self.made = self.made.saturating_sub(1);
        if let Some(known) = self.clones.get_mut(clone).filter(|known| known.is_alive) {
            known.is_alive = false;
            let was_measured = known.memory.is_some();
            self.running = self.running.saturating_sub(1);
            if was_measured {
                self.publish(template);
            }
        }
    }

    fn publish(&mut self, template: &str) {
        let alive = self.clones.iter().filter(|known| known.is_alive);
        let total = MemoryTotal::of(alive.filter_map(|known| known.memory.as_ref()));
        for (class, bytes) in total.ram.classes() {
            metrics::set_memory(template, class, bytes);
        }
        metrics::set_memory(template, "process_private", total.process_private_bytes);
        metrics::set_memory(template, "process_shared", total.process_shared_bytes);
        metrics::set_memory(template, "page_tables", total.page_tables_bytes);
        // A series that is not there: unknown. Zero would be a claim.
        if let Some(bytes) = total.kernel_bytes {
            metrics::set_memory(template, "kernel", bytes);
        }
        if total.clones >= self.most.clones {
            self.most = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_measured_in_turn_and_keep_their_last_figures() {
        let clones = CLONES_AT_ONCE * 3;
        let mut usage = Usage::default();
        let this = std::process::id();
        usage.measure("t", |_| Some(this));
        for clone in 0..clones {
            usage.made();
            usage.started("t", clone, Some(Vec::new()), true, None);
        }
        let measured = |usage: &Usage| (0..clones).filter(|&c| usage.of(c).is_some()).count();
        usage.measure("t", |_| Some(this));
        let first = measured(&usage);
        assert!((1..=CLONES_AT_ONCE).contains(&first), "{first}");
        usage.measure("t", |_| Some(this));
        assert_eq!(measured(&usage), first, "it rests");
        usage.not_before = None;
        usage.measure("t", |_| Some(this));
        let second = measured(&usage);
        assert!(second > first, "others have their turn");
        for clone in 0..clones {
            usage.ended("t", clone);
            usage.ended("t", clone);
        }
        assert_eq!((usage.made, usage.running), (0, 0));
        assert_eq!(measured(&usage), second, "kept for the report");
        assert_eq!(usage.most().clones, second as u64);
        usage.not_before = None;
        usage.measure("t", |_| Some(this));
        assert_eq!(measured(&usage), second, "the dead are not measured");
    }

    #[test]
    fn what_is_not_proven_is_not_looked_at() {
        let mut usage = Usage::default();
        usage.started("t", 0, None, true, None);
        usage.measure("t", |_| Some(std::process::id()));
        assert!(usage.of(0).is_none());
    }
}
