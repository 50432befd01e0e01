#![forbid(unsafe_code)]
//! What one more clone costs this host, everything counted: how much `MemAvailable` falls from clone
//! to clone. Pure.

use serde::Serialize;

/// Most samples that are kept; from then on every other one is.
const SAMPLES: usize = 512;
/// Pieces that the samples are cut into; each gives one difference.
const BLOCKS: usize = 16;
/// Fewest samples that say anything: two for each block.
const FEWEST: usize = 2 * BLOCKS;
/// Two-sided 95 % point of Student's distribution with `BLOCKS - 2` degrees of freedom.
const STUDENT_95: f64 = 2.145;
/// Below this share of the whole, processes that are made but do not run yet change nothing.
const NEGLIGIBLE: f64 = 1e-3;
/// Below this, what is made and what runs cannot be told apart.
const SINGULAR: f64 = 1e-4;

/// What one more clone costs, as the last starts showed it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MarginalCost {
    /// Bytes by which available memory falls with each clone.
    pub bytes: f64,
    /// Half the width of the 95 % interval around it.
    pub plus_minus_bytes: f64,
    /// Starts that this was found from.
    pub starts: u64,
}

impl MarginalCost {
    /// The cost in whole bytes, zero for one below zero: on a busy host it can be seen so.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float converts to an integer by saturation, which is what is wanted"
    )]
    pub fn whole_bytes(&self) -> u64 {
        self.bytes as u64
    }
}

/// How many processes there were, how many of them ran, and what memory was available.
#[derive(Debug, Clone, Copy)]
struct Sample {
    made: u64,
    running: u64,
    available_bytes: u64,
}

/// Available memory while clones are made and start, none ending.
///
/// A clone takes memory when its process is made and again until it runs, and many processes may
/// be made before the first of them runs. So each difference between samples is explained by two
/// numbers, processes made and clones that began to run, and a clone's cost is the sum of both shares.
/// Differences, not levels: what else goes on on the host wanders, and a line through levels would
/// look far more certain than it is. Memory that clones take later is in the cost as far as they took it
/// while others started.
#[derive(Debug)]
pub struct Marginal {
    samples: Vec<Sample>,
    /// Every how many samples one is kept, and how many were passed over.
    stride: usize,
    passed: usize,
}

impl Default for Marginal {
    fn default() -> Self {
        Self {
            samples: Vec::new(),
            stride: 1,
            passed: 0,
        }
    }
}

impl Marginal {
    /// Now `made` processes are alive, `running` of them run, and this much memory is available.
    pub fn sample(&mut self, made: u64, running: u64, available_bytes: u64) {
        // A clone that went gave memory back: what was seen before is of another line.
        let shrank = |last: &Sample| made < last.made || running < last.running;
        if self.samples.last().is_some_and(shrank) {
            *self = Self::default();
        }
        self.passed += 1;
        if self.passed < self.stride {
            return;
        }
        self.passed = 0;
        if self.samples.len() == SAMPLES {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride *= 2;
        }
        self.samples.push(Sample {
            made,
            running,
            available_bytes,
        });
    }

    /// The cost; `None` while too few clones have started in a row, or only half of what a start is
    /// was seen.
    pub fn cost(&self) -> Option<MarginalCost> {
        if self.samples.len() < FEWEST {
            return None;
        }
        let last = self.samples.len() - 1;
        let edge = |block: usize| self.samples[block * last / BLOCKS];
        // Of each block: clones (processes and runs, halved), their difference, and memory taken.
        let blocks: Vec<(f64, f64, f64)> = (0..BLOCKS)
            .map(|block| difference(edge(block), edge(block + 1)))
            .collect();
        let sum = |of: fn(&(f64, f64, f64)) -> f64| blocks.iter().map(of).sum::<f64>();
        let (uu, vv, uv) = (sum(|b| b.0 * b.0), sum(|b| b.1 * b.1), sum(|b| b.0 * b.1));
        let (uy, vy) = (sum(|b| b.0 * b.2), sum(|b| b.1 * b.2));
        if uu <= 0.0 {
            return None;
        }
        let (bytes, other, variance) = if vv <= NEGLIGIBLE * uu {
            (uy / uu, 0.0, 1.0 / uu)
        } else {
            let determinant = uu * vv - uv * uv;
            if determinant <= SINGULAR * uu * vv {
                return None;
            }
            let bytes = (vv * uy - uv * vy) / determinant;
            let other = (uu * vy - uv * uy) / determinant;
            (bytes, other, vv / determinant)
        };
        let squares: f64 = blocks
            .iter()
            .map(|(u, v, y)| (y - bytes * u - other * v).powi(2))
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let freedom = (BLOCKS - 2) as f64;
        Some(MarginalCost {
            bytes,
            plus_minus_bytes: STUDENT_95 * (squares / freedom * variance).sqrt(),
            starts: self.samples[last].running - self.samples[0].running,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn difference(from: Sample, to: Sample) -> (f64, f64, f64) {
    let made = (to.made - from.made) as f64;
    let running = (to.running - from.running) as f64;
    let taken = from.available_bytes as f64 - to.available_bytes as f64;
    (f64::midpoint(made, running), (made - running) / 2.0, taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MADE: i64 = 300_000;
    const RUNS: i64 = 200_000;

    /// Makes `count` clones, at most `ahead` of them before they run, with noise on each step.
    fn seen(count: u64, ahead: u64, noise: i64) -> Option<MarginalCost> {
        let mut marginal = Marginal::default();
        let (mut made, mut running) = (0, 0);
        let mut available = 1_i64 << 40;
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        while running < count {
            if made < count && made - running < ahead {
                made += 1;
                available -= MADE;
            } else {
                running += 1;
                available -= RUNS;
            }
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            available += (state >> 33).cast_signed() % (2 * noise + 1) - noise;
            marginal.sample(made, running, available.unsigned_abs());
        }
        marginal.cost()
    }

    #[test]
    fn a_constant_cost_is_found_however_many_are_made_ahead() {
        for (count, ahead) in [(500, 1), (500, 8), (100, 100), (2000, 2000), (2000, 300)] {
            let cost = seen(count, ahead, 0).unwrap();
            let error = (cost.bytes - 500_000.0).abs();
            assert!(error < 10_000.0, "{count} clones, {ahead} ahead: {cost:?}");
            assert!(cost.plus_minus_bytes < 20_000.0, "{cost:?}");
        }
        assert!(seen(8, 8, 0).is_none(), "too few");
    }

    #[test]
    fn half_of_a_start_is_no_start() {
        let mut marginal = Marginal::default();
        (0..200).for_each(|made| marginal.sample(made, 0, (1 << 40) - made * 1000));
        assert_eq!(marginal.cost(), None);
    }

    #[test]
    fn a_clone_that_ends_begins_a_new_line() {
        let mut marginal = Marginal::default();
        let mut go = |live: std::ops::Range<u64>, bytes: u64| {
            live.for_each(|live| marginal.sample(live, live, (1 << 40) - live * bytes));
            marginal.cost()
        };
        assert_eq!(go(0..100, 1000).unwrap().bytes, 1000.0);
        assert_eq!(go(98..99, 1000), None);
        assert_eq!(go(99..200, 2000).unwrap().starts, 101);
    }

    proptest! {
        #[test]
        fn noise_widens_the_interval(noise in 1_i64..1_000_000, ahead in 1_u64..300) {
            let cost = seen(300, ahead, noise).unwrap();
            prop_assert!(cost.plus_minus_bytes > 0.0);
            let error = (cost.bytes - 500_000.0).abs();
            prop_assert!(error <= 3.0 * cost.plus_minus_bytes + 5000.0, "{error} {cost:?}");
        }

        #[test]
        fn no_history_panics(history: Vec<(u64, u64, u64)>) {
            let mut marginal = Marginal::default();
            for (made, running, available) in history {
                marginal.sample(made, running, available);
                let _ = marginal.cost();
            }
        }
    }
}
