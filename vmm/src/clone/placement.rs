#![forbid(unsafe_code)]
//! Keeps a clone's vCPU and its pager on one CPU while pages come in.
//!
//! A fault is a hand-over from the vCPU's thread to the pager's and back. On one CPU that is a
//! switch; over two it is an interrupt to a halted CPU each way, up to ten times the page's copy,
//! and that is what the scheduler chooses when another CPU is idle. A guest of one vCPU cannot use
//! a second CPU anyway. Pages come in mostly at the start: once they do not, the clone may run
//! wherever the scheduler likes, until they come again.

use std::fs;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// A clone with at least this many faults in a period is kept on one CPU for the next.
const MANY_FAULTS: u64 = 1000;
/// A clone with fewer faults than this in a period is let go.
const FEW_FAULTS: u64 = 100;

/// Where the threads of this process may run.
#[derive(Debug)]
pub struct Placement {
    /// What it was given by whoever started it.
    allowed: CpuSet,
    cpu: usize,
    is_together: bool,
    faults: u64,
}

impl Placement {
    /// Keeps this thread, and those that it starts from now on, on the CPU where the scheduler put
    /// it. `None` where that is refused: then nothing is changed.
    pub fn together() -> Option<Self> {
        let allowed = sched_getaffinity(None).ok()?;
        let cpu = sched_getcpu();
        sched_setaffinity(None, &one_cpu(cpu)).ok()?;
        Some(Self {
            allowed,
            cpu,
            is_together: true,
            faults: 0,
        })
    }

    /// The CPU on which the clone began: a pager process serves it there.
    pub fn cpu(&self) -> Option<u32> {
        u32::try_from(self.cpu).ok()
    }

    /// The same with a pager process, whose faults this one does not see: by how many pages have
    /// come to be resident.
    pub fn review_pages(&mut self) {
        if let Some(pages) = resident_pages() {
            let cpu = self.cpu;
            self.decide(pages, || cpu);
        }
    }

    /// Looks at how many faults the pager has had in all, once a period.
    pub fn review(&mut self, faults: u64) {
        self.decide(faults, sched_getcpu);
    }

    fn decide(&mut self, faults: u64, cpu: impl FnOnce() -> usize) {
        let recent = faults.saturating_sub(self.faults);
        self.faults = faults;
        if self.is_together && recent < FEW_FAULTS {
            self.is_together = false;
            move_all_threads(&self.allowed);
        } else if !self.is_together && recent >= MANY_FAULTS {
            self.is_together = true;
            move_all_threads(&one_cpu(cpu()));
        }
    }
}

/// Pages of this process that are in memory (proc(5), `statm`).
pub(super) fn resident_pages() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    text.split_whitespace().nth(1)?.parse().ok()
}

fn one_cpu(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

/// A thread that is gone meanwhile needs no place, and one that cannot be moved stays.
fn move_all_threads(cpus: &CpuSet) {
    let threads = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    for thread in threads {
        let number = thread
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(thread) = number.and_then(Pid::from_raw) {
            let _ = sched_setaffinity(Some(thread), cpus);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own, whose affinity nobody else has. Moving all threads of a test
    /// process would disturb its neighbours by no more than their place.
    #[test]
    fn threads_are_together_while_pages_come_and_apart_when_they_do_not() {
        let cpus = || sched_getaffinity(None).unwrap().count();
        std::thread::spawn(move || {
            let before = cpus();
            let mut placement = Placement::together().unwrap();
            assert_eq!(cpus(), 1);
            placement.review(5000);
            assert_eq!(cpus(), 1);
            placement.review(5000 + FEW_FAULTS - 1);
            assert_eq!(cpus(), before);
            placement.review(9000);
            assert_eq!(cpus(), 1);
            placement.review(9000);
            assert_eq!(cpus(), before);
        })
        .join()
        .unwrap();
    }
}
