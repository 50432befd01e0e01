#![forbid(unsafe_code)]
//! A hash for page keys: they are few small numbers, and hashed several times per fault. Keyed, as
//! guests choose which pages they touch. Pure.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Odd, with its bits well mixed.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key of one table.
#[derive(Clone, Debug)]
pub(super) struct PageHash(u64);

impl Default for PageHash {
    fn default() -> Self {
        Self(RandomState::new().hash_one(FACTOR))
    }
}

impl BuildHasher for PageHash {
    type Hasher = PageHasher;

    fn build_hasher(&self) -> PageHasher {
        PageHasher(self.0)
    }
}

#[derive(Debug)]
pub(super) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    /// The high half of a product depends on all bits of its factors.
    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * u128::from(FACTOR);
        let [low, high] = [product, product >> 64].map(|half| half & u128::from(u64::MAX));
        let folded = u64::try_from(low ^ high).unwrap_or_default();
        self.0 = folded.rotate_left(23) ^ FACTOR;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_spread_over_a_small_table() {
        let hash = PageHash::default();
        for other in 0..8_u32 {
            let mut buckets = [0_u32; 256];
            for page in 0..1024_u64 {
                let at = usize::try_from(hash.hash_one((other, 3_u32, page)) % 256).unwrap();
                buckets[at] += 1;
            }
            assert!(buckets.iter().all(|&count| count < 40), "{buckets:?}");
        }
    }
}
