#![forbid(unsafe_code)]
//! What clones take of this host's memory, measured in passing.

use std::time::{Duration, Instant};

use crate::observe::memory::ProcessMemory;
use crate::observe::metrics;

/// How often clones are measured.
const PERIOD: Duration = Duration::from_secs(1);
/// Most clones that are measured at a time; the others have their turn later.
const CLONES_AT_ONCE: usize = 64;
/// How long measuring may take at a time. The kernel walks the page tables of each process, which
/// takes a millisecond for each few hundred MiB.
const TIME_AT_ONCE: Duration = Duration::from_millis(20);
/// Measuring rests this many times as long as it took: it takes a twentieth of a thread at most,
/// however big the clones are.
const REST: u32 = 20;

/// What all clones of a template take, as last measured.
#[derive(Debug, Default)]
pub(super) struct Usage {
    clones: Vec<ProcessMemory>,
    /// Whose turn it is.
    next: usize,
    not_before: Option<Instant>,
}

impl Usage {
    /// Measures some clones if it is time; `pid` gives the process of each that lives.
    pub(super) fn measure(
        &mut self,
        template: &str,
        clones: usize,
        pid: impl Fn(usize) -> Option<u32>,
    ) {
        let start = Instant::now();
        if clones == 0 || self.not_before.is_some_and(|time| start < time) {
            return;
        }
        self.clones.resize(clones, ProcessMemory::default());
        let mut measured = 0;
        for _ in 0..clones {
            if measured == CLONES_AT_ONCE || start.elapsed() >= TIME_AT_ONCE {
                break;
            }
            self.next %= clones;
            let memory = pid(self.next).map(|pid| {
                measured += 1;
                ProcessMemory::of(pid).unwrap_or_default()
            });
            self.clones[self.next] = memory.unwrap_or_default();
            self.next += 1;
        }
        self.publish(template);
        self.not_before = Some(Instant::now() + PERIOD.max(start.elapsed() * REST));
    }

    /// A clone has ended and takes nothing any more.
    pub(super) fn forget(&mut self, template: &str, clone: usize) {
        if let Some(memory) = self.clones.get_mut(clone) {
            *memory = ProcessMemory::default();
            self.publish(template);
        }
    }

    fn publish(&self, template: &str) {
        let sum = |of: fn(&ProcessMemory) -> u64| self.clones.iter().map(of).sum();
        metrics::set_memory(template, "private_dirty", sum(|m| m.private_dirty_bytes));
        metrics::set_memory(template, "private_clean", sum(|m| m.private_clean_bytes));
        metrics::set_memory(template, "shared", sum(|m| m.shared_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_measured_in_turn_and_forgotten_when_they_end() {
        let mut usage = Usage::default();
        let this = std::process::id();
        usage.measure("t", CLONES_AT_ONCE * 3, |_| Some(this));
        let measured = |usage: &Usage| {
            let used = |memory: &&ProcessMemory| memory.private_dirty_bytes > 0;
            usage.clones.iter().filter(used).count()
        };
        let first = measured(&usage);
        assert!((1..=CLONES_AT_ONCE).contains(&first), "{first}");
        usage.measure("t", CLONES_AT_ONCE * 3, |_| Some(this));
        assert_eq!(measured(&usage), first, "it rests");
        usage.not_before = None;
        usage.measure("t", CLONES_AT_ONCE * 3, |_| Some(this));
        assert!(measured(&usage) > first, "others have their turn");
        for clone in 0..CLONES_AT_ONCE * 3 {
            usage.forget("t", clone);
        }
        assert_eq!(measured(&usage), 0);
    }
}
