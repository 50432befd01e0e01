#![forbid(unsafe_code)]
//! What one more clone takes, from the memory that is available with different numbers alive. Pure.

use serde::Serialize;

/// A line through levels, by least squares.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Slope {
    /// Bytes by which available memory falls with each clone.
    pub(super) bytes: f64,
    /// The farthest that a level lies from the line, in bytes: with more than two levels it shows how
    /// much the host moved meanwhile.
    pub(super) farthest_bytes: f64,
    /// Levels, that of no clone included.
    pub(super) levels: usize,
}

impl Slope {
    /// Through `none_bytes`, available with no clone alive, and the `levels` of so many clones.
    /// `None` without a level.
    pub(super) fn through(
        none_bytes: u64,
        levels: impl Iterator<Item = (u32, u64)>,
    ) -> Option<Self> {
        let points: Vec<(f64, f64)> = std::iter::once((0, none_bytes))
            .chain(levels)
            .map(|(clones, available)| (f64::from(clones), none_bytes as f64 - available as f64))
            .collect();
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let (mut xx, mut xy) = (0.0, 0.0);
        for point in &points {
            xx += (point.0 - x) * (point.0 - x);
            xy += (point.0 - x) * (point.1 - y);
        }
        if xx <= 0.0 {
            return None;
        }
        let bytes = xy / xx;
        let distance = |point: &(f64, f64)| (point.1 - y - bytes * (point.0 - x)).abs();
        Some(Self {
            bytes,
            farthest_bytes: points.iter().map(distance).fold(0.0, f64::max),
            levels: points.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_exactly_and_noise_is_told() {
        let none = 1_000_000;
        let exact = [(100, none - 50_000), (500, none - 250_000)];
        let slope = Slope::through(none, exact.into_iter()).unwrap();
        assert!((slope.bytes - 500.0).abs() < 1e-6 && slope.farthest_bytes < 1e-6);
        assert_eq!(slope.levels, 3);
        let noisy = [(100, none - 60_000), (500, none - 250_000)];
        assert!(
            Slope::through(none, noisy.into_iter())
                .unwrap()
                .farthest_bytes
                > 5_000.0
        );
    }

    #[test]
    fn memory_may_grow_and_no_level_is_no_line() {
        let slope = Slope::through(1000, [(10, 2000)].into_iter()).unwrap();
        assert!(slope.bytes < 0.0);
        assert_eq!(Slope::through(1000, std::iter::empty()), None);
        assert_eq!(Slope::through(1000, [(0, 900)].into_iter()), None);
    }
}
