#![forbid(unsafe_code)]
//! Which blocks are plugged.

use std::ops::Range;

/// A bit for each block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    plugged: Vec<bool>,
    count: usize,
}

impl Blocks {
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            plugged: vec![false; blocks],
            count: 0,
        }
    }

    /// How many are plugged.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Whether all of these blocks, which exist, are plugged, or none of them is.
    pub(super) fn all(&self, range: &Range<usize>, plugged: bool) -> bool {
        let blocks = self.plugged.get(range.clone());
        blocks.is_some_and(|blocks| blocks.iter().all(|&block| block == plugged))
    }

    pub(super) fn set(&mut self, range: &Range<usize>, plugged: bool) {
        for block in self.plugged.get_mut(range.clone()).into_iter().flatten() {
            if *block != plugged {
                *block = plugged;
                self.count = if plugged {
                    self.count + 1
                } else {
                    self.count - 1
                };
            }
        }
    }

    /// Runs of plugged blocks.
    pub(super) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (block, _) in self
            .plugged
            .iter()
            .enumerate()
            .filter(|(_, plugged)| **plugged)
        {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    pub(super) fn save(&self) -> Vec<u8> {
        self.plugged
            .chunks(8)
            .map(|bits| {
                let set = (0..).zip(bits).filter(|(_, plugged)| **plugged);
                set.fold(0, |byte, (bit, _)| byte | 1_u8 << bit)
            })
            .collect()
    }

    /// Those of a saved device of as many blocks; `None` where it has more or fewer.
    pub(super) fn restore(blocks: usize, saved: &[u8]) -> Option<Self> {
        let mut restored = Self::new(blocks);
        if saved.len() != blocks.div_ceil(8) {
            return None;
        }
        for block in (0..saved.len() * 8).filter(|block| saved[block / 8] >> (block % 8) & 1 != 0) {
            if block >= blocks {
                return None;
            }
            restored.set(&(block..block + 1), true);
        }
        Some(restored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bitmap_counts_and_comes_back(
            blocks in 1_usize..70,
            changes in proptest::collection::vec((0_usize..80, 0_usize..9, any::<bool>()), 0..40),
        ) {
            let (mut map, mut model) = (Blocks::new(blocks), vec![false; blocks]);
            for (first, count, plugged) in changes {
                let range = first..first + count;
                if range.end <= blocks {
                    prop_assert_eq!(
                        map.all(&range, plugged),
                        model[range.clone()].iter().all(|&block| block == plugged)
                    );
                    map.set(&range, plugged);
                    model[range].fill(plugged);
                }
            }
            prop_assert_eq!(map.count(), model.iter().filter(|&&block| block).count());
            let in_runs: usize = map.runs().iter().map(ExactSizeIterator::len).sum();
            prop_assert_eq!(in_runs, map.count());
            prop_assert_eq!(Blocks::restore(blocks, &map.save()), Some(map.clone()));
            prop_assert_eq!(Blocks::restore(blocks + 8, &map.save()), None);
        }
    }
}
