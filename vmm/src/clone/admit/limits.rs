#![forbid(unsafe_code)]
//! What this host allows, as far as clones need it.
//!
//! Locked memory is not among it: what a pager pins (256 KiB of buffers, after 64 reads) it goes
//! without where the limit is reached.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::process::{Resource, getrlimit, getuid};

use crate::host::cgroups::Membership;
use crate::observe::memory::available_bytes;

/// A limit of processes and threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessLimit {
    /// What it is called.
    pub what: String,
    /// How many it allows.
    pub limit: u64,
    /// How many there are.
    pub used: u64,
    /// Whether threads of the kernel count.
    pub counts_kernel_threads: bool,
    /// How to raise it.
    pub remedy: String,
}

/// How much memory can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Who has it.
    pub what: String,
    /// How much that is.
    pub available_bytes: u64,
}

impl MemoryLimit {
    /// What is left on the host, or in the tightest of these cgroups if that is less.
    pub fn within(membership: &Membership) -> Option<Self> {
        let host = available_bytes().map(|available_bytes| Self {
            what: "the host".to_owned(),
            available_bytes,
        });
        let cgroup = membership.memory_left().map(|(dir, left)| Self {
            what: format!("memory.max of {}", dir.display()),
            available_bytes: left,
        });
        host.into_iter()
            .chain(cgroup)
            .min_by_key(|limit| limit.available_bytes)
    }
}

/// All that is looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Open files of this process.
    pub descriptors: Option<u64>,
    /// Processes and threads, by every limit that there is.
    pub processes: Vec<ProcessLimit>,
    /// Memory.
    pub memory: Option<MemoryLimit>,
}

impl HostLimits {
    /// Asks the kernel.
    pub fn probe() -> Self {
        let membership = Membership::of_self();
        let mut processes: Vec<ProcessLimit> = user_limit().into_iter().collect();
        for (dir, limit, used) in membership.process_limits() {
            let file = dir.join("pids.max");
            processes.push(ProcessLimit {
                what: format!("pids.max of {}", dir.display()),
                limit,
                used,
                counts_kernel_threads: false,
                remedy: format!("echo max > {}", file.display()),
            });
        }
        if let Some(used) = threads_of_host() {
            for name in ["threads-max", "pid_max"] {
                let number = fs::read_to_string(format!("/proc/sys/kernel/{name}"))
                    .ok()
                    .and_then(|text| text.trim().parse().ok());
                processes.extend(number.map(|limit| ProcessLimit {
                    what: format!("kernel.{name}"),
                    limit,
                    used,
                    counts_kernel_threads: true,
                    remedy: format!("sysctl kernel.{name}=N"),
                }));
            }
        }
        Self {
            descriptors: getrlimit(Resource::Nofile).current,
            processes,
            memory: MemoryLimit::within(&membership),
        }
    }
}

/// RLIMIT_NPROC, where it holds: the kernel does not apply it to the superuser.
fn user_limit() -> Option<ProcessLimit> {
    let user = getuid();
    let limit = getrlimit(Resource::Nproc)
        .current
        .filter(|_| !user.is_root())?;
    Some(ProcessLimit {
        what: format!("the limit of processes of user {}", user.as_raw()),
        limit,
        used: threads_of(user.as_raw()),
        counts_kernel_threads: false,
        remedy: "ulimit -Hu N, or LimitNPROC=N in the service".to_owned(),
    })
}

/// Threads of all processes of a user, as far as they can be seen.
fn threads_of(user: u32) -> u64 {
    let Ok(processes) = fs::read_dir("/proc") else {
        return 0;
    };
    processes
        .flatten()
        .filter(|entry| entry.metadata().is_ok_and(|found| found.uid() == user))
        .filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok())
        .filter_map(|status| {
            let threads = status
                .lines()
                .find_map(|line| line.strip_prefix("Threads:"))?;
            threads.trim().parse::<u64>().ok()
        })
        .sum()
}

/// All threads of the host, the kernel's too: the second number of `running/all` in /proc/loadavg.
fn threads_of_host() -> Option<u64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let (_, all) = text.split_whitespace().nth(3)?.split_once('/')?;
    all.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_limits_and_is_within_them() {
        let limits = HostLimits::probe();
        assert!(limits.memory.unwrap().available_bytes > 0);
        let names: Vec<_> = limits.processes.iter().map(|l| l.what.clone()).collect();
        assert!(
            names.iter().any(|name| name == "kernel.pid_max"),
            "{names:?}"
        );
        for limit in limits.processes {
            assert!(limit.used < limit.limit, "{limit:?}");
            assert!(!limit.remedy.is_empty());
        }
        assert!(threads_of(getuid().as_raw()) > 0);
    }
}
