#![forbid(unsafe_code)]
//! How fast a device may be used.

use thiserror::Error;

/// The highest rate, and the largest burst: QEMU's.
pub const MAX_RATE: u64 = 1_000_000_000_000_000;
/// Without a burst of its own a rate has this part of a second's worth, as in QEMU.
const BURST_PARTS_OF_SECOND: u64 = 10;

/// So much of something in a second, and so much of it at once after a time of rest: proven when it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    per_second: u64,
    burst: u64,
}

/// Why a rate cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RateFault {
    /// A number that is none.
    #[error("{value} {what} cannot be: a limit is 1 to {MAX_RATE}, and no limit is left out")]
    Range {
        /// The number.
        value: u64,
        /// What it is of.
        what: &'static str,
    },
    /// A burst of what has no limit.
    #[error("a burst of {burst} {what} is none without a limit of {what} per second")]
    BurstAlone {
        /// The burst.
        burst: u64,
        /// What it is of.
        what: &'static str,
    },
}

impl Rate {
    /// So many in a second, and so many at once; without `burst`, a tenth of a second's, at least one.
    /// `what` is counted. `None` where nothing is said.
    pub fn new(
        per_second: Option<u64>,
        burst: Option<u64>,
        what: &'static str,
    ) -> Result<Option<Self>, RateFault> {
        let check = |value| {
            let is_rate = (1..=MAX_RATE).contains(&value);
            is_rate
                .then_some(value)
                .ok_or(RateFault::Range { value, what })
        };
        match (per_second, burst) {
            (None, None) => Ok(None),
            (None, Some(burst)) => Err(RateFault::BurstAlone { burst, what }),
            (Some(per_second), burst) => {
                let per_second = check(per_second)?;
                let default = (per_second / BURST_PARTS_OF_SECOND).max(1);
                let burst = check(burst.unwrap_or(default))?;
                Ok(Some(Self { per_second, burst }))
            }
        }
    }

    /// How many in a second.
    pub fn per_second(self) -> u64 {
        self.per_second
    }

    /// How many at once.
    pub fn burst(self) -> u64 {
        self.burst
    }
}

/// The limits of a device; of a network device, of each direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bytes: Option<Rate>,
    /// Requests of a disk, packets of a network.
    pub requests: Option<Rate>,
}

impl Limits {
    /// Whether there is any.
    pub fn is_any(&self) -> bool {
        self.bytes.is_some() || self.requests.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_has_a_burst_and_a_burst_a_rate() {
        let rate = |per_second, burst| Rate::new(per_second, burst, "bytes");
        let seen = |per_second, burst| {
            let rate = rate(Some(per_second), burst).unwrap().unwrap();
            (rate.per_second(), rate.burst())
        };
        assert_eq!(seen(1000, None), (1000, 100));
        assert_eq!(seen(5, None), (5, 1));
        assert_eq!(seen(1000, Some(7)), (1000, 7));
        assert_eq!(rate(None, None), Ok(None));
        for (per_second, burst, text) in [
            (Some(0), None, "0 bytes cannot be"),
            (Some(1), Some(0), "0 bytes cannot be"),
            (Some(MAX_RATE + 1), None, "1000000000000001 bytes cannot be"),
            (None, Some(4), "a burst of 4 bytes is none without a limit"),
        ] {
            let fault = rate(per_second, burst).unwrap_err().to_string();
            assert!(fault.contains(text), "{fault}");
        }
    }
}
