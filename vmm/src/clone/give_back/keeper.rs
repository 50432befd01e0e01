#![forbid(unsafe_code)]
//! Looks at a clone each second, and has it give memory back when it is idle.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::policy::{Activity, Doings, Policy, may_keep};
use super::{GiveBack, GiveBackError, Given, Subject};
use crate::observe::pressure::Pressure;
use crate::sys::pagemap::Pagemap;

/// A clone that is watched.
#[derive(Debug)]
pub struct Keeper {
    policy: Policy,
    give_back: GiveBack,
    began: Instant,
    activity: Activity,
    /// How many faults there had been, and what it might keep, when nothing more was to be had.
    settled: Option<(u64, u64)>,
    is_off: bool,
}

impl Keeper {
    /// For the clone that this process is. Of a fork too: what its root gave is not registered, so nothing
    /// tracks writes there and none of it counts as clean, but for pages of which it got copies of its
    /// own ahead.
    pub fn new(policy: Policy) -> Result<Self, GiveBackError> {
        let map = Pagemap::of_self().map_err(GiveBackError::Scan)?;
        let activity = Activity::new(Doings {
            at: Duration::ZERO,
            cpu: cpu_time(),
            faults: 0,
        });
        Ok(Self {
            policy,
            give_back: GiveBack::new(map, &[])?,
            began: Instant::now(),
            activity,
            settled: None,
            is_off: false,
        })
    }

    /// Looks at what the clone did, `faults` in all, and gives back what it may not keep.
    pub fn review(&mut self, faults: u64, subject: &mut dyn Subject) -> Given {
        let idle = self.activity.review(self.doings(faults));
        let Some(keep_bytes) = may_keep(&self.policy, idle, Pressure::of_memory()) else {
            self.settled = None;
            return Given::default();
        };
        let is_settled = self
            .settled
            .is_some_and(|(then, kept)| then == faults && keep_bytes >= kept);
        if self.is_off || is_settled {
            return Given::default();
        }
        let given = self.give_back.give_back(subject, keep_bytes);
        // What this took is no doing of the guest's.
        self.activity.pass(self.doings(faults));
        match given {
            Ok(given) => {
                self.settled = Some((faults, keep_bytes));
                given
            }
            // It is ending, or its pager is being replaced: if not, it is tried again.
            Err(error @ (GiveBackError::Machine(_) | GiveBackError::Pager)) => {
                tracing::debug!(%error, "no memory is given back this time");
                Given::default()
            }
            Err(error) => {
                tracing::warn!("no memory is given back any more: {error}");
                self.is_off = true;
                Given::default()
            }
        }
    }

    fn doings(&self, faults: u64) -> Doings {
        Doings {
            at: self.began.elapsed(),
            cpu: cpu_time(),
            faults,
        }
    }
}

/// What this process used, guest time included.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    let nanoseconds = u32::try_from(now.tv_nsec).unwrap_or_default();
    Duration::new(now.tv_sec.unsigned_abs(), nanoseconds)
}
