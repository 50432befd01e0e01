#![forbid(unsafe_code)]
//! The limits of a device as a manifest has them, and as a supervisor tells its clones. Plain integers.

use serde::{Deserialize, Serialize};

use crate::spec::{Limits, Rate};

/// The first format that has this part.
pub(super) const FIRST_FORMAT: u32 = 5;

/// How fast a device may be used. What is not limited is written too: a message to a clone has no names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsEntry {
    /// Bytes.
    pub bytes: Option<RateEntry>,
    /// Requests of a disk, packets of a network.
    pub requests: Option<RateEntry>,
}

/// So many in a second, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateEntry {
    /// In a second.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

impl LimitsEntry {
    /// The entry of limits; `None` where there are none.
    pub fn of(limits: &Limits) -> Option<Self> {
        let entry = |rate: Rate| RateEntry {
            per_second: rate.per_second(),
            burst: rate.burst(),
        };
        limits.is_any().then(|| Self {
            bytes: limits.bytes.map(entry),
            requests: limits.requests.map(entry),
        })
    }

    /// The limits; the reason where they cannot be.
    pub fn limits(&self) -> Result<Limits, String> {
        let rate = |entry: Option<RateEntry>, what| {
            let burst = entry.map(|entry| entry.burst);
            Rate::new(entry.map(|entry| entry.per_second), burst, what)
                .map_err(|fault| fault.to_string())
        };
        Ok(Limits {
            bytes: rate(self.bytes, "bytes")?,
            requests: rate(self.requests, "requests")?,
        })
    }
}
