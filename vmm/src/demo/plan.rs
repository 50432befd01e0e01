#![forbid(unsafe_code)]
//! What the demonstration asks of its guests, and what the right answers are. Pure.

use crate::memory::layout::{MMIO_GAP_START, PAGE_BYTES};
use crate::payload::LAYOUT;
use crate::payload::model::DataPages;
use crate::payload::protocol::{Command, Outcome, Pattern, Visit};

/// What template pages are written with.
const TEMPLATE_SALT: u64 = 0xa5be_4e00;
/// What clone `k` writes its own pages with is this plus `k`.
const CLONE_SALT: u64 = 0xc10e_0000;
/// Pages of each of the two regions that the template VM writes.
const REGION_PAGES: u64 = 2048;
/// Pages of the second region that each clone verifies in random order.
const RANDOM_PAGES: u64 = 256;
/// Pages that each clone writes.
const OWN_PAGES: u64 = 512;
/// Pages that nobody wrote and each clone reads.
const ZERO_PAGES: u64 = 512;

/// A command and the answer that it must get; `None` where any well-formed answer will do.
pub type Step = (Command, Option<Outcome>);

/// The demonstration for one size of RAM.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What the template VM does before it is frozen.
    pub template: Vec<Step>,
    /// First region: verified page after page, then partly overwritten.
    first: (u64, u64),
    /// Second region: verified in random order.
    second: (u64, u64),
    /// What nobody wrote.
    rest: (u64, u64),
    frozen: DataPages,
}

impl Plan {
    /// A plan for a guest with `ram_bytes` of RAM.
    pub fn new(ram_bytes: u64) -> Self {
        let start = LAYOUT.first_data_page;
        let end = (ram_bytes.min(MMIO_GAP_START) / PAGE_BYTES).min(LAYOUT.mapped_end_page);
        let region = REGION_PAGES.min(end.saturating_sub(start) / 3);
        let first = (start, region);
        let second = (start + region, region);
        let rest = (start + 2 * region, end - start - 2 * region);
        let mut frozen = DataPages::new(end);
        let template = [first, second]
            .into_iter()
            .map(|(page, pages)| Command::Write {
                visit: Visit::all(page, pages),
                salt: TEMPLATE_SALT,
            })
            .map(|command| step(&mut frozen, command))
            .collect();
        Self {
            template,
            first,
            second,
            rest,
            frozen,
        }
    }

    /// What clone number `clone` does, in order. The first step is small: its answer marks the
    /// start.
    pub fn clone(&self, clone: u64) -> Vec<Step> {
        let salt = CLONE_SALT + clone;
        let random = |(first_page, range_pages): (u64, u64), count: u64, seed| Visit {
            first_page,
            range_pages,
            count: count.min(range_pages),
            pattern: Pattern::Random { seed },
        };
        let own = random(self.first, OWN_PAGES, clone);
        let mut pages = self.frozen.clone();
        [
            Command::Echo(vec![clone]),
            Command::Verify {
                visit: Visit::all(self.first.0, self.first.1),
                salt: TEMPLATE_SALT,
            },
            Command::Verify {
                visit: random(self.second, RANDOM_PAGES, clone),
                salt: TEMPLATE_SALT,
            },
            Command::Touch(random(self.rest, ZERO_PAGES, clone)),
            Command::Write { visit: own, salt },
            Command::Verify { visit: own, salt },
            Command::Checksum {
                first_page: self.first.0,
                pages: self.first.1.min(32),
            },
            Command::Identity,
        ]
        .into_iter()
        .map(|command| step(&mut pages, command))
        .collect()
    }
}

fn step(pages: &mut DataPages, command: Command) -> Step {
    let expected = pages.obey(&command);
    (command, expected)
}

/// The command lines of some steps, one after the other, as they are sent.
pub fn lines(steps: &[Step]) -> Vec<u8> {
    steps
        .iter()
        .flat_map(|(command, _)| command.encode())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(steps: &[Step]) -> bool {
        steps
            .iter()
            .any(|(_, outcome)| matches!(outcome, Some(Outcome::Refused { .. })))
    }

    #[test]
    fn every_step_is_one_that_the_guest_accepts_whatever_the_ram() {
        for mib in [64, 65, 128, 1024, 5 << 10, 64 << 10] {
            let plan = Plan::new(mib << 20);
            assert!(!refused(&plan.template), "{mib} MiB");
            assert!(
                !refused(&plan.clone(0)) && !refused(&plan.clone(9999)),
                "{mib} MiB"
            );
        }
    }

    #[test]
    fn clones_find_the_template_intact_and_differ_after_writing() {
        let plan = Plan::new(128 << 20);
        let (one, two) = (plan.clone(1), plan.clone(2));
        let verified = |steps: &[Step]| {
            steps
                .iter()
                .filter(|(_, outcome)| {
                    matches!(outcome, Some(Outcome::Verified { mismatches: 0, .. }))
                })
                .count()
        };
        assert_eq!((verified(&one), verified(&two)), (3, 3));
        let sum = |steps: &[Step]| {
            steps.iter().find_map(|(_, outcome)| match outcome {
                Some(Outcome::Checksum { sum }) => Some(*sum),
                _ => None,
            })
        };
        assert_ne!(sum(&one).unwrap(), sum(&two).unwrap());
    }
}
