#![forbid(unsafe_code)]
//! Metrics of a clone's process on their way to its supervisor, which has the one exporter.
//!
//! The process records with the crate `metrics` as if the exporter were in it. A [`Relay`] keeps
//! what was recorded and gives it away as a [`Delta`]: counters as differences, gauges as values,
//! histograms as pairs of value and count with two significant digits.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hdrhistogram::Histogram as Hdr;
use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit,
};
use metrics_util::registry::{AtomicStorage, Registry};
use serde::{Deserialize, Serialize};

/// Longest duration that a histogram tells apart, in nanoseconds: one hour.
const MAX_NS: u64 = 3_600_000_000_000;
const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// Name and labels of one series.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Series {
    /// The family.
    pub name: String,
    /// Label names and values.
    pub labels: Vec<(String, String)>,
}

impl Series {
    fn of(key: &Key) -> Self {
        let labels = key
            .labels()
            .map(|label| (label.key().to_owned(), label.value().to_owned()))
            .collect();
        Self {
            name: key.name().to_owned(),
            labels,
        }
    }

    fn key(&self) -> Key {
        let labels: Vec<Label> = self
            .labels
            .iter()
            .map(|(name, value)| Label::new(name.clone(), value.clone()))
            .collect();
        Key::from_parts(self.name.clone(), labels)
    }

    /// The value of a label, or an empty string.
    pub fn label(&self, name: &str) -> &str {
        self.labels
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value)
    }
}

/// What one series recorded since the last time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Change {
    /// A counter went up by this.
    Counter(u64),
    /// A gauge is now this.
    Gauge(f64),
    /// A histogram of durations got these: nanoseconds and how often.
    Histogram(Vec<(u64, u64)>),
}

/// What a process recorded since the last time.
pub type Delta = Vec<(Series, Change)>;

/// Collects what this process records.
#[derive(Debug, Clone)]
pub struct Relay {
    registry: Arc<Registry<Key, AtomicStorage>>,
}

impl Relay {
    /// Makes a relay and installs it as this process's recorder; `None` when there is one already.
    pub fn install() -> Option<Self> {
        let relay = Self::new();
        metrics::set_global_recorder(relay.clone()).ok()?;
        Some(relay)
    }

    fn new() -> Self {
        Self {
            registry: Arc::new(Registry::atomic()),
        }
    }

    /// Takes what was recorded since the last call.
    pub fn take(&self) -> Delta {
        let mut delta = Delta::new();
        self.registry.visit_counters(|key, counter| {
            let increase = counter.swap(0, Ordering::Relaxed);
            if increase > 0 {
                delta.push((Series::of(key), Change::Counter(increase)));
            }
        });
        self.registry.visit_gauges(|key, gauge| {
            let value = f64::from_bits(gauge.load(Ordering::Relaxed));
            delta.push((Series::of(key), Change::Gauge(value)));
        });
        self.registry.visit_histograms(|key, bucket| {
            let Ok(mut hdr) = Hdr::<u64>::new_with_max(MAX_NS, 2) else {
                return;
            };
            bucket.clear_with(|seconds| {
                for &value in seconds {
                    hdr.saturating_record(to_ns(value));
                }
            });
            if !hdr.is_empty() {
                let pairs = hdr
                    .iter_recorded()
                    .map(|step| (step.value_iterated_to(), step.count_at_value()))
                    .collect();
                delta.push((Series::of(key), Change::Histogram(pairs)));
            }
        });
        delta
    }
}

/// Records a delta with this process's own recorder. A gauge is not set, since other processes
/// have the same one: the difference to `before`, this process's last value, is added.
pub fn replay(delta: &Delta, mut before: impl FnMut(&Series, f64) -> f64) {
    for (series, change) in delta {
        let key = series.key();
        metrics::with_recorder(|recorder| match change {
            Change::Counter(increase) => {
                recorder
                    .register_counter(&key, &METADATA)
                    .increment(*increase);
            }
            Change::Gauge(value) => {
                let difference = value - before(series, *value);
                recorder
                    .register_gauge(&key, &METADATA)
                    .increment(difference);
            }
            Change::Histogram(pairs) => {
                let histogram = recorder.register_histogram(&key, &METADATA);
                for &(ns, count) in pairs {
                    histogram
                        .record_many(to_seconds(ns), usize::try_from(count).unwrap_or(usize::MAX));
                }
            }
        });
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float converts to an integer by saturation, which is what is wanted"
)]
fn to_ns(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

#[expect(
    clippy::cast_precision_loss,
    reason = "two significant digits are kept"
)]
fn to_seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

impl Recorder for Relay {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.registry
            .get_or_create_counter(key, |counter| Counter::from_arc(Arc::clone(counter)))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.registry
            .get_or_create_gauge(key, |gauge| Gauge::from_arc(Arc::clone(gauge)))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.registry
            .get_or_create_histogram(key, |histogram| Histogram::from_arc(Arc::clone(histogram)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn record(relay: &Relay) {
        metrics::with_local_recorder(relay, || {
            metrics::counter!("pages_total", "source" => "disk").increment(3);
            metrics::gauge!("inflight").set(2.0);
            for us in [10.0, 10.0, 5000.0] {
                metrics::histogram!("fault_seconds").record(us / 1e6);
            }
        });
    }

    fn change<'a>(delta: &'a Delta, name: &str) -> Option<&'a Change> {
        delta
            .iter()
            .find(|(series, _)| series.name == name)
            .map(|(_, change)| change)
    }

    #[test]
    fn what_is_taken_is_taken_once() {
        let relay = Relay::new();
        record(&relay);
        let first = relay.take();
        assert_eq!(change(&first, "pages_total"), Some(&Change::Counter(3)));
        let Some(Change::Histogram(pairs)) = change(&first, "fault_seconds") else {
            panic!("a histogram")
        };
        assert_eq!(pairs.iter().map(|(_, count)| count).sum::<u64>(), 3);
        let second = relay.take();
        assert_eq!(change(&second, "pages_total"), None);
        assert_eq!(change(&second, "fault_seconds"), None);
        assert_eq!(change(&second, "inflight"), Some(&Change::Gauge(2.0)));
    }

    #[test]
    fn two_processes_add_up_in_the_supervisor() {
        let (one, two, supervisor) = (Relay::new(), Relay::new(), Relay::new());
        record(&one);
        record(&two);
        let mut last = HashMap::new();
        for (process, relay) in [(1, &one), (2, &two), (1, &one)] {
            let delta = relay.take();
            metrics::with_local_recorder(&supervisor, || {
                replay(&delta, |series, value| {
                    last.insert((process, series.clone()), value).unwrap_or(0.0)
                });
            });
        }
        let sum = supervisor.take();
        assert_eq!(change(&sum, "pages_total"), Some(&Change::Counter(6)));
        assert_eq!(change(&sum, "inflight"), Some(&Change::Gauge(4.0)));
        let Some(Change::Histogram(pairs)) = change(&sum, "fault_seconds") else {
            panic!("a histogram")
        };
        assert_eq!(pairs.iter().map(|(_, count)| count).sum::<u64>(), 6);
        let total_ns: u64 = pairs.iter().map(|(ns, count)| ns * count).sum();
        assert!(
            (9_900_000..10_300_000).contains(&total_ns),
            "{total_ns} ns of 10.04 ms"
        );
    }

    #[test]
    fn durations_out_of_range_are_kept_in_range() {
        assert_eq!(to_ns(-1.0), 0);
        assert_eq!(to_ns(f64::NAN), 0);
        assert_eq!(to_ns(f64::INFINITY), u64::MAX);
    }
}
