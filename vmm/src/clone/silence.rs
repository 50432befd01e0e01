#![forbid(unsafe_code)]
//! How long a process has said nothing, while this one was there to hear it.

use std::time::{Duration, Instant};

/// Longest time between two looks that counts: whatever was longer, this process was stopped or busy
/// itself, and the other may have been with it.
const MOST_PER_LOOK: Duration = Duration::from_secs(1);

/// The silence of a process.
#[derive(Debug)]
pub(super) struct Silence {
    lasted: Duration,
    looked: Instant,
}

impl Default for Silence {
    fn default() -> Self {
        Self {
            lasted: Duration::ZERO,
            looked: Instant::now(),
        }
    }
}

impl Silence {
    /// It said something.
    pub(super) fn heard(&mut self) {
        *self = Self::default();
    }

    /// How long it has been silent.
    pub(super) fn look(&mut self) -> Duration {
        self.look_at(Instant::now())
    }

    fn look_at(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.looked);
        self.lasted += passed.min(MOST_PER_LOOK);
        self.looked = now;
        self.lasted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_process_slept_through_does_not_count() {
        let mut silence = Silence::default();
        let mut now = silence.looked;
        for _ in 0..4 {
            now += Duration::from_millis(500);
            silence.look_at(now);
        }
        now += Duration::from_secs(3600);
        assert_eq!(silence.look_at(now), Duration::from_secs(3));
        silence.heard();
        assert!(silence.look() < Duration::from_secs(1));
    }
}
