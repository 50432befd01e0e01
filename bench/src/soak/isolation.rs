#![forbid(unsafe_code)]
//! No byte of a clone is ever seen by another.

use anyhow::Result;
use pando_vmm::clone::Engine;
use pando_vmm::demo::plan::Step;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Pattern, Visit};

use super::{Found, Stage};
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::footprint::Footprint;
use crate::grove::{Grove, echo, only_zeros, verify, write_and_verify};
use crate::seed::Random;

/// Clones and rounds, full and small.
const FULL: (u32, u32) = (100, 50);
const SMALL: (u32, u32) = (8, 3);
/// Of so many clones that stay, one comes and goes in each round.
const PASSING_ONE_OF: u32 = 8;
/// Pages that are searched for bytes other than zero: the guest reads every word, which is slow.
const ZERO_PAGES: u64 = 4;
/// Places where a clone's own pages can lie.
const PLACES: u64 = 4;

/// Pages of a guest, by what they must hold.
#[derive(Debug, Clone, Copy)]
struct Pages {
    /// One quarter of all.
    quarter: u64,
    end: u64,
}

impl Pages {
    /// First of a clone's own pages: neighbours overlap, and all of memory is somebody's.
    fn own(&self, clone: u64) -> u64 {
        let room = self.end - LAYOUT.first_data_page - self.quarter;
        LAYOUT.first_data_page + (clone % PLACES) * room / (PLACES - 1)
    }

    /// Verifies pages of the template that are not among a clone's own, and that some of the others are
    /// zero.
    fn the_rest(&self, clone: u64, random: &mut Random) -> Vec<Step> {
        let (own, own_end) = (self.own(clone), self.own(clone) + self.quarter);
        let (first, data_end) = (LAYOUT.first_data_page, LAYOUT.first_data_page + DATA_PAGES);
        let data = [(first, own.min(data_end)), (own_end.max(first), data_end)];
        let zeros = [(data_end, own), (own_end.max(data_end), self.end)];
        let data = data.into_iter().filter(|(start, end)| start < end);
        let zeros = zeros
            .into_iter()
            .filter(|(start, end)| start + ZERO_PAGES <= *end);
        data.map(|(start, end)| verify(Visit::all(start, end - start), TEMPLATE_SALT))
            .chain(zeros.map(|(start, end)| {
                let at = start + random.below(end - start - ZERO_PAGES + 1);
                only_zeros(at, ZERO_PAGES)
            }))
            .collect()
    }
}

/// What a clone writes its pages with in a round. Never what the template's were written with.
fn salt(clone: u64, round: u32) -> u64 {
    (u64::from(round) + 1) << 32 | (clone + 1) << 1
}

/// Runs the scenario.
pub(super) fn run(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    let (clones, rounds) = stage.sizes(FULL, SMALL);
    let subject = stage.template()?;
    let mut grove = Grove::new(stage.options(&subject, engine))?;
    let before = Footprint::take()?;
    let mut random = stage.random();
    let pages = Pages {
        quarter: stage.pages() / 4,
        end: stage.pages(),
    };
    let staying: Vec<usize> = (0..clones).map(|_| grove.start(first_words())).collect();
    grove.all_answer()?;
    let mut passing: Vec<usize> = Vec::new();
    let (mut came, mut went) = (0, 0);
    for round in 0..rounds {
        if grove.is_wrong() {
            // It has been found; what follows would only bury it.
            break;
        }
        let mut order = staying.clone();
        random.shuffle(&mut order);
        for &number in &order {
            let visit = Visit {
                first_page: pages.own(number as u64),
                range_pages: pages.quarter,
                count: pages.quarter,
                pattern: Pattern::Random {
                    seed: random.next(),
                },
            };
            grove.ask(number, write_and_verify(visit, salt(number as u64, round)));
        }
        for _ in 0..(clones / PASSING_ONE_OF).max(1) {
            let number = grove.supervisor.clones().len() as u64;
            let mut steps = first_words();
            let own = Visit::all(pages.own(number), pages.quarter);
            steps.extend(write_and_verify(own, salt(number, round)));
            passing.push(grove.start(steps));
            came += 1;
            if !passing.is_empty() && random.below(2) == 0 {
                let leaving = passing.swap_remove(random.place(passing.len()));
                if random.below(2) == 0 {
                    grove.kill(leaving)?;
                } else {
                    grove.stop(leaving)?;
                }
                went += 1;
            }
        }
        grove.all_answer()?;
        // Everything once more, when all the others have written.
        for &number in &order {
            let clone = number as u64;
            let own = Visit::all(pages.own(clone), pages.quarter);
            let mut steps = vec![verify(own, salt(clone, round))];
            steps.extend(pages.the_rest(clone, &mut random));
            grove.ask(number, steps);
        }
        grove.all_answer()?;
        // Those that only pass by do not pile up.
        while passing.len() > clones as usize / 2 {
            let leaving = passing.swap_remove(random.place(passing.len()));
            grove.stop(leaving)?;
            went += 1;
        }
    }
    let done = [
        ("clones", u64::from(clones)),
        ("rounds", u64::from(rounds)),
        ("came meanwhile", came),
        ("went meanwhile", went),
    ];
    stage.finish(grove, &before, done.into())
}

/// What a clone does first: says a word and verifies all that the template holds.
fn first_words() -> Vec<Step> {
    let all = Visit::all(LAYOUT.first_data_page, DATA_PAGES);
    vec![echo(1), verify(all, TEMPLATE_SALT)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_vmm::payload::model::DataPages;
    use pando_vmm::payload::protocol::Command;

    /// The steps hold for a guest alone, whatever its place: only another's bytes can break them.
    #[test]
    fn a_clone_that_nobody_disturbs_answers_as_expected() {
        for mib in [64, 128, 256] {
            let pages = Pages {
                quarter: (mib << 20) / 4096 / 4,
                end: (mib << 20) / 4096,
            };
            let mut random = Random::new(mib);
            for clone in 0..6 {
                let mut guest = DataPages::new(pages.end);
                guest.obey(&crate::clone::workload::fill());
                let own = Visit::all(pages.own(clone), pages.quarter);
                let mut steps = first_words();
                steps.extend(write_and_verify(own, salt(clone, 0)));
                steps.extend(pages.the_rest(clone, &mut random));
                assert!(
                    steps.len() >= 5,
                    "clone {clone} of {mib} MiB verifies the rest"
                );
                for (command, expected) in steps {
                    assert_eq!(guest.obey(&command), expected, "{command:?}");
                }
                // A byte of another is seen.
                let other = Command::Write {
                    visit: Visit::all(pages.own(clone) + 3, 1),
                    salt: salt(clone + 1, 0),
                };
                guest.obey(&other);
                let (command, expected) = verify(own, salt(clone, 0));
                assert_ne!(guest.obey(&command), expected);
            }
        }
    }
}
