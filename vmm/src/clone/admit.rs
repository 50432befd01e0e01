#![forbid(unsafe_code)]
//! Whether this host has room for as many clones as are asked for, found out before the first. The
//! arithmetic is pure; what it goes by is in [`limits`].

pub mod limits;

use thiserror::Error;

use super::Engine;
use limits::{HostLimits, MemoryLimit, ProcessLimit};

/// Descriptors that the supervisor holds for each clone at most: its control socket, its pidfd, its
/// console, its userfaultfd where a pager process serves it, its cgroup where it has one of its own. The
/// one more of the few that are being started comes out of [`DESCRIPTORS_OF_OWN`].
const DESCRIPTORS_PER_CLONE: u64 = 5;
/// Descriptors that the supervisor holds for itself, with a reserve for the metrics' clients.
const DESCRIPTORS_OF_OWN: u64 = 64;
/// Threads of a clone beside its vCPUs: main, attend, machine, console, and KVM's own (of this process
/// since Linux 6.13, of the kernel before).
const THREADS: u64 = 5;
/// Processes that the supervisor starts beside clones: a root, a pager, and their threads.
const PROCESSES_OF_OWN: u64 = 16;
/// Memory that must be left for the host.
const RESERVE_BYTES: u64 = 64 << 20;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// How many clones.
    pub clones: u64,
    /// Where their memory comes from.
    pub engine: Engine,
    /// vCPUs of each.
    pub cpus: u64,
    /// Memory that is needed once for all of them.
    pub once_bytes: u64,
}

/// Why clones are not even begun.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AdmitError {
    /// Too few descriptors for all of them.
    #[error(
        "{clones} clones need {DESCRIPTORS_PER_CLONE} x {clones} + {DESCRIPTORS_OF_OWN} = {needed} open \
         files and this process may have {limit}: ask for at most {possible} clones, or raise the limit \
         (ulimit -Hn {needed}, or LimitNOFILE={needed} in the service)"
    )]
    Descriptors {
        /// How many were asked for.
        clones: u64,
        /// How many descriptors they need.
        needed: u64,
        /// How many this process may have.
        limit: u64,
        /// How many clones that is enough for.
        possible: u64,
    },
    /// Too few processes and threads.
    #[error(
        "{clones} clones need {each} threads each, {clones} x {each} + {PROCESSES_OF_OWN} = {needed}, and \
         {what} allows {limit}, of which {used} are taken: ask for at most {possible} clones, raise it \
         ({remedy}), or start as many as there is room for with --overcommit"
    )]
    Processes {
        /// How many were asked for.
        clones: u64,
        /// Threads of each.
        each: u64,
        /// All of them.
        needed: u64,
        /// Which limit.
        what: String,
        /// How much it allows.
        limit: u64,
        /// How much of it is in use.
        used: u64,
        /// How many clones that is enough for.
        possible: u64,
        /// What to do about it.
        remedy: String,
    },
    /// Too little memory.
    #[error(
        "{clones} clones need about {clones} x {each_kib} KiB + {once_mib} MiB = {needed_mib} MiB while they \
         are idle, and {what} has {available_mib} MiB, of which {reserve_mib} MiB are left to the host: ask for \
         at most {possible} clones, or start them in spite of that with --overcommit",
        reserve_mib = RESERVE_BYTES >> 20
    )]
    Memory {
        /// How many were asked for.
        clones: u64,
        /// What an idle one takes, by estimate.
        each_kib: u64,
        /// What is needed once.
        once_mib: u64,
        /// The sum.
        needed_mib: u64,
        /// What memory is limited by.
        what: String,
        /// How much there is.
        available_mib: u64,
        /// How many clones that is enough for.
        possible: u64,
    },
    /// Too little memory for one more, while others run.
    #[error(
        "{what} has {available_mib} MiB left, too little for one more clone of about {each_kib} KiB and the \
         {reserve_mib} MiB that are left to the host: stop other clones, or start it in spite of that with \
         --overcommit",
        reserve_mib = RESERVE_BYTES >> 20
    )]
    OneMore {
        /// What memory is limited by.
        what: String,
        /// How much there is.
        available_mib: u64,
        /// What one takes.
        each_kib: u64,
    },
}

/// What an idle clone takes, everything counted, as measured with the built-in guest: process, page
/// tables and the kernel's objects. What a guest writes comes on top, and nobody can know it before.
pub fn idle_bytes(engine: Engine) -> u64 {
    match engine {
        Engine::Copy | Engine::Kernel => 2 << 20,
        Engine::Root => 1 << 20,
    }
}

/// Threads of a clone.
fn threads(engine: Engine, cpus: u64) -> u64 {
    // An interrupt timer's thread is the kernel's, and counts where all threads of the host do.
    let pager = u64::from(engine != Engine::Kernel);
    THREADS.saturating_add(pager).saturating_add(cpus)
}

/// Checks that what is asked for fits; with `overcommit` only that it can be supervised at all.
/// Raise the soft limit of open files before [`HostLimits::probe`].
pub fn admit(request: &Request, limits: &HostLimits, overcommit: bool) -> Result<(), AdmitError> {
    admit_descriptors(request.clones, limits.descriptors)?;
    if overcommit {
        return Ok(());
    }
    for limit in &limits.processes {
        admit_processes(request, limit)?;
    }
    match &limits.memory {
        Some(limit) => admit_memory(request, limit),
        None => Ok(()),
    }
}

fn admit_descriptors(clones: u64, limit: Option<u64>) -> Result<(), AdmitError> {
    let needed = clones
        .saturating_mul(DESCRIPTORS_PER_CLONE)
        .saturating_add(DESCRIPTORS_OF_OWN);
    match limit {
        Some(limit) if limit < needed => Err(AdmitError::Descriptors {
            clones,
            needed,
            limit,
            possible: limit.saturating_sub(DESCRIPTORS_OF_OWN) / DESCRIPTORS_PER_CLONE,
        }),
        _ => Ok(()),
    }
}

fn admit_processes(request: &Request, limit: &ProcessLimit) -> Result<(), AdmitError> {
    let clones = request.clones;
    let each = threads(request.engine, request.cpus) + u64::from(limit.counts_kernel_threads);
    let needed = clones.saturating_mul(each).saturating_add(PROCESSES_OF_OWN);
    let left = limit.limit.saturating_sub(limit.used);
    if needed <= left {
        return Ok(());
    }
    Err(AdmitError::Processes {
        clones,
        each,
        needed,
        what: limit.what.clone(),
        limit: limit.limit,
        used: limit.used,
        possible: left.saturating_sub(PROCESSES_OF_OWN) / each,
        remedy: limit.remedy.clone(),
    })
}

fn admit_memory(request: &Request, limit: &MemoryLimit) -> Result<(), AdmitError> {
    let clones = request.clones;
    let each = idle_bytes(request.engine);
    let needed = clones
        .saturating_mul(each)
        .saturating_add(request.once_bytes);
    let left = limit.available_bytes.saturating_sub(RESERVE_BYTES);
    if needed <= left {
        return Ok(());
    }
    Err(AdmitError::Memory {
        clones,
        each_kib: each >> 10,
        once_mib: request.once_bytes >> 20,
        needed_mib: needed >> 20,
        what: limit.what.clone(),
        available_mib: limit.available_bytes >> 20,
        possible: left.saturating_sub(request.once_bytes) / each,
    })
}

/// Checks, while others run, that there is memory for one more; `each_bytes` is what one costs as
/// measured, or [`idle_bytes`].
pub fn admit_one(each_bytes: u64, limit: &MemoryLimit) -> Result<(), AdmitError> {
    if limit.available_bytes >= each_bytes.saturating_add(RESERVE_BYTES) {
        return Ok(());
    }
    Err(AdmitError::OneMore {
        what: limit.what.clone(),
        available_mib: limit.available_bytes >> 20,
        each_kib: each_bytes >> 10,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn request(clones: u64) -> Request {
        Request {
            clones,
            engine: Engine::Copy,
            cpus: 1,
            once_bytes: 0,
        }
    }

    fn memory(available_bytes: u64) -> MemoryLimit {
        MemoryLimit {
            what: "the host".into(),
            available_bytes,
        }
    }

    fn processes(limit: u64, used: u64) -> ProcessLimit {
        ProcessLimit {
            what: "pids.max of /a".into(),
            limit,
            used,
            counts_kernel_threads: false,
            remedy: "echo max".into(),
        }
    }

    #[test]
    fn the_limit_of_descriptors_is_met_exactly() {
        assert_eq!(admit_descriptors(20, Some(164)), Ok(()));
        assert_eq!(admit_descriptors(u64::MAX, None), Ok(()));
        let error = admit_descriptors(20, Some(163)).unwrap_err().to_string();
        assert!(error.contains("5 x 20 + 64 = 164 open files"), "{error}");
        assert!(error.contains("at most 19 clones"), "{error}");
        admit_descriptors(u64::MAX, Some(40)).unwrap_err();
    }

    #[test]
    fn the_limit_of_processes_is_met_exactly() {
        let needed = 10 * 7 + 16;
        let limits = |left: u64| HostLimits {
            processes: vec![processes(100 + left, 100)],
            ..HostLimits::default()
        };
        assert_eq!(admit(&request(10), &limits(needed), false), Ok(()));
        let error = admit(&request(10), &limits(needed - 1), false).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("10 x 7 + 16 = 86"), "{text}");
        assert!(
            text.contains("allows 185, of which 100 are taken"),
            "{text}"
        );
        assert!(text.contains("at most 9 clones"), "{text}");
        assert_eq!(admit(&request(10), &limits(0), true), Ok(()), "asked for");
    }

    #[test]
    fn the_limit_of_memory_is_met_exactly() {
        let root = Request {
            engine: Engine::Root,
            once_bytes: 100 * MIB,
            ..request(500)
        };
        let limits = |mib| HostLimits {
            memory: Some(memory(mib * MIB)),
            ..HostLimits::default()
        };
        assert_eq!(admit(&root, &limits(664), false), Ok(()));
        let error = admit(&root, &limits(663), false).unwrap_err().to_string();
        assert!(
            error.contains("500 x 1024 KiB + 100 MiB = 600 MiB"),
            "{error}"
        );
        assert!(error.contains("the host has 663 MiB"), "{error}");
        assert!(error.contains("at most 499 clones"), "{error}");
        assert_eq!(admit(&root, &limits(1), true), Ok(()), "asked for");
    }

    #[test]
    fn one_more_needs_its_memory_and_the_reserve() {
        assert_eq!(admit_one(2 * MIB, &memory(66 * MIB)), Ok(()));
        let error = admit_one(2 * MIB, &memory(66 * MIB - 1))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("65 MiB left") && error.contains("2048 KiB"),
            "{error}"
        );
    }

    proptest! {
        /// As many as the message says fit, and not one more.
        #[test]
        fn what_is_said_to_be_possible_is(clones: u64, cpus in 1_u64..9, left: u64, mib in 0_u64..1 << 30) {
            let limits = HostLimits {
                descriptors: None,
                processes: vec![processes(left, 0)],
                memory: Some(memory(mib << 20)),
            };
            let asked = |clones| Request { clones, cpus, ..request(0) };
            let possible = match admit(&asked(clones), &limits, false) {
                Ok(()) => return Ok(()),
                Err(AdmitError::Processes { possible, .. } | AdmitError::Memory { possible, .. }) => possible,
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            };
            prop_assert!(possible < clones || possible == 0);
            let fits_only = |limits: HostLimits| {
                let at = admit(&asked(possible), &limits, false);
                prop_assert!(at.is_ok() || possible == 0);
                admit(&asked(possible + 1), &limits, false).unwrap_err();
                Ok(())
            };
            match admit(&asked(clones), &limits, false) {
                Err(AdmitError::Processes { .. }) => fits_only(HostLimits { memory: None, ..limits })?,
                _ => fits_only(HostLimits { processes: Vec::new(), ..limits })?,
            }
        }
    }
}
