#![forbid(unsafe_code)]
//! Metrics of a clone's process on their way to its supervisor, which has the one exporter.
//!
//! The process records with the crate `metrics` as if the exporter were in it. A [`Relay`] keeps
//! what was recorded and gives it away as a [`Delta`]: counters as differences, gauges as values,
//! histograms as pairs of value and count with two significant digits.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram as Hdr;
use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit,
};
use metrics_util::registry::{AtomicStorage, Registry};
use serde::{Deserialize, Serialize};

/// Longest duration that a histogram tells apart, in nanoseconds: one hour.
const MAX_NS: u64 = 3_600_000_000_000;
/// Most bytes that the length of an encoded delta takes.
const LENGTH_BYTES: usize = 10;
/// Most samples of histograms that one delta adds: more than a pager can have in the second that a
/// delta is of. Each takes time and memory here, and whoever sends a delta may claim any number.
const MAX_SAMPLES: u64 = 1 << 18;
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
    /// The value of each gauge that was given away last.
    gauges: Arc<Mutex<HashMap<Key, f64>>>,
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
            gauges: Arc::default(),
        }
    }

    /// The series that `record` makes, each with a change of its kind.
    pub(super) fn registered(record: impl FnOnce()) -> Delta {
        let relay = Self::new();
        metrics::with_local_recorder(&relay, record);
        let mut all = Delta::new();
        let registry = &relay.registry;
        registry.visit_counters(|key, _| all.push((Series::of(key), Change::Counter(0))));
        registry.visit_gauges(|key, _| all.push((Series::of(key), Change::Gauge(0.0))));
        registry.visit_histograms(|key, _| {
            all.push((Series::of(key), Change::Histogram(Vec::new())));
        });
        all
    }

    /// Takes what was recorded since the last call; nothing is in it that did not change.
    pub fn take(&self) -> Delta {
        let mut delta = Delta::new();
        self.registry.visit_counters(|key, counter| {
            let increase = counter.swap(0, Ordering::Relaxed);
            if increase > 0 {
                delta.push((Series::of(key), Change::Counter(increase)));
            }
        });
        let mut gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        self.registry.visit_gauges(|key, gauge| {
            let value = f64::from_bits(gauge.load(Ordering::Relaxed));
            if gauges.get(key) != Some(&value) {
                gauges.insert(key.clone(), value);
                delta.push((Series::of(key), Change::Gauge(value)));
            }
        });
        self.registry.visit_histograms(|key, bucket| {
            // Made with the first value: most histograms of most clones stay empty.
            let mut hdr: Option<Hdr<u64>> = None;
            bucket.clear_with(|seconds| {
                if hdr.is_none() && !seconds.is_empty() {
                    hdr = Hdr::new_with_max(MAX_NS, 2).ok();
                }
                if let Some(hdr) = &mut hdr {
                    seconds
                        .iter()
                        .for_each(|&value| hdr.saturating_record(to_ns(value)));
                }
            });
            if let Some(hdr) = hdr {
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

/// Cuts a delta into pieces that take at most `max_bytes` each when they are encoded; a single
/// series, which is never cut, stays below 128 KiB by the digits that a histogram keeps.
pub fn split(delta: Delta, max_bytes: usize) -> Vec<Delta> {
    let mut pieces = Vec::new();
    let (mut piece, mut piece_bytes) = (Delta::new(), LENGTH_BYTES);
    for change in delta {
        let bytes = postcard::experimental::serialized_size(&change).unwrap_or(max_bytes);
        if !piece.is_empty() && piece_bytes + bytes > max_bytes {
            pieces.push(std::mem::take(&mut piece));
            piece_bytes = LENGTH_BYTES;
        }
        piece_bytes += bytes;
        piece.push(change);
    }
    if !piece.is_empty() {
        pieces.push(piece);
    }
    pieces
}

/// Records a delta with this process's own recorder. A gauge is not set, since other processes
/// have the same one: the difference to `before`, this process's last value, is added. Samples beyond
/// what a process can have are dropped.
pub fn replay(delta: &Delta, mut before: impl FnMut(&Series, f64) -> f64) {
    let mut room = MAX_SAMPLES;
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
                    let count = count.min(room);
                    room -= count;
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
        assert_eq!(second, Delta::new(), "an idle process says nothing");
        metrics::with_local_recorder(&relay, || metrics::gauge!("inflight").set(0.0));
        let third = relay.take();
        assert_eq!(change(&third, "inflight"), Some(&Change::Gauge(0.0)));
        assert_eq!(third.len(), 1);
    }

    #[test]
    fn a_long_delta_is_cut_into_pieces_within_the_bound() {
        let series = |number: u32| Series {
            name: format!("family_{number}"),
            labels: vec![("template".into(), "x".repeat(200))],
        };
        let delta: Delta = (0..3000).map(|n| (series(n), Change::Counter(1))).collect();
        let bound = 10_000;
        let pieces = split(delta.clone(), bound);
        assert!(pieces.len() > 60, "{}", pieces.len());
        for piece in &pieces {
            assert!(postcard::to_stdvec(piece).unwrap().len() <= bound);
        }
        assert_eq!(pieces.concat(), delta, "nothing is lost");
        assert!(split(Delta::new(), bound).is_empty());
    }

    #[test]
    fn the_longest_histogram_fits_into_a_message() {
        let relay = Relay::new();
        metrics::with_local_recorder(&relay, || {
            let histogram = metrics::histogram!("fault_seconds");
            let mut seconds = 1e-9;
            while seconds < 4000.0 {
                histogram.record(seconds);
                seconds *= 1.002;
            }
        });
        let bytes = postcard::to_stdvec(&relay.take()).unwrap().len();
        assert!((1000..100_000).contains(&bytes), "{bytes}");
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
    fn no_process_adds_more_samples_than_it_can_have() {
        let series = Series {
            name: "fault_seconds".into(),
            labels: Vec::new(),
        };
        let claimed = vec![(1000, 5), (2000, u64::MAX), (3000, u64::MAX)];
        let supervisor = Relay::new();
        metrics::with_local_recorder(&supervisor, || {
            replay(&vec![(series, Change::Histogram(claimed))], |_, _| 0.0);
        });
        let sum = supervisor.take();
        let Some(Change::Histogram(pairs)) = change(&sum, "fault_seconds") else {
            panic!("a histogram")
        };
        let samples: u64 = pairs.iter().map(|(_, count)| count).sum();
        assert_eq!(samples, MAX_SAMPLES);
    }

    #[test]
    fn durations_out_of_range_are_kept_in_range() {
        assert_eq!(to_ns(-1.0), 0);
        assert_eq!(to_ns(f64::NAN), 0);
        assert_eq!(to_ns(f64::INFINITY), u64::MAX);
    }
}
