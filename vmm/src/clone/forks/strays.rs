#![forbid(unsafe_code)]
//! Forks of a root that died before it had named them. They end by themselves, for their control
//! socket is closed; but they are children of this process, and nobody else takes their exit status.

use std::collections::HashSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, waitpid};

use crate::clone::process::CloneProcess;
use crate::clone::supervise::Supervisor;

/// The first look comes so long after the root is missed; each further one takes twice as long ...
const FIRST_LOOK: Duration = Duration::from_millis(20);
/// ... and after so many there are no more: a fork that was not named ends at once.
const LOOKS: u32 = 9;
/// The last look takes at most so long ...
const LAST_LOOK: Duration = Duration::from_secs(1);
/// ... in steps of this.
const PAUSE: Duration = Duration::from_millis(2);

/// When to look for them.
#[derive(Debug, Default)]
pub(super) struct Strays {
    next: Option<Instant>,
    looks: u32,
}

impl Strays {
    /// Some may have been made.
    pub(super) fn expect(&mut self) {
        self.looks = 0;
        self.next = Some(Instant::now() + FIRST_LOOK);
    }

    /// Whether it is time to look.
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        if self.next.is_none_or(|next| now < next) {
            return false;
        }
        self.looks += 1;
        self.next = (self.looks < LOOKS).then(|| now + FIRST_LOOK * (1 << self.looks));
        true
    }
}

impl Supervisor {
    /// Takes the exit status of forks that have no name here.
    pub(in crate::clone) fn take_strays(&mut self) {
        if self.forks.strays.is_due() {
            self.take_dead_strays();
        }
    }

    /// The same at the end, when there will be no other look: waits for those that have not ended.
    pub(in crate::clone) fn take_last_strays(&mut self) {
        let deadline = Instant::now() + LAST_LOOK;
        let is_due = self.forks.strays.next.take().is_some();
        while is_due && self.take_dead_strays() > 0 && Instant::now() < deadline {
            thread::sleep(PAUSE);
        }
    }

    /// Returns how many have not ended.
    fn take_dead_strays(&mut self) -> usize {
        let clones = self
            .clones
            .iter()
            .filter_map(|clone| clone.process.as_ref());
        let mut known: HashSet<u32> = clones.map(CloneProcess::pid).collect();
        known.extend(self.forks.shells.iter().map(|shell| shell.process.pid()));
        known.extend(self.forks.root_pid());
        let program = self.options.program.file_name();
        let name = program.map(|name| name.to_string_lossy().into_owned());
        let mut alive = 0;
        for (pid, is_dead) in children(&name.unwrap_or_default()) {
            if known.contains(&pid) {
                continue;
            }
            if !is_dead {
                alive += 1;
                continue;
            }
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid
                && let Ok(Some(_)) = waitpid(Some(pid), WaitOptions::NOHANG)
            {
                tracing::debug!(pid = pid.as_raw_nonzero(), "took a fork of a lost root");
            }
        }
        alive
    }
}

/// Children of this process of that name, and whether each has ended and waits to be taken.
fn children(name: &str) -> Vec<(u32, bool)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let numbers = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let of_child = |number: u32| {
        let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
        Some((number, is_dead_child(&stat, name, std::process::id())?))
    };
    numbers.filter_map(of_child).collect()
}

/// Whether the child of `parent` of that name that a line of `/proc/PID/stat` (proc(5)) is of is a
/// zombie; `None` for all others. The kernel keeps fifteen bytes of a name.
fn is_dead_child(stat: &str, name: &str, parent: u32) -> Option<bool> {
    let parts = stat.rsplit_once(") ").and_then(|(before, after)| {
        let (_, found) = before.split_once('(')?;
        let mut fields = after.split(' ');
        Some((found, fields.next()?, fields.next()?.parse::<u32>().ok()?))
    });
    let (found, state, its_parent) = parts?;
    let is_child = !found.is_empty() && name.starts_with(found) && its_parent == parent;
    is_child.then_some(state == "Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_children_of_the_name_are_strays() {
        let is_dead = |stat| is_dead_child(stat, "pando", 7);
        assert_eq!(is_dead("12 (pando) Z 7 12 12 0"), Some(true));
        assert_eq!(is_dead("12 (pando) S 7 12 12 0"), Some(false));
        let long = "12 (a-long-name-of-) Z 7 1";
        assert_eq!(is_dead_child(long, "a-long-name-of-mine", 7), Some(true));
        for other in [
            "12 (pando) Z 8 12 12 0",
            "12 (sleep) Z 7 12 12 0",
            "12 () Z 7 12",
            "",
        ] {
            assert_eq!(is_dead(other), None, "{other}");
        }
    }

    #[test]
    fn looking_ends() {
        let mut strays = Strays::default();
        assert!(!strays.is_due());
        strays.expect();
        assert!(!strays.is_due(), "not at once");
        for _ in 0..LOOKS {
            strays.next = strays.next.map(|_| Instant::now());
            assert!(strays.is_due());
        }
        assert!(!strays.is_due() && strays.next.is_none());
    }
}
