#![forbid(unsafe_code)]
//! What the embedded guest must answer: the same arithmetic, in Rust, without a guest.

use std::collections::BTreeMap;

use super::layout::LAYOUT;
use super::protocol::{Command, Outcome, Pattern, Visit};
use crate::memory::layout::PAGE_BYTES;

/// A page's word is its number times this, plus the salt. Odd, so that pages differ.
pub(super) const PAGE_MULTIPLIER: i32 = 0x4f1b_bcdd;
/// What is left of that product (without the salt) is the place of the word in the page.
pub(super) const PLACE_MASK: i32 = 0xff8;
/// Multiplier of the page order generator; one more than a multiple of four (Knuth, TAOCP 3.2.1.2:
/// with an odd increment the period is then the whole modulus).
pub(super) const RANDOM_MULTIPLIER: u64 = 0x5851_f42d_4c95_7f2d;
/// Added when the seed is stirred.
pub(super) const RANDOM_INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;
/// Words of one checksum block.
pub(super) const CHECKSUM_BLOCK_WORDS: usize = 16;
/// What the sum is multiplied by before each block, so that their order counts. Odd: no bit is lost.
pub(super) const CHECKSUM_MULTIPLIER: i32 = 0x2c92_77b5;

/// Bytes of a page, as an index.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);

/// The word that [`Command::Write`] puts into a page.
pub const fn word(page: u64, salt: u64) -> u64 {
    page.wrapping_mul(PAGE_MULTIPLIER as u64).wrapping_add(salt)
}

/// Where in the page it puts it, in bytes.
pub const fn place_bytes(page: u64) -> u64 {
    page.wrapping_mul(PAGE_MULTIPLIER as u64) & PLACE_MASK as u64
}

/// The pages of a visit, in the guest's order. The visit must be one that the guest accepts.
pub fn pages(visit: &Visit) -> impl Iterator<Item = u64> + use<> {
    let mut order = Order::new(visit);
    let first_page = visit.first_page;
    (0..visit.count).map(move |_| first_page + order.next_index())
}

/// The guest's three loops, as the index inside the range that comes next.
#[derive(Debug)]
enum Order {
    Sequential {
        next: u64,
    },
    Strided {
        next: u64,
        start: u64,
        stride: u64,
        range: u64,
    },
    Random {
        state: u64,
        increment: u64,
        mask: u64,
        range: u64,
    },
}

impl Order {
    fn new(visit: &Visit) -> Self {
        let range = visit.range_pages;
        match visit.pattern {
            Pattern::Sequential => Self::Sequential { next: 0 },
            Pattern::Strided { stride_pages } => Self::Strided {
                next: 0,
                start: 0,
                stride: stride_pages,
                range,
            },
            Pattern::Random { seed } => {
                let stirred = seed
                    .wrapping_mul(RANDOM_MULTIPLIER)
                    .wrapping_add(RANDOM_INCREMENT);
                let mask = range.next_power_of_two() - 1;
                Self::Random {
                    state: stirred >> 32,
                    increment: stirred | 1,
                    mask,
                    range,
                }
            }
        }
    }

    fn next_index(&mut self) -> u64 {
        match self {
            Self::Sequential { next } => {
                *next += 1;
                *next - 1
            }
            Self::Strided {
                next,
                start,
                stride,
                range,
            } => {
                let index = *next;
                *next += *stride;
                if *next >= *range {
                    *start += 1;
                    *next = *start;
                }
                index
            }
            Self::Random {
                state,
                increment,
                mask,
                range,
            } => loop {
                *state = state
                    .wrapping_mul(RANDOM_MULTIPLIER)
                    .wrapping_add(*increment)
                    & *mask;
                if *state < *range {
                    return *state;
                }
            },
        }
    }
}

/// The checksum of [`Command::Checksum`], fed in order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checksum(u64);

impl Checksum {
    /// Adds whole pages; what is left of a partial page is ignored.
    pub fn update(&mut self, bytes: &[u8]) {
        let (pages, _) = bytes.as_chunks::<PAGE>();
        for page in pages {
            let (words, _) = page.as_chunks::<8>();
            for block in words.chunks(CHECKSUM_BLOCK_WORDS) {
                self.0 = block.iter().fold(
                    self.0.wrapping_mul(CHECKSUM_MULTIPLIER as u64),
                    |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)),
                );
            }
        }
    }

    /// The sum so far.
    pub fn value(self) -> u64 {
        self.0
    }
}

/// Guest RAM free for data, as the commands given so far leave it; zero at first.
#[derive(Debug, Clone, Default)]
pub struct DataPages {
    /// The one word of each page that was written; it always lies at [`place_bytes`].
    words: BTreeMap<u64, u64>,
    end_page: u64,
}

impl DataPages {
    /// The data pages of a machine whose RAM ends below `end_page` and below the MMIO gap.
    pub fn new(end_page: u64) -> Self {
        Self {
            words: BTreeMap::new(),
            end_page,
        }
    }

    /// The bytes of one page.
    pub fn page(&self, page: u64) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        if let Some(word) = self.words.get(&page) {
            let place = usize::try_from(place_bytes(page)).expect("less than a page");
            bytes[place..place + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Does what the guest does, and says what it must answer. `None` for commands whose answer
    /// does not follow from the pages alone (identity, ports, the ends).
    pub fn obey(&mut self, command: &Command) -> Option<Outcome> {
        Some(match command {
            Command::Touch(visit) => {
                if !self.accepts_visit(visit) {
                    return Some(Outcome::out_of_range('r'));
                }
                let sum = pages(visit)
                    .filter(|&page| place_bytes(page) == 0)
                    .filter_map(|page| self.words.get(&page))
                    .fold(0_u64, |sum, word| sum.wrapping_add(*word));
                Outcome::Touched {
                    count: visit.count,
                    sum,
                }
            }
            Command::Verify { visit, salt } => {
                if !self.accepts_visit(visit) {
                    return Some(Outcome::out_of_range('v'));
                }
                let mut wrong = pages(visit).filter(|&page| {
                    self.words.get(&page).copied().unwrap_or(0) != word(page, *salt)
                });
                let first_mismatch = wrong.next();
                let mismatches = u64::from(first_mismatch.is_some()) + wrong.count() as u64;
                Outcome::Verified {
                    count: visit.count,
                    mismatches,
                    first_mismatch,
                }
            }
            Command::Write { visit, salt } => {
                if !self.accepts_visit(visit) {
                    return Some(Outcome::out_of_range('w'));
                }
                self.words
                    .extend(pages(visit).map(|page| (page, word(page, *salt))));
                Outcome::Written { count: visit.count }
            }
            Command::Checksum { first_page, pages } => {
                if !self.accepts(*first_page, *pages) {
                    return Some(Outcome::out_of_range('c'));
                }
                let mut checksum = Checksum::default();
                for page in *first_page..first_page + pages {
                    checksum.update(&self.page(page));
                }
                Outcome::Checksum {
                    sum: checksum.value(),
                }
            }
            Command::Scan { first_page, pages } => {
                if !self.accepts(*first_page, *pages) {
                    return Some(Outcome::out_of_range('z'));
                }
                let mut found = self
                    .words
                    .range(*first_page..first_page + pages)
                    .filter(|(_, word)| **word != 0)
                    .map(|(page, _)| *page);
                let first_nonzero = found.next();
                let nonzero = u64::from(first_nonzero.is_some()) + found.count() as u64;
                Outcome::Scanned {
                    nonzero,
                    first_nonzero,
                }
            }
            Command::Echo(words) => Outcome::Echo(words.clone()),
            Command::Spin { turns } => Outcome::Spun { turns: *turns },
            _ => return None,
        })
    }

    fn accepts(&self, first_page: u64, pages: u64) -> bool {
        pages > 0
            && first_page >= LAYOUT.first_data_page
            && first_page
                .checked_add(pages)
                .is_some_and(|end| end <= self.end_page)
    }

    fn accepts_visit(&self, visit: &Visit) -> bool {
        let stride = match visit.pattern {
            Pattern::Strided { stride_pages } => stride_pages,
            _ => 1,
        };
        self.accepts(visit.first_page, visit.range_pages)
            && (1..=visit.range_pages).contains(&visit.count)
            && (1..=visit.range_pages).contains(&stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn any_pattern() -> impl Strategy<Value = (u64, Pattern)> {
        (1_u64..5000).prop_flat_map(|range| {
            let pattern = prop_oneof![
                Just(Pattern::Sequential),
                (1..=range).prop_map(|stride_pages| Pattern::Strided { stride_pages }),
                any::<u64>().prop_map(|seed| Pattern::Random { seed }),
            ];
            (Just(range), pattern)
        })
    }

    proptest! {
        #[test]
        fn a_visit_of_the_whole_range_has_each_page_once(
            first_page in 0_u64..1 << 36,
            (range_pages, pattern) in any_pattern(),
        ) {
            let visit = Visit { first_page, range_pages, count: range_pages, pattern };
            let order: Vec<u64> = pages(&visit).collect();
            let set: BTreeSet<u64> = order.iter().copied().collect();
            prop_assert_eq!(order.len() as u64, range_pages);
            prop_assert!(set.into_iter().eq(first_page..first_page + range_pages));
            let part = Visit { count: range_pages.div_ceil(2), ..visit };
            prop_assert!(pages(&part).eq((0..part.count).zip(order).map(|(_, page)| page)));
        }

        #[test]
        fn a_word_lies_whole_in_its_page(page: u64) {
            prop_assert!(place_bytes(page) <= PAGE_BYTES - 8);
            prop_assert_eq!(place_bytes(page) % 8, 0);
        }

        #[test]
        fn what_was_written_verifies_and_another_salt_does_not(
            (range_pages, pattern) in any_pattern(),
            salt: u64,
            other: u64,
        ) {
            prop_assume!(salt != other);
            let first_page = LAYOUT.first_data_page;
            let mut model = DataPages::new(first_page + range_pages);
            let visit = Visit { first_page, range_pages, count: range_pages, pattern };
            let count = range_pages;
            prop_assert_eq!(
                model.obey(&Command::Write { visit, salt }),
                Some(Outcome::Written { count })
            );
            prop_assert_eq!(
                model.obey(&Command::Verify { visit, salt }),
                Some(Outcome::Verified { count, mismatches: 0, first_mismatch: None })
            );
            prop_assert_eq!(
                model.obey(&Command::Verify { visit, salt: other }),
                Some(Outcome::Verified {
                    count,
                    mismatches: count,
                    first_mismatch: pages(&visit).next(),
                })
            );
        }

        #[test]
        fn a_checksum_sees_every_bit_and_the_order_of_blocks(
            page in 0_usize..3,
            bit in 0_usize..PAGE * 8,
            first_block in 0_usize..96,
            second_block in 0_usize..96,
        ) {
            let bytes: Vec<u8> = (0..3 * PAGE as u64 / 8)
                .flat_map(|n| word(n, n << 40).to_le_bytes())
                .collect();
            let sum = |bytes: &[u8]| {
                let mut sum = Checksum::default();
                sum.update(bytes);
                sum.value()
            };
            let mut flipped = bytes.clone();
            flipped[page * PAGE + bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(sum(&bytes), sum(&flipped));
            if first_block != second_block {
                let mut swapped = bytes.clone();
                for byte in 0..CHECKSUM_BLOCK_WORDS * 8 {
                    swapped.swap(first_block * 128 + byte, second_block * 128 + byte);
                }
                prop_assert_ne!(sum(&bytes), sum(&swapped));
            }
        }
    }

    #[test]
    fn a_random_visit_is_neither_in_order_nor_the_same_for_another_seed() {
        let order = |seed| -> Vec<u64> {
            let pattern = Pattern::Random { seed };
            pages(&Visit {
                first_page: 0,
                range_pages: 32768,
                count: 2048,
                pattern,
            })
            .collect()
        };
        let first = order(1);
        let neighbours = first
            .windows(2)
            .filter(|pair| pair[1] == pair[0] + 1)
            .count();
        assert!(neighbours < 20, "{neighbours} of 2048 go to the next page");
        let set: BTreeSet<u64> = first.iter().copied().collect();
        let common = order(2).iter().filter(|page| set.contains(page)).count();
        assert!(
            (1..1024).contains(&common),
            "{common} of 2048 pages are the same"
        );
    }

    #[test]
    fn words_lie_all_over_their_pages() {
        let places: BTreeSet<u64> = (512..1024).map(place_bytes).collect();
        assert!(
            places.len() > 256 && places.contains(&0),
            "{} places",
            places.len()
        );
    }
}
