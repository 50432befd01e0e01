#![forbid(unsafe_code)]
//! Which pages are touched, in which order, by whom. Pure.

use serde::Serialize;

use crate::seed::Random;

/// What the pages are in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Content {
    /// Bytes of the file.
    Data,
    /// A hole.
    Zero,
}

/// In which order they are touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// One after the other.
    Sequential,
    /// No order.
    Random,
}

/// What is done in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Load {
    /// What the pages are.
    pub(crate) content: Content,
    /// In which order.
    pub(crate) order: Order,
    /// Memories that one pager serves; each has threads of its own.
    pub(crate) clones: u32,
    /// Threads that share the pages of one memory.
    pub(crate) threads: u32,
    /// Pages touched in each memory.
    pub(crate) pages: u64,
}

impl Load {
    /// One thread that touches `pages` pages of one memory.
    pub(crate) fn one(content: Content, order: Order, pages: u64) -> Self {
        Self {
            content,
            order,
            clones: 1,
            threads: 1,
            pages,
        }
    }

    /// The pages that each thread of a memory touches, in order, where the image has
    /// `image_pages`: data in the lower half, a hole in the upper. No page is touched twice.
    pub(crate) fn visits(&self, image_pages: u64, seed: u64) -> Vec<Vec<u64>> {
        let half = image_pages / 2;
        let first = match self.content {
            Content::Data => 0,
            Content::Zero => half,
        };
        let mut pages: Vec<u64> = (first..first + half).collect();
        if self.order == Order::Random {
            Random::new(seed).shuffle(&mut pages);
        }
        pages.truncate(usize::try_from(self.pages).unwrap_or(usize::MAX));
        let share = pages.len().div_ceil(self.threads.max(1) as usize).max(1);
        pages.chunks(share).map(<[u64]>::to_vec).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_touched_once_and_threads_share() {
        for order in [Order::Sequential, Order::Random] {
            for (content, range) in [(Content::Data, 0..50), (Content::Zero, 50..100)] {
                let load = Load {
                    threads: 3,
                    ..Load::one(content, order, 50)
                };
                let visits = load.visits(100, 5);
                assert_eq!(visits.len(), 3);
                let mut all = visits.concat();
                all.sort_unstable();
                assert_eq!(all, range.collect::<Vec<u64>>());
            }
        }
    }

    #[test]
    fn order_depends_on_the_seed_alone() {
        let load = Load::one(Content::Data, Order::Random, 40);
        let (one, same, other) = (
            load.visits(200, 1),
            load.visits(200, 1),
            load.visits(200, 2),
        );
        assert_eq!(one, same);
        assert_ne!(one, other);
        assert_eq!(one[0].len(), 40);
        let sequential = Load::one(Content::Data, Order::Sequential, 3);
        assert_eq!(sequential.visits(200, 1), [[0, 1, 2]]);
    }
}
