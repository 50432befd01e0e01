#![forbid(unsafe_code)]
//! From samples to figures, and variants measured in turns.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;

/// Half width of a 95 % interval of the median, in standard deviations of the rank.
const NORMAL_95: f64 = 1.96;
/// Significant decimal digits of the percentiles.
const DIGITS: u8 = 3;

/// What a set of durations comes to. All times in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// Number of samples.
    pub(crate) samples: usize,
    /// The shortest.
    pub(crate) min_ns: u64,
    /// The median.
    pub(crate) p50_ns: u64,
    /// 90 % are at most this.
    pub(crate) p90_ns: u64,
    /// 99 % are at most this.
    pub(crate) p99_ns: u64,
    /// The longest.
    pub(crate) max_ns: u64,
    /// The mean.
    pub(crate) mean_ns: f64,
    /// Median of the distances to the median: the spread, not moved by outliers.
    pub(crate) mad_ns: u64,
    /// 95 % confidence interval of the median, from the ranks of the samples.
    pub(crate) p50_interval_ns: (u64, u64),
}

impl Summary {
    /// Sums up `samples`, of which there must be at least one.
    pub(crate) fn of(samples: &[Duration]) -> Result<Self> {
        ensure!(!samples.is_empty(), "nothing was measured");
        let mut sorted: Vec<u64> = samples.iter().copied().map(nanoseconds).collect();
        sorted.sort_unstable();
        let mut histogram = Histogram::<u64>::new(DIGITS)?;
        for &sample in &sorted {
            histogram.record(sample)?;
        }
        let p50_ns = median(&sorted);
        let mut distances: Vec<u64> = sorted.iter().map(|s| s.abs_diff(p50_ns)).collect();
        distances.sort_unstable();
        let (min_ns, max_ns) = (sorted[0], sorted[sorted.len() - 1]);
        Ok(Self {
            samples: sorted.len(),
            min_ns,
            p50_ns,
            // A bucket of the histogram may end above the longest sample.
            p90_ns: histogram.value_at_quantile(0.90).min(max_ns),
            p99_ns: histogram.value_at_quantile(0.99).min(max_ns),
            max_ns,
            mean_ns: histogram.mean(),
            mad_ns: median(&distances),
            p50_interval_ns: median_interval(&sorted),
        })
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The median of sorted samples; of the two in the middle, their mean.
fn median(sorted: &[u64]) -> u64 {
    let upper = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[upper]
    } else {
        sorted[upper - 1].midpoint(sorted[upper])
    }
}

/// The samples whose ranks bound the median with 95 % confidence (normal approximation of the
/// binomial distribution of the rank; few samples give all of their range).
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "ranks, rounded and clamped to the samples"
)]
fn median_interval(sorted: &[u64]) -> (u64, u64) {
    let count = sorted.len() as f64;
    let half_width = NORMAL_95 * count.sqrt() / 2.0;
    let low = (count / 2.0 - half_width).floor().max(0.0) as usize;
    let high = (count / 2.0 + half_width).ceil() as usize;
    (sorted[low], sorted[high.min(sorted.len() - 1)])
}

/// One way of doing something, to be compared with others.
pub(crate) struct Variant<'a> {
    name: String,
    measure: Box<dyn FnMut() -> Result<Vec<Duration>> + 'a>,
}

impl<'a> Variant<'a> {
    /// A variant; each call of `measure` gives the samples of one round.
    pub(crate) fn new(
        name: impl Into<String>,
        measure: impl FnMut() -> Result<Vec<Duration>> + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            measure: Box::new(measure),
        }
    }
}

/// Measures variants in turns (A B A B ...), so that what drifts on the machine hits all of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Runner {
    /// Rounds that count.
    pub(crate) rounds: u32,
    /// Rounds before them that are thrown away.
    pub(crate) warm_up_rounds: u32,
}

/// One variant's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Measured {
    /// Which variant.
    pub(crate) name: String,
    /// All rounds together.
    pub(crate) summary: Summary,
    /// The median of each round, in nanoseconds.
    pub(crate) round_p50_ns: Vec<u64>,
    /// How the variant stands to the first one.
    pub(crate) ratio: Ratio,
}

/// A variant's median over the first variant's, round by round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Ratio {
    /// Median of the rounds' ratios.
    pub(crate) p50: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
}

impl Runner {
    /// Runs all variants; the first is the baseline of the ratios.
    pub(crate) fn run(&self, variants: &mut [Variant<'_>]) -> Result<Vec<Measured>> {
        ensure!(self.rounds > 0, "no round to measure");
        let mut rounds = vec![Vec::new(); variants.len()];
        for round in 0..self.warm_up_rounds + self.rounds {
            for (variant, kept) in variants.iter_mut().zip(&mut rounds) {
                let samples = (variant.measure)()
                    .with_context(|| format!("variant {}, round {round}", variant.name))?;
                if round >= self.warm_up_rounds {
                    kept.push(samples);
                }
            }
        }
        let medians = rounds
            .iter()
            .map(|rounds| {
                rounds
                    .iter()
                    .map(|samples| Ok(Summary::of(samples)?.p50_ns))
                    .collect()
            })
            .collect::<Result<Vec<Vec<u64>>>>()?;
        variants
            .iter()
            .zip(&rounds)
            .zip(&medians)
            .map(|((variant, rounds), own)| {
                Ok(Measured {
                    name: variant.name.clone(),
                    summary: Summary::of(&rounds.concat())?,
                    round_p50_ns: own.clone(),
                    ratio: Ratio::of(own, &medians[0]),
                })
            })
            .collect()
    }
}

impl Measured {
    /// How this variant stands to another that was measured in the same run.
    pub(crate) fn over(&self, other: &Self) -> Ratio {
        Ratio::of(&self.round_p50_ns, &other.round_p50_ns)
    }
}

/// Two ways that were measured side by side in many short rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Paired {
    /// The baseline.
    pub(crate) first: Summary,
    /// What is compared with it.
    pub(crate) second: Summary,
    /// The second over the first, pair by pair.
    pub(crate) ratio: Ratio,
    /// 95 % confidence interval of the median of the pairs' ratios.
    pub(crate) ratio_interval: (f64, f64),
}

/// Measures `pairs` of short rounds (A B, B A, A B ..): whatever drifts, and whoever goes first, weighs
/// on both alike.
pub(crate) fn paired(
    pairs: u32,
    mut first: impl FnMut() -> Result<Duration>,
    mut second: impl FnMut() -> Result<Duration>,
) -> Result<Paired> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        if pair % 2 == 0 {
            a.push(first()?);
            b.push(second()?);
        } else {
            b.push(second()?);
            a.push(first()?);
        }
    }
    let (own, baseline): (Vec<u64>, Vec<u64>) = b
        .iter()
        .zip(&a)
        .map(|(&b, &a)| (nanoseconds(b), nanoseconds(a)))
        .unzip();
    // As parts of a million: the interval is of ranks, which any scale keeps.
    let mut millionths: Vec<u64> = own
        .iter()
        .zip(&baseline)
        .map(|(&own, &baseline)| own.saturating_mul(1_000_000) / baseline.max(1))
        .collect();
    millionths.sort_unstable();
    let (first, second) = (Summary::of(&a)?, Summary::of(&b)?);
    let (low, high) = median_interval(&millionths);
    Ok(Paired {
        first,
        second,
        ratio: Ratio::of(&own, &baseline),
        ratio_interval: (low as f64 / 1e6, high as f64 / 1e6),
    })
}

impl Ratio {
    fn of(own: &[u64], baseline: &[u64]) -> Self {
        let mut ratios: Vec<f64> = own
            .iter()
            .zip(baseline)
            .map(|(&own, &baseline)| own as f64 / baseline.max(1) as f64)
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let upper = ratios.len() / 2;
        Self {
            p50: (ratios[(ratios.len() - 1) / 2] + ratios[upper]) / 2.0,
            min: ratios[0],
            max: ratios[ratios.len() - 1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn microseconds(values: impl IntoIterator<Item = u64>) -> Vec<Duration> {
        values.into_iter().map(Duration::from_micros).collect()
    }

    #[test]
    fn a_known_distribution_has_its_known_figures() {
        let summary = Summary::of(&microseconds((1..=1000).rev())).unwrap();
        assert_eq!(summary.samples, 1000);
        assert_eq!((summary.min_ns, summary.max_ns), (1_000, 1_000_000));
        assert_eq!(summary.p50_ns, 500_500);
        assert_eq!(summary.mad_ns, 250_000);
        assert_eq!(summary.p50_interval_ns, (470_000, 532_000));
        for (found, exact) in [(summary.p90_ns, 900_000), (summary.p99_ns, 990_000)] {
            assert!(found.abs_diff(exact) <= exact / 500, "{found} for {exact}");
        }
        assert!((summary.mean_ns - 500_500.0).abs() < 1_000.0);
    }

    #[test]
    fn one_sample_is_all_of_its_figures_and_none_is_an_error() {
        let summary = Summary::of(&microseconds([7])).unwrap();
        assert_eq!(
            (summary.p50_ns, summary.p99_ns, summary.mad_ns),
            (7_000, 7_000, 0)
        );
        assert_eq!(summary.p50_interval_ns, (7_000, 7_000));
        Summary::of(&[]).unwrap_err();
    }

    #[test]
    fn variants_take_turns_and_are_compared_round_by_round() {
        let order = std::cell::RefCell::new(String::new());
        let slow = std::cell::Cell::new(10);
        let mut variants = [
            Variant::new("a", || {
                order.borrow_mut().push('a');
                slow.set(slow.get() * 2);
                Ok(microseconds([slow.get()]))
            }),
            Variant::new("b", || {
                order.borrow_mut().push('b');
                Ok(microseconds([slow.get() * 3]))
            }),
        ];
        let runner = Runner {
            rounds: 3,
            warm_up_rounds: 1,
        };
        let measured = runner.run(&mut variants).unwrap();
        drop(variants);
        assert_eq!(order.into_inner(), "abababab");
        assert_eq!(measured[0].round_p50_ns, [40_000, 80_000, 160_000]);
        assert_eq!(
            measured[0].ratio,
            Ratio {
                p50: 1.0,
                min: 1.0,
                max: 1.0
            }
        );
        assert_eq!(
            measured[1].ratio,
            Ratio {
                p50: 3.0,
                min: 3.0,
                max: 3.0
            }
        );
    }

    #[test]
    fn pairs_alternate_and_a_drift_weighs_on_both() {
        let order = std::cell::RefCell::new(String::new());
        let drift = std::cell::Cell::new(1_000);
        let next = |name: char, factor: u64| {
            order.borrow_mut().push(name);
            drift.set(drift.get() + 10);
            Ok(Duration::from_nanos(drift.get() * factor))
        };
        let paired = paired(40, || next('a', 10), || next('b', 11)).unwrap();
        assert!(order.into_inner().starts_with("abbaabba"));
        assert!((paired.ratio.p50 - 1.1).abs() < 0.01, "{:?}", paired.ratio);
        let (low, high) = paired.ratio_interval;
        assert!(low <= paired.ratio.p50 && paired.ratio.p50 <= high);
    }

    #[test]
    fn a_variant_that_fails_is_named() {
        let mut variants = [Variant::new("broken", || anyhow::bail!("no KVM"))];
        let error = Runner {
            rounds: 1,
            warm_up_rounds: 0,
        }
        .run(&mut variants)
        .unwrap_err();
        assert_eq!(format!("{error:#}"), "variant broken, round 0: no KVM");
    }
}
