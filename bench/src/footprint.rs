#![forbid(unsafe_code)]
//! What this process and its children hold of the host, to see that all of it is given back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pando_vmm::host::cgroups::Membership;
use rustix::process::{Pid, getpid, set_child_subreaper};
use serde::Serialize;

use crate::host::settled_memory_bytes;
use crate::report::size;

/// How long the kernel may take to be done with what has ended.
const PATIENCE: Duration = Duration::from_secs(20);
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// What is held at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Footprint {
    available_bytes: u64,
    held: Held,
}

#[derive(Debug, Clone, Default)]
struct Held {
    /// Children and what they have started, dead ones that nobody waited for included.
    processes: BTreeMap<u32, String>,
    descriptors: BTreeMap<u32, String>,
    cgroups: BTreeSet<PathBuf>,
}

/// What was not given back.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Left {
    /// Processes, by number and name.
    pub(crate) processes: Vec<String>,
    /// Descriptors of this process, by number and what they are.
    pub(crate) descriptors: Vec<String>,
    /// Cgroups below this process's.
    pub(crate) cgroups: Vec<String>,
    /// By how much less memory is available than before; below zero if it is more. Others on the
    /// host move it too.
    pub(crate) memory_bytes: i64,
}

/// From now on processes whose parent ends become children of this one, so that none is overlooked.
pub(crate) fn adopt_orphans() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("cannot take orphaned processes for children")
}

impl Footprint {
    /// Looks, once memory has settled.
    pub(crate) fn take() -> Result<Self> {
        Ok(Self {
            available_bytes: settled_memory_bytes()?,
            held: Held::now(std::process::id())?,
        })
    }

    /// Memory that was available.
    pub(crate) fn available_bytes(&self) -> u64 {
        self.available_bytes
    }

    /// What is held now and was not held then. The kernel gets some time to finish.
    pub(crate) fn left(&self) -> Result<Left> {
        let begun = Instant::now();
        let mut left = self.difference(&Held::now(std::process::id())?);
        while !left.is_nothing() && begun.elapsed() < PATIENCE {
            std::thread::sleep(BETWEEN_LOOKS);
            left = self.difference(&Held::now(std::process::id())?);
        }
        let available = settled_memory_bytes()?;
        left.memory_bytes = i64::try_from(self.available_bytes).unwrap_or(i64::MAX)
            - i64::try_from(available).unwrap_or(i64::MAX);
        Ok(left)
    }

    fn difference(&self, now: &Held) -> Left {
        let numbered = |then: &BTreeMap<u32, String>, now: &BTreeMap<u32, String>| {
            now.iter()
                .filter(|(number, what)| then.get(number) != Some(what))
                .map(|(number, what)| format!("{number} {what}"))
                .collect()
        };
        let new_cgroups = now.cgroups.difference(&self.held.cgroups);
        Left {
            processes: numbered(&self.held.processes, &now.processes),
            descriptors: numbered(&self.held.descriptors, &now.descriptors),
            cgroups: new_cgroups.map(|dir| dir.display().to_string()).collect(),
            memory_bytes: 0,
        }
    }
}

impl Left {
    /// Whether nothing is left but, maybe, memory.
    pub(crate) fn is_nothing(&self) -> bool {
        self.processes.is_empty() && self.descriptors.is_empty() && self.cgroups.is_empty()
    }

    /// One line for each thing that is left.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let named = |what: &str, list: &[String]| -> Vec<String> {
            list.iter()
                .map(|one| format!("{what} {one} is left"))
                .collect()
        };
        let mut all = named("process", &self.processes);
        all.extend(named("descriptor", &self.descriptors));
        all.extend(named("cgroup", &self.cgroups));
        all
    }

    /// A line for people.
    pub(crate) fn summary(&self) -> String {
        format!(
            "left: {} processes, {} descriptors, {} cgroups, {} of memory",
            self.processes.len(),
            self.descriptors.len(),
            self.cgroups.len(),
            size(self.memory_bytes as f64)
        )
    }
}

impl Held {
    fn now(pid: u32) -> Result<Self> {
        Ok(Self {
            processes: descendants(pid)?,
            descriptors: descriptors()?,
            cgroups: cgroups(),
        })
    }
}

/// Children, grandchildren and so on of `pid`, and their names.
pub(crate) fn descendants(pid: u32) -> Result<BTreeMap<u32, String>> {
    let mut parents: Vec<(u32, u32, String)> = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let name = entry.context("cannot list /proc")?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that has ended meanwhile is none.
        let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        parents.extend(parent_and_name(&stat).map(|(parent, name)| (number, parent, name)));
    }
    let mut found: BTreeMap<u32, String> = BTreeMap::new();
    loop {
        let before = found.len();
        for (number, parent, name) in &parents {
            if *parent == pid || found.contains_key(parent) {
                found.insert(*number, name.clone());
            }
        }
        if found.len() == before {
            return Ok(found);
        }
    }
}

/// The parent's number and the name with the state, of a line of `/proc/PID/stat` (proc(5)).
fn parent_and_name(stat: &str) -> Option<(u32, String)> {
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1;
    let mut fields = after.split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    Some((parent, format!("({name}, {state})")))
}

fn descriptors() -> Result<BTreeMap<u32, String>> {
    const OWN: &str = "/proc/self/fd";
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(OWN).context("cannot list descriptors")? {
        let entry = entry.context("cannot list descriptors")?;
        // The descriptor that this list is read by is closed when we look what it is.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number.filter(|_| !target.starts_with("/proc")) {
            found.insert(number, target.display().to_string());
        }
    }
    Ok(found)
}

/// Cgroups below that of this process which clones or this program have made.
fn cgroups() -> BTreeSet<PathBuf> {
    let membership = Membership::of_self();
    let places = [membership.unified, membership.pids];
    let mut found = BTreeSet::new();
    for place in places.into_iter().flatten() {
        collect_own(&place.dir, &mut found);
    }
    found
}

fn collect_own(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    let own = format!("-{}", std::process::id());
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with("pando") && name.ends_with(&own)) {
            found.insert(path);
        }
    }
}

/// Whether a process with this number exists, be it as a zombie.
pub(crate) fn exists(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_found_and_what_is_given_back_is_not() {
        let before = Footprint {
            available_bytes: 0,
            held: Held::now(std::process::id()).unwrap(),
        };
        let file = fs::File::open("/etc/hostname").unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let left = before.difference(&Held::now(std::process::id()).unwrap());
        assert!(
            left.processes
                .iter()
                .any(|process| process.contains("sleep")),
            "{left:?}"
        );
        assert!(
            left.descriptors
                .iter()
                .any(|file| file.contains("hostname")),
            "{left:?}"
        );
        assert!(!left.is_nothing() && left.complaints().len() >= 2);
        let pid = child.id();
        assert!(exists(pid));
        child.kill().unwrap();
        // Not waited for: a zombie counts.
        let zombie = |held: &Held| held.processes.contains_key(&pid);
        assert!(zombie(&Held::now(std::process::id()).unwrap()));
        child.wait().unwrap();
        drop(file);
        let now = Held::now(std::process::id()).unwrap();
        assert!(!zombie(&now) && !exists(pid));
        assert!(
            !before
                .difference(&now)
                .descriptors
                .iter()
                .any(|file| file.contains("hostname"))
        );
    }

    #[test]
    fn a_name_may_have_brackets_and_spaces() {
        let found = parent_and_name("12 (a b) c) S 7 12 12 0 -1");
        assert_eq!(found, Some((7, "(a b) c, S)".to_owned())));
        assert_eq!(parent_and_name(""), None);
    }
}
