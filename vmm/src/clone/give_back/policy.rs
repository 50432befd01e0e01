#![forbid(unsafe_code)]
//! When a clone gives memory back, and how much it keeps. Pure: no clocks, no files.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::observe::pressure::Pressure;

/// From this share of `some` on, a clone need not have been idle for long.
const SOME_PERCENT: f64 = 10.0;
/// From this share of `full` on, it keeps nothing.
const FULL_PERCENT: f64 = 5.0;
/// How long a clone must have been idle while the host is short of memory.
const AGE_UNDER_PRESSURE: Duration = Duration::from_secs(1);
/// A clone that uses at least this share of one CPU is active: more than the ticks of an idle guest
/// take, less than any work.
const ACTIVE_CPU_PERCENT: u32 = 5;
/// A clone that faults at least this often in a second is active.
const ACTIVE_FAULTS_PER_SECOND: u64 = 32;

/// What a user wants: `AGE[:BUDGET]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// How long a clone must have been idle.
    pub age: Duration,
    /// Private clean memory that it may keep then.
    pub budget_bytes: u64,
}

/// What a clone that is to give memory back may keep of its private clean memory; `None` while it
/// is left alone.
pub fn may_keep(policy: &Policy, idle: Duration, pressure: Option<Pressure>) -> Option<u64> {
    let pressure = pressure.unwrap_or_default();
    let is_short = pressure.some_percent >= SOME_PERCENT;
    let is_stalled = pressure.full_percent >= FULL_PERCENT;
    let age = if is_short || is_stalled {
        policy.age.min(AGE_UNDER_PRESSURE)
    } else {
        policy.age
    };
    let budget = if is_stalled { 0 } else { policy.budget_bytes };
    (idle >= age).then_some(budget)
}

/// What a clone did until a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Doings {
    /// The moment.
    pub at: Duration,
    /// CPU time that its process used.
    pub cpu: Duration,
    /// Faults that its pager saw.
    pub faults: u64,
}

/// Since when a clone has been idle.
#[derive(Debug, Clone, Copy)]
pub struct Activity {
    last: Doings,
    idle_since: Duration,
}

impl Activity {
    /// A clone that is active now.
    pub fn new(now: Doings) -> Self {
        Self {
            last: now,
            idle_since: now.at,
        }
    }

    /// Takes in what it did since the last time; returns how long it has been idle.
    pub fn review(&mut self, now: Doings) -> Duration {
        let passed = now.at.saturating_sub(self.last.at);
        if passed.is_zero() {
            return now.at.saturating_sub(self.idle_since);
        }
        let cpu = now.cpu.saturating_sub(self.last.cpu);
        let faults = now.faults.saturating_sub(self.last.faults);
        let allowed = u128::from(ACTIVE_FAULTS_PER_SECOND) * passed.as_millis();
        if cpu * 100 >= passed * ACTIVE_CPU_PERCENT || u128::from(faults) * 1000 >= allowed {
            self.idle_since = now.at;
        }
        self.last = now;
        now.at.saturating_sub(self.idle_since)
    }

    /// What was done since the last time, until `now`, was not its own doing.
    pub fn pass(&mut self, now: Doings) {
        self.last = now;
    }
}

impl FromStr for Policy {
    type Err = String;

    /// `5s`, `500ms`, `2m`, each with `:BUDGET` behind it or not; without, nothing is kept.
    fn from_str(text: &str) -> Result<Self, String> {
        let (age, budget) = match text.split_once(':') {
            Some((age, budget)) => (age, Some(budget)),
            None => (text, None),
        };
        let digits = age.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &age[digits.len()..] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => {
                return Err(format!(
                    "'{age}' is no age: give a number with ms, s, m or h, such as 5s"
                ));
            }
        };
        let age = digits
            .parse::<f64>()
            .ok()
            .and_then(|number| Duration::try_from_secs_f64(number * unit).ok())
            .ok_or_else(|| {
                format!("'{age}' is no age: give a number with ms, s, m or h, such as 5s")
            })?;
        let budget_bytes = budget.map_or(Ok(0), bytes)?;
        Ok(Self { age, budget_bytes })
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no budget: give a number with K, M or G, such as 1M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &*text[digits.len()..].to_ascii_uppercase() {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ if digits == "0" => 0,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: Policy = Policy {
        age: Duration::from_secs(5),
        budget_bytes: 1 << 20,
    };

    fn pressure(some_percent: f64, full_percent: f64) -> Option<Pressure> {
        Some(Pressure {
            some_percent,
            full_percent,
        })
    }

    #[test]
    fn idle_clones_keep_their_budget() {
        let ms = Duration::from_millis;
        assert_eq!(may_keep(&POLICY, ms(4999), None), None);
        assert_eq!(may_keep(&POLICY, ms(5000), None), Some(1 << 20));
        assert_eq!(may_keep(&POLICY, ms(4999), pressure(9.9, 4.9)), None);
    }

    #[test]
    fn pressure_shortens_the_age_and_then_takes_the_budget() {
        let ms = Duration::from_millis;
        assert_eq!(
            may_keep(&POLICY, ms(999), pressure(50.0, 50.0)),
            None,
            "active ones work on"
        );
        assert_eq!(
            may_keep(&POLICY, ms(1000), pressure(10.0, 0.0)),
            Some(1 << 20)
        );
        assert_eq!(may_keep(&POLICY, ms(1000), pressure(10.0, 5.0)), Some(0));
        let eager = Policy {
            age: ms(100),
            ..POLICY
        };
        assert_eq!(
            may_keep(&eager, ms(100), pressure(10.0, 0.0)),
            Some(1 << 20),
            "never longer"
        );
    }

    #[test]
    fn work_and_faults_are_activity_and_ticks_are_not() {
        let at = |seconds: u64, cpu_ms: u64, faults: u64| Doings {
            at: Duration::from_secs(seconds),
            cpu: Duration::from_millis(cpu_ms),
            faults,
        };
        let mut activity = Activity::new(at(10, 0, 0));
        let mut idle = |now| activity.review(now).as_secs();
        assert_eq!(idle(at(11, 10, 3)), 1);
        assert_eq!(idle(at(12, 20, 5)), 2);
        assert_eq!(idle(at(13, 80, 5)), 0, "6 % of a CPU");
        assert_eq!(idle(at(14, 90, 5)), 1);
        assert_eq!(idle(at(15, 90, 37)), 0, "32 faults");
        assert_eq!(idle(at(15, 500, 900)), 0, "no time has passed");
        assert_eq!(idle(at(35, 100, 100)), 20);
        activity.pass(at(36, 1100, 900));
        assert_eq!(activity.review(at(37, 1110, 900)).as_secs(), 22);
    }

    #[test]
    fn policies_are_read() {
        let policy = |ms, budget_bytes| {
            Ok(Policy {
                age: Duration::from_millis(ms),
                budget_bytes,
            })
        };
        assert_eq!("5s:1M".parse(), policy(5000, 1 << 20));
        assert_eq!("250ms".parse(), policy(250, 0));
        assert_eq!("1.5m:64k".parse(), policy(90_000, 64 << 10));
        assert_eq!("1h:0".parse(), policy(3_600_000, 0));
        for wrong in [
            "",
            "5",
            "s",
            "-1s",
            "nans",
            "5s:",
            "5s:1",
            "5s:x",
            "5s:99999999999G",
            "1e99h",
        ] {
            assert!(wrong.parse::<Policy>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Policy>();
        }

        /// More idle, or more pressure, never keeps more.
        #[test]
        fn it_is_monotonic(age in 0_u64..10_000, a in 0_u64..20_000, b in 0_u64..20_000,
                           low in 0.0..100.0_f64, high in 0.0..100.0_f64) {
            let policy = Policy { age: Duration::from_millis(age), ..POLICY };
            let keeps = |idle: u64, share: f64| {
                may_keep(&policy, Duration::from_millis(idle), pressure(share, share / 2.0))
                    .unwrap_or(u64::MAX)
            };
            let (less, more) = (a.min(b), a.max(b));
            let (low, high) = (low.min(high), low.max(high));
            prop_assert!(keeps(more, high) <= keeps(less, low));
        }
    }
}
