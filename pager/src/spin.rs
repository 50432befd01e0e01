#![forbid(unsafe_code)]
//! How long to look for the next message awake before sleeping. Pure.
//!
//! Waking a thread that sleeps on another CPU costs ten times a page's copy, and looking costs a CPU
//! that a guest could use. So the window follows what waits turn out to be, much as KVM's adaptive
//! halt polling (Documentation/virt/kvm/halt-polling.rst): short waits make it grow, a long one ends
//! it. A wait is seen with the time that waking took, so one that is somewhat longer than the window
//! may have been short: the window grows all the same, and when looking has been in vain a few times
//! in a row it is given up for a while.

use std::time::Duration;

/// The first window, once a wait was short.
const FIRST: Duration = Duration::from_micros(10);
/// How much a window grows.
const GROWTH: u32 = 2;
/// A wait of so many times the limit may have been short, but for the waking.
const WAKING: u32 = 4;
/// Full windows in vain, one after the other, before looking is given up.
const MISSES: u32 = 4;
/// Waits without looking, after it was given up.
const REST: u32 = 64;

/// The window of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spin {
    limit: Duration,
    window: Duration,
    /// Full windows that met nothing since one did.
    misses: u32,
    /// Waits that are left until looking is tried again.
    rest: u32,
}

impl Spin {
    /// Never looks longer than `limit`; zero: sleeps at once, always.
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
            misses: 0,
            rest: 0,
        }
    }

    /// Whether it ever looks.
    pub(crate) fn is_used(&self) -> bool {
        !self.limit.is_zero()
    }

    /// How long to look now.
    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// The last wait took so long, from its start to the first message in hand.
    pub(crate) fn waited(&mut self, wait: Duration) {
        if self.limit.is_zero() {
            return;
        }
        if self.rest > 0 {
            self.rest -= 1;
        } else if wait > self.limit * WAKING {
            self.window = Duration::ZERO;
            self.misses = 0;
        } else if wait <= self.window {
            self.misses = 0;
        } else if self.window < self.limit {
            self.window = (self.window * GROWTH).max(FIRST).min(self.limit);
        } else {
            self.misses += 1;
            if self.misses == MISSES {
                self.window = Duration::ZERO;
                (self.misses, self.rest) = (0, REST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn windows(spin: &mut Spin, waits: &[u64]) -> Vec<u64> {
        let after = |&wait| {
            spin.waited(us(wait));
            u64::try_from(spin.window().as_micros()).unwrap()
        };
        waits.iter().map(after).collect()
    }

    #[test]
    fn it_grows_while_waits_are_short_and_ends_with_a_long_one() {
        let mut spin = Spin::new(us(60));
        assert_eq!(spin.window(), us(0));
        assert_eq!(windows(&mut spin, &[55, 160, 55, 55]), [10, 20, 40, 60]);
        // Met within the window: it stays.
        assert_eq!(windows(&mut spin, &[3, 59, 241]), [60, 60, 0]);
    }

    #[test]
    fn looking_in_vain_is_given_up_for_a_while() {
        let mut spin = Spin::new(us(20));
        assert_eq!(windows(&mut spin, &[70; 6]), [10, 20, 20, 20, 20, 0]);
        let rest = usize::try_from(REST).unwrap();
        let resting = windows(&mut spin, &vec![1; rest]);
        assert!(resting.iter().all(|&window| window == 0));
        assert_eq!(windows(&mut spin, &[1]), [10]);
    }

    proptest! {
        #[test]
        fn it_never_exceeds_its_limit(
            limit in 0u64..500, waits in prop::collection::vec(0u64..3000, 0..200),
        ) {
            let mut spin = Spin::new(us(limit));
            for wait in waits {
                spin.waited(us(wait));
                prop_assert!(spin.window() <= us(limit));
            }
        }
    }
}
