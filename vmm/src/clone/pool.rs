#![forbid(unsafe_code)]
//! How many shells wait for clones to be asked for. Pure.
//!
//! A shell is a fork with its machine made. Enough wait for what was asked for in the last
//! [`WINDOW`], within a floor and a ceiling: a burst is met by what the last burst needed, and after
//! a quiet window the pool is back at its floor.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back demand is looked at.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Bounds of the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolLimits {
    /// As many wait although nobody asked.
    pub floor: usize,
    /// More never wait.
    pub ceiling: usize,
}

/// When clones were asked for.
#[derive(Debug, Default)]
pub struct Demand {
    /// At most `ceiling` of them: more change nothing.
    recent: VecDeque<Instant>,
}

impl Demand {
    /// A clone was asked for.
    pub fn note(&mut self, limits: PoolLimits, now: Instant) {
        if self.recent.len() >= limits.ceiling {
            self.recent.pop_front();
        }
        if limits.ceiling > 0 {
            self.recent.push_back(now);
        }
    }

    /// How many shells should wait at `now`.
    pub fn target(&mut self, limits: PoolLimits, now: Instant) -> usize {
        while let Some(first) = self.recent.front()
            && now.saturating_duration_since(*first) > WINDOW
        {
            self.recent.pop_front();
        }
        self.recent.len().max(limits.floor).min(limits.ceiling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_follows_demand_within_its_limits() {
        let limits = PoolLimits {
            floor: 2,
            ceiling: 5,
        };
        let mut demand = Demand::default();
        let start = Instant::now();
        assert_eq!(demand.target(limits, start), 2);
        for _ in 0..4 {
            demand.note(limits, start);
        }
        assert_eq!(demand.target(limits, start), 4);
        for _ in 0..100 {
            demand.note(limits, start + Duration::from_secs(1));
        }
        assert_eq!(demand.target(limits, start + Duration::from_secs(1)), 5);
        let quiet = start + Duration::from_secs(2) + WINDOW;
        assert_eq!(demand.target(limits, quiet), 2);
    }

    #[test]
    fn without_a_ceiling_nothing_waits() {
        let mut demand = Demand::default();
        let now = Instant::now();
        demand.note(PoolLimits::default(), now);
        assert_eq!(demand.target(PoolLimits::default(), now), 0);
    }
}
