#![forbid(unsafe_code)]
//! What one more clone costs this host, everything counted: how much `MemAvailable` falls from start
//! to start. Pure.

use std::collections::VecDeque;

use serde::Serialize;

/// Starts that are looked back on.
const WINDOW: usize = 512;
/// Blocks that the window is cut into; each gives one slope.
const BLOCKS: usize = 8;
/// Fewest starts that say anything: two for each block.
const FEWEST: usize = 2 * BLOCKS;
/// Two-sided 95 % point of Student's distribution with `BLOCKS - 1` degrees of freedom.
const STUDENT_95: f64 = 2.365;

/// What one more clone costs, as the last starts showed it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MarginalCost {
    /// Bytes by which available memory fell with each clone.
    pub bytes: f64,
    /// Half the width of the 95 % interval around it.
    pub plus_minus_bytes: f64,
    /// Starts that this was found from.
    pub starts: usize,
}

impl MarginalCost {
    /// The highest cost that is not unlikely, for arithmetic that must not promise too much.
    pub fn upper_bytes(&self) -> f64 {
        self.bytes + self.plus_minus_bytes
    }
}

/// Available memory after each of the last starts.
///
/// The slope is taken over blocks of starts, and its uncertainty from how the blocks differ: what
/// else goes on on the host wanders, so that the residuals of one straight line through all samples
/// would make it look far more certain than it is. Memory that clones take later than at their start is
/// in the slope as far as it was taken while others started.
#[derive(Debug, Default)]
pub struct Marginal {
    /// How many clones lived, and what was available then.
    samples: VecDeque<(u64, u64)>,
}

impl Marginal {
    /// A clone has started: `live` of them are alive, and this much memory is available.
    pub fn started(&mut self, live: u64, available_bytes: u64) {
        // A clone that went took memory back: what was seen before is of another line.
        if self
            .samples
            .back()
            .is_some_and(|&(before, _)| live <= before)
        {
            self.samples.clear();
        }
        if self.samples.len() == WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back((live, available_bytes));
    }

    /// A clone has ended.
    pub fn ended(&mut self) {
        self.samples.clear();
    }

    /// The cost; `None` while too few clones have started in a row.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn cost(&self) -> Option<MarginalCost> {
        let starts = self.samples.len();
        if starts < FEWEST {
            return None;
        }
        let slope = |from: usize, to: usize| {
            let ((clones, high), (more, low)) = (self.samples[from], self.samples[to]);
            (high as f64 - low as f64) / (more - clones) as f64
        };
        let last = starts - 1;
        let edge = |block: usize| block * last / BLOCKS;
        let slopes: Vec<f64> = (0..BLOCKS)
            .map(|block| slope(edge(block), edge(block + 1)))
            .collect();
        let count = BLOCKS as f64;
        let mean = slopes.iter().sum::<f64>() / count;
        let squares = slopes
            .iter()
            .map(|slope| (slope - mean).powi(2))
            .sum::<f64>();
        let deviation = (squares / (count - 1.0)).sqrt();
        Some(MarginalCost {
            bytes: slope(0, last),
            plus_minus_bytes: STUDENT_95 * deviation / count.sqrt(),
            starts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(costs: impl Iterator<Item = i64>) -> Option<MarginalCost> {
        let mut marginal = Marginal::default();
        let mut available = 1_i64 << 40;
        for (live, cost) in (1..).zip(costs) {
            available -= cost;
            marginal.started(live, available.unsigned_abs());
        }
        marginal.cost()
    }

    #[test]
    fn a_constant_cost_is_found_without_doubt() {
        let cost = seen(std::iter::repeat_n(300_000, 1000)).unwrap();
        assert_eq!((cost.bytes, cost.plus_minus_bytes), (300_000.0, 0.0));
        assert_eq!(cost.starts, WINDOW);
        assert!(seen(std::iter::repeat_n(300_000, FEWEST - 1)).is_none());
    }

    #[test]
    fn a_clone_that_ends_begins_a_new_line() {
        let mut marginal = Marginal::default();
        (0..100).for_each(|live| marginal.started(live, (1 << 40) - live * 1000));
        assert!(marginal.cost().is_some());
        marginal.ended();
        assert!(marginal.cost().is_none());
        (0..50).for_each(|live| marginal.started(live, (1 << 40) - live * 2000));
        assert_eq!(marginal.cost().unwrap().bytes, 2000.0);
        marginal.started(3, 1 << 40);
        assert!(marginal.cost().is_none(), "as if another had ended unheard");
    }

    proptest! {
        /// Over all the noise the true cost lies in the interval nearly always; the fixed seed of the
        /// noise keeps this from failing once in twenty.
        #[test]
        fn noise_widens_the_interval(noise in 1_i64..1_000_000) {
            let mut state = 0x2545_f491_4f6c_dd1d_u64;
            let costs = (0..400).map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                500_000 + (state >> 33).cast_signed() % (2 * noise) - noise
            });
            let cost = seen(costs).unwrap();
            prop_assert!(cost.plus_minus_bytes > 0.0);
            prop_assert!((cost.bytes - 500_000.0).abs() <= 2.0 * cost.plus_minus_bytes + 1.0);
        }

        #[test]
        fn no_history_panics(history: Vec<(u64, u64)>) {
            let mut marginal = Marginal::default();
            for (live, available) in history {
                marginal.started(live, available);
                let _ = marginal.cost();
            }
        }
    }
}
