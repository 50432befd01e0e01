#![forbid(unsafe_code)]
//! A cgroup with a limit, to see what happens when it is met.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pando_vmm::host::cgroups::Membership;

/// How long processes that have ended may stay in a cgroup.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Bytes of memory.
    Memory(u64),
    /// Processes and threads.
    Processes(u64),
}

/// A cgroup of this process's own; removed when dropped.
#[derive(Debug)]
pub(crate) struct Limited {
    dir: PathBuf,
    /// Where this process was, if it has moved in here.
    home: Option<PathBuf>,
    above: PathBuf,
}

impl Limited {
    /// Makes the cgroup, empty. An error where this host has no such controller that this process may
    /// use.
    pub(crate) fn new(limit: Limit) -> Result<Self> {
        let (controller, files, value) = match limit {
            Limit::Memory(bytes) => ("memory", ["memory.max", "memory.limit_in_bytes"], bytes),
            Limit::Processes(count) => ("pids", ["pids.max", "pids.max"], count),
        };
        let mut why = String::new();
        for above in places(controller) {
            let dir = above.join(format!("pando-bench-{}", std::process::id()));
            if let Err(error) = fs::create_dir(&dir) {
                why = format!("{}: {error}", dir.display());
                continue;
            }
            let limited = Self {
                dir,
                home: None,
                above,
            };
            for file in files {
                let path = limited.dir.join(file);
                if path.exists() {
                    fs::write(&path, value.to_string())
                        .with_context(|| format!("cannot write {}", path.display()))?;
                    return Ok(limited);
                }
            }
            why = format!("{} has no {}", limited.dir.display(), files[0]);
        }
        bail!("no cgroup with a limit of {controller} can be made here: {why}")
    }

    /// Moves a process in.
    pub(crate) fn admit(&self, pid: u32) -> Result<()> {
        write_pid(&self.dir, pid)
    }

    /// Moves a process back to where this one was.
    pub(crate) fn release(&self, pid: u32) -> Result<()> {
        write_pid(&self.above, pid)
    }

    /// Moves this process in; what it starts from now on is in here, too.
    pub(crate) fn enter(&mut self) -> Result<()> {
        self.home = Some(self.above.clone());
        write_pid(&self.dir, std::process::id())
    }

    /// Moves this process back.
    pub(crate) fn leave(&mut self) -> Result<()> {
        match self.home.take() {
            Some(home) => write_pid(&home, std::process::id()),
            None => Ok(()),
        }
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            eprintln!("{error:#}");
        }
        let begun = Instant::now();
        while let Err(error) = fs::remove_dir(&self.dir) {
            if begun.elapsed() > PATIENCE {
                eprintln!("cannot remove {}: {error}", self.dir.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn write_pid(dir: &Path, pid: u32) -> Result<()> {
    let path = dir.join("cgroup.procs");
    fs::write(&path, pid.to_string())
        .with_context(|| format!("cannot move {pid} to {}", path.display()))
}

/// Where a cgroup with this controller may be made: below this process's own.
fn places(controller: &str) -> Vec<PathBuf> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let unified = Membership::of_self().unified.map(|place| place.dir);
    let has_it = |dir: &PathBuf| {
        let enabled = fs::read_to_string(dir.join("cgroup.subtree_control"));
        enabled.is_ok_and(|list| list.split_whitespace().any(|name| name == controller))
    };
    let old = old_place(
        &read("/proc/self/cgroup"),
        &read("/proc/self/mounts"),
        controller,
    );
    unified.filter(has_it).into_iter().chain(old).collect()
}

/// In the hierarchy of version 1 that has the controller; its top where the path cannot be seen.
fn old_place(cgroup: &str, mounts: &str, controller: &str) -> Option<PathBuf> {
    let has_it = |list: &str| list.split(',').any(|name| name == controller);
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (dir, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup" && has_it(options)).then(|| PathBuf::from(dir))
    })?;
    let path = cgroup.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        has_it(controllers).then(|| path.trim_start_matches('/').to_owned())
    })?;
    let own = mount.join(path);
    Some(if own.is_dir() { own } else { mount })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_hierarchy_is_found_by_its_controller() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /nowhere/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup /nowhere/memory cgroup rw,memory 0 0\n";
        let cgroup = "4:memory:/a/b\n1:cpu,cpuacct:/\n0::/c\n";
        // Its own directory does not exist: the top.
        assert_eq!(
            old_place(cgroup, mounts, "memory"),
            Some("/nowhere/memory".into())
        );
        assert_eq!(
            old_place(cgroup, mounts, "cpuacct"),
            Some("/nowhere/cpu,cpuacct".into())
        );
        assert_eq!(old_place(cgroup, mounts, "pids"), None);
    }
}
