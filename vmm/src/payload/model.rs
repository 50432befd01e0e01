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
/// How far the sum is rotated before each block.
pub(super) const CHECKSUM_ROTATE: u32 = 7;

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
        let (pages, _) = bytes.as_chunks::<{ PAGE_BYTES as usize }>();
        for page in pages {
            let (words, _) = page.as_chunks::<8>();
            for block in words.chunks(CHECKSUM_BLOCK_WORDS) {
                self.0 = block
                    .iter()
                    .fold(self.0.rotate_left(CHECKSUM_ROTATE), |sum, word| {
                        sum.wrapping_add(u64::from_le_bytes(*word))
                    });
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
    pub fn page(&self, page: u64) -> [u8; PAGE_BYTES as usize] {
        let mut bytes = [0; PAGE_BYTES as usize];
        if let Some(word) = self.words.get(&page) {
            let place = place_bytes(page) as usize;
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
