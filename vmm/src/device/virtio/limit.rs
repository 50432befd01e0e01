#![forbid(unsafe_code)]
//! How fast requests are worked on: token buckets of bytes and of requests.
//!
//! A bucket holds at most its burst and is filled steadily. A request takes what it needs when that is there;
//! one that needs more than the bucket can hold goes when it is full, and leaves a debt that those behind it
//! wait for. So in any time `t` no more goes than `burst + rate * t`, and one such request beside. Nobody
//! sleeps here: who is too early is told how long to wait.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::spec::{Limits, Rate};

/// What a token is divided into: a rate is tokens in a second, and time is counted in nanoseconds.
const PARTS: i128 = 1_000_000_000;

/// What the time is.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Time since some moment; it never goes back.
    fn now(&self) -> Duration;
}

/// The host's clock.
#[derive(Debug)]
pub struct HostClock(Instant);

impl Default for HostClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for HostClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Tokens of one kind.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// What is there, in [`PARTS`] of a token; below zero is a debt.
    level: i128,
    filled_at: Duration,
}

impl Bucket {
    /// A full one.
    fn new(rate: Rate, now: Duration) -> Self {
        Self {
            rate,
            level: i128::from(rate.burst()) * PARTS,
            filled_at: now,
        }
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled_at).as_nanos();
        // A rate and a time of centuries still fit.
        let elapsed = i128::try_from(elapsed).unwrap_or(i128::MAX);
        let more = elapsed.saturating_mul(self.rate.per_second().into());
        let full = i128::from(self.rate.burst()) * PARTS;
        self.level = self.level.saturating_add(more).min(full);
        self.filled_at = self.filled_at.max(now);
    }

    /// How long until `tokens` can be taken.
    fn wait(&mut self, tokens: u64, now: Duration) -> Option<Duration> {
        self.fill(now);
        let needed = i128::from(tokens.min(self.rate.burst())) * PARTS;
        let missing = u128::try_from(needed - self.level).unwrap_or(0);
        let nanoseconds = missing.div_ceil(self.rate.per_second().into());
        let wait = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        (!wait.is_zero()).then_some(wait)
    }

    fn take(&mut self, tokens: u64, now: Duration) {
        self.fill(now);
        self.level = self.level.saturating_sub(i128::from(tokens) * PARTS);
    }
}

/// The limits of one direction of a device.
#[derive(Debug)]
pub struct Limiter {
    clock: Arc<dyn Clock>,
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Limiter {
    /// With all that may be used at once; `None` where nothing is limited.
    pub fn new(limits: &Limits, clock: Arc<dyn Clock>) -> Option<Self> {
        let now = clock.now();
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        limits.is_any().then(|| Self {
            bytes: bucket(limits.bytes),
            requests: bucket(limits.requests),
            clock,
        })
    }

    /// How long a request of so many bytes has to wait; `None` where it may begin.
    pub fn wait(&mut self, bytes: u64) -> Option<Duration> {
        let now = self.clock.now();
        let of_bytes = (self.bytes.as_mut()).and_then(|bucket| bucket.wait(bytes, now));
        let of_requests = (self.requests.as_mut()).and_then(|bucket| bucket.wait(1, now));
        of_bytes.max(of_requests)
    }

    /// A request of so many bytes begins, whether or not it would have to wait.
    pub fn count(&mut self, bytes: u64) {
        let now = self.clock.now();
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1, now);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use proptest::prelude::*;

    /// A clock that is set.
    #[derive(Debug, Default)]
    pub(in crate::device::virtio) struct SetClock(AtomicU64);

    impl SetClock {
        pub(in crate::device::virtio) fn advance(&self, time: Duration) {
            let nanoseconds = u64::try_from(time.as_nanos()).unwrap();
            self.0.fetch_add(nanoseconds, Ordering::SeqCst);
        }
    }

    impl Clock for SetClock {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::SeqCst))
        }
    }

    pub(in crate::device::virtio) fn limits(
        bytes: Option<(u64, u64)>,
        requests: Option<(u64, u64)>,
    ) -> Limits {
        let rate = |rate: Option<(u64, u64)>| {
            rate.and_then(|(per_second, burst)| {
                Rate::new(Some(per_second), Some(burst), "").unwrap()
            })
        };
        Limits {
            bytes: rate(bytes),
            requests: rate(requests),
        }
    }

    fn limiter(
        bytes: Option<(u64, u64)>,
        requests: Option<(u64, u64)>,
    ) -> (Limiter, Arc<SetClock>) {
        let clock = Arc::new(SetClock::default());
        let limiter = Limiter::new(&limits(bytes, requests), clock.clone()).unwrap();
        (limiter, clock)
    }

    /// As a device does it.
    fn offer(limiter: &mut Limiter, bytes: u64) -> Option<Duration> {
        let wait = limiter.wait(bytes);
        if wait.is_none() {
            limiter.count(bytes);
        }
        wait
    }

    #[test]
    fn nothing_is_limited_unless_something_is() {
        assert!(Limiter::new(&Limits::default(), Arc::new(HostClock::default())).is_none());
    }

    #[test]
    fn the_burst_goes_at_once_and_the_rest_at_the_rate() {
        let (mut limiter, clock) = limiter(None, Some((10, 3)));
        for _ in 0..3 {
            assert_eq!(offer(&mut limiter, 1 << 30), None);
        }
        let tenth = Duration::from_millis(100);
        assert_eq!(offer(&mut limiter, 0), Some(tenth));
        clock.advance(tenth / 2);
        assert_eq!(offer(&mut limiter, 0), Some(tenth / 2));
        clock.advance(tenth / 2);
        assert_eq!(offer(&mut limiter, 0), None);
        assert_eq!(offer(&mut limiter, 0), Some(tenth));
        // A long rest is no more than one burst.
        clock.advance(Duration::from_secs(1000));
        assert_eq!(
            (0..9).filter(|_| offer(&mut limiter, 0).is_none()).count(),
            3
        );
    }

    #[test]
    fn a_request_above_the_burst_goes_when_all_is_there_and_leaves_debt() {
        let (mut limiter, clock) = limiter(Some((1000, 100)), None);
        assert_eq!(offer(&mut limiter, 1), None);
        assert_eq!(offer(&mut limiter, 5000), Some(Duration::from_millis(1)));
        clock.advance(Duration::from_millis(1));
        assert_eq!(offer(&mut limiter, 5000), None);
        // The debt of 4900, and what is asked for.
        assert_eq!(offer(&mut limiter, 50), Some(Duration::from_millis(4950)));
        // A flush has no bytes, and waits until the debt is paid.
        assert_eq!(offer(&mut limiter, 0), Some(Duration::from_millis(4900)));
    }

    #[test]
    fn both_limits_hold() {
        let (mut limiter, clock) = limiter(Some((1000, 100)), Some((10, 1)));
        assert_eq!(offer(&mut limiter, 100), None);
        assert_eq!(offer(&mut limiter, 1), Some(Duration::from_millis(100)));
        clock.advance(Duration::from_millis(100));
        assert_eq!(offer(&mut limiter, 1), None);
        clock.advance(Duration::from_millis(100));
        assert_eq!(offer(&mut limiter, 100), None);
        clock.advance(Duration::from_millis(50));
        assert_eq!(offer(&mut limiter, 100), Some(Duration::from_millis(50)));
    }

    #[test]
    fn what_does_not_wait_is_counted() {
        let (mut limiter, _clock) = limiter(None, Some((1, 1)));
        for _ in 0..10 {
            limiter.count(0);
        }
        assert_eq!(limiter.wait(0), Some(Duration::from_secs(10)));
    }

    #[test]
    fn numbers_that_are_extreme_are_numbers() {
        let most = crate::spec::MAX_RATE;
        let (mut fast, clock) = limiter(Some((most, most)), Some((most, most)));
        clock.advance(Duration::from_nanos(u64::MAX - 1));
        assert_eq!(offer(&mut fast, u64::MAX), None);
        assert!(offer(&mut fast, u64::MAX).is_some());
        let (mut slow, _clock) = limiter(Some((1, 1)), None);
        for _ in 0..5 {
            slow.count(u64::MAX);
        }
        assert_eq!(slow.wait(1), Some(Duration::from_nanos(u64::MAX)));
    }

    proptest! {
        /// Whatever is asked for, and whenever: in no span of time goes more than a burst and the rate, and
        /// who waits as long as it was told goes then.
        #[test]
        fn no_window_has_more_and_nobody_starves(
            rate in 1_u64..5000,
            burst in 1_u64..5000,
            offers in proptest::collection::vec((0_u64..6000, 0_u64..2_000_000_000, any::<bool>()), 1..60),
        ) {
            let (mut limiter, clock) = limiter(Some((rate, burst)), None);
            let mut gone: Vec<(u128, u64)> = Vec::new();
            for (bytes, pause, waits) in offers {
                clock.advance(Duration::from_nanos(pause));
                let mut wait = offer(&mut limiter, bytes);
                if let Some(time) = wait.filter(|_| waits) {
                    clock.advance(time);
                    wait = offer(&mut limiter, bytes);
                    prop_assert_eq!(wait, None);
                }
                if wait.is_none() {
                    gone.push((clock.now().as_nanos(), bytes));
                }
            }
            for first in 0..gone.len() {
                let mut sum: u128 = 0;
                for &(at, bytes) in &gone[first..] {
                    sum += u128::from(bytes);
                    let time = at - gone[first].0;
                    let over = gone[first..].iter().map(|&(_, bytes)| bytes.saturating_sub(burst)).max();
                    let most = (u128::from(burst) + u128::from(over.unwrap_or(0))) * 1_000_000_000
                        + u128::from(rate) * time;
                    prop_assert!(sum * 1_000_000_000 <= most, "{sum} in {time} ns");
                }
            }
        }
    }
}
