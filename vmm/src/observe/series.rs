#![forbid(unsafe_code)]
//! Which series other processes may add to this one's metrics: those of a pager, of this template, and of
//! discards that were refused.
//! They are this program's own, but a guest may have taken one over, and what is kept for a series is
//! kept for ever.

use std::collections::HashSet;
use std::mem::{Discriminant, discriminant};

use super::metrics::register_discards;
use super::relay::{Change, Delta, Relay, Series};

/// The label that says of which template a series is.
const TEMPLATE: &str = "template";
/// Most that a gauge can be: sums of whole numbers up to here, of two million processes, are exact.
const MAX_GAUGE: f64 = 4_294_967_296.0;
/// Most that a counter goes up at once: bytes of many seconds.
const MAX_COUNT: u64 = 1 << 48;
/// Longest time of a histogram, an hour, which is more than anything of a pager takes.
const MAX_NS: u64 = 3_600_000_000_000;

/// The series that a pager of one template moves.
#[derive(Debug)]
pub struct KnownSeries {
    template: String,
    known: HashSet<(Series, Discriminant<Change>)>,
    has_refused: bool,
}

impl KnownSeries {
    /// Those of a pager of `template`, as metrics call it.
    pub fn of(template: &str) -> Self {
        let all = Relay::registered(|| {
            pando_pager::metrics::register(template);
            register_discards();
        });
        Self {
            template: template.to_owned(),
            known: all
                .iter()
                .map(|(s, c)| (s.clone(), discriminant(c)))
                .collect(),
            has_refused: false,
        }
    }

    /// Drops from a delta what no pager records, and says so once. What is left is of this template,
    /// whatever it says.
    pub fn sift(&mut self, delta: &mut Delta) {
        delta.retain_mut(|(series, change)| {
            for (_, value) in series
                .labels
                .iter_mut()
                .filter(|(name, _)| name == TEMPLATE)
            {
                value.clone_from(&self.template);
            }
            let key = (series, discriminant(change));
            let is_taken = is_number(change) && self.known.contains(&(key.0.clone(), key.1));
            if !is_taken && !std::mem::replace(&mut self.has_refused, true) {
                let name: String = key.0.name.chars().take(80).collect();
                tracing::warn!(
                    name,
                    "a process recorded what is no metric of a clone: it is dropped"
                );
            }
            is_taken
        });
    }
}

/// What is added cannot be taken away again: a gauge that is no number once would be none for ever, and a sum
/// that is too large takes in nothing more.
fn is_number(change: &Change) -> bool {
    match change {
        // The fraction of what is no number is none either.
        Change::Gauge(value) => value.abs() <= MAX_GAUGE && value.fract() == 0.0,
        Change::Counter(more) => *more <= MAX_COUNT,
        Change::Histogram(samples) => samples.iter().all(|(ns, _)| *ns <= MAX_NS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, labels: &[(&str, &str)]) -> Series {
        let own = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        Series {
            name: name.to_owned(),
            labels: labels.iter().map(own).collect(),
        }
    }

    #[test]
    fn what_a_pager_records_is_taken_for_its_template_and_nothing_else() {
        let mut known = KnownSeries::of("aspen");
        let inflight = |template| series("pando_pager_inflight_reads", &[(TEMPLATE, template)]);
        let poisoned = || series("pando_pager_poisoned_pages_total", &[(TEMPLATE, "aspen")]);
        let mut delta = vec![
            (inflight("another"), Change::Gauge(2.0)),
            (poisoned(), Change::Counter(1)),
            (series("pando_clones", &[]), Change::Counter(1)),
            (
                series("pando_pager_invented_total", &[]),
                Change::Counter(1),
            ),
            (inflight("aspen"), Change::Counter(1)),
            (inflight("aspen"), Change::Gauge(f64::NAN)),
            (inflight("aspen"), Change::Gauge(-1e300)),
            (inflight("aspen"), Change::Gauge(0.5)),
            (poisoned(), Change::Counter(u64::MAX)),
            (
                series(
                    "pando_pager_faults_total",
                    &[(TEMPLATE, "aspen"), ("kind", "new")],
                ),
                Change::Counter(1),
            ),
        ];
        known.sift(&mut delta);
        assert_eq!(
            delta,
            [
                (inflight("aspen"), Change::Gauge(2.0)),
                (poisoned(), Change::Counter(1))
            ]
        );
    }
}
