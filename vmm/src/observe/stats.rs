#![forbid(unsafe_code)]
//! Percentiles of durations, for tables and `--json`.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::relay::{Change, Delta};

/// Durations of one kind.
#[derive(Debug, Clone)]
pub struct Durations {
    // `None` only if the constant bounds below were refused, which a test excludes.
    ns: Option<Histogram<u64>>,
}

impl Default for Durations {
    fn default() -> Self {
        Self {
            ns: Histogram::new_with_bounds(1, 3_600_000_000_000, 3).ok(),
        }
    }
}

/// Percentiles of durations in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// How many durations.
    pub count: u64,
    /// The median.
    pub p50_us: f64,
    /// 90 % are at most this.
    pub p90_us: f64,
    /// 99 % are at most this.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Durations {
    /// Adds a duration.
    pub fn record(&mut self, duration: Duration) {
        self.record_ns(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX), 1);
    }

    /// Adds a duration several times.
    pub fn record_ns(&mut self, ns: u64, count: u64) {
        if let Some(histogram) = &mut self.ns {
            histogram.saturating_record_n(ns, count);
        }
    }

    /// The percentiles; all zero when there are no durations.
    pub fn percentiles(&self) -> Percentiles {
        let us = |percentile| {
            self.ns
                .as_ref()
                .map_or(0.0, |ns| to_us(ns.value_at_percentile(percentile)))
        };
        let count = self.ns.as_ref().map_or(0, Histogram::len);
        if count == 0 {
            return Percentiles {
                count: 0,
                p50_us: 0.0,
                p90_us: 0.0,
                p99_us: 0.0,
                max_us: 0.0,
            };
        }
        Percentiles {
            count,
            p50_us: us(50.0),
            p90_us: us(90.0),
            p99_us: us(99.0),
            max_us: us(100.0),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "three significant digits are kept"
)]
fn to_us(ns: u64) -> f64 {
    (ns as f64 / 1e3 * 10.0).round() / 10.0
}

/// What the pagers of all clones did, added up from their deltas.
#[derive(Debug, Clone, Default)]
pub struct PagerStats {
    /// From fault to woken vCPU, by where the page came from.
    pub fault_total: BTreeMap<String, Durations>,
    /// Pages installed, by where they came from.
    pub installed_pages: BTreeMap<String, u64>,
    /// All other counters, by name and, where they have one, reason.
    pub counters: BTreeMap<String, u64>,
}

impl PagerStats {
    /// Adds what one process recorded; it may claim anything.
    pub fn add(&mut self, delta: &Delta) {
        for (series, change) in delta {
            match (series.name.as_str(), change) {
                ("pando_pager_fault_seconds", Change::Histogram(pairs))
                    if series.label("stage") == "total" =>
                {
                    let source = series.label("source").to_owned();
                    let durations = self.fault_total.entry(source).or_default();
                    for &(ns, count) in pairs {
                        durations.record_ns(ns, count);
                    }
                }
                ("pando_pager_pages_installed_total", Change::Counter(pages)) => {
                    let source = series.label("source").to_owned();
                    let sum = self.installed_pages.entry(source).or_default();
                    *sum = sum.saturating_add(*pages);
                }
                (name, Change::Counter(increase)) => {
                    let sum = self.counters.entry(name.to_owned()).or_default();
                    *sum = sum.saturating_add(*increase);
                }
                _ => (),
            }
        }
    }

    /// A counter's sum over all its labels.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::relay::Series;

    #[test]
    fn no_claim_goes_beyond_what_a_number_holds() {
        let series = |name: &str| Series {
            name: name.into(),
            labels: Vec::new(),
        };
        let installed = "pando_pager_pages_installed_total";
        let delta = [series("a"), series(installed)]
            .map(|series| (series, Change::Counter(u64::MAX)))
            .to_vec();
        let mut stats = PagerStats::default();
        stats.add(&delta);
        stats.add(&delta);
        assert_eq!(stats.counter("a"), u64::MAX);
        assert_eq!(stats.installed_pages[""], u64::MAX);
    }

    #[test]
    fn percentiles_are_in_microseconds() {
        let mut durations = Durations::default();
        assert_eq!(durations.percentiles().count, 0);
        for ms in 1..=100 {
            durations.record(Duration::from_millis(ms));
        }
        let p = durations.percentiles();
        assert_eq!(p.count, 100);
        assert!((49_900.0..50_200.0).contains(&p.p50_us), "{}", p.p50_us);
        assert!((98_900.0..99_300.0).contains(&p.p99_us), "{}", p.p99_us);
        assert!(p.max_us >= 100_000.0);
    }
}
