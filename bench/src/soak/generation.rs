#![forbid(unsafe_code)]
//! What a template has learned from its clones saves those to come their faults.

use anyhow::{Result, ensure};
use pando_vmm::clone::Engine;
use pando_vmm::demo::plan::Step;
use pando_vmm::demo::result::PagerFacts;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::{Command, Outcome, Pattern, Visit};

use super::{Found, Stage};
use crate::clone::subject::Subject;
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::footprint::Footprint;
use crate::grove::{Grove, echo};
use crate::seed::Random;

/// Clones of a generation, and recorded runs; full and small.
const FULL: (u32, u32) = (20, 4);
const SMALL: (u32, u32) = (4, 3);
/// Pages that clones choose from. Each visits nine of ten, so that two clones have nine of ten in
/// common.
const RANGE: u64 = 4096;
/// Of a hundred pages so many are zero in the template.
const ZERO_OF_HUNDRED: u64 = 63;
/// The second generation may take so many of a hundred faults of the first.
const FAULTS_OF_HUNDRED: u64 = 5;

/// Runs the scenario.
pub(super) fn run(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    ensure!(
        stage.pages() >= LAYOUT.first_data_page + DATA_PAGES + RANGE,
        "--memory is too small for zero pages"
    );
    let (clones, runs) = stage.sizes(FULL, SMALL);
    let subject = stage.template()?;
    let mut random = stage.random();
    let first = generation(stage, &subject, engine, clones, &mut random)?;
    for _ in 0..runs {
        let input: Vec<u8> = visits(&mut random)
            .iter()
            .flat_map(|(command, _)| command.encode())
            .collect();
        subject.record_input(&stage.program, input)?;
    }
    let (second_faults, mut second) = generation(stage, &subject, engine, clones, &mut random)?;
    let (first_faults, first) = first;
    second.wrong += first.wrong;
    second.complaints.extend(first.complaints);
    if second_faults * 100 > first_faults * FAULTS_OF_HUNDRED {
        second.wrong += 1;
        second.complaints.push(format!(
            "{clones} clones of the second generation took {second_faults} faults, of the first \
             {first_faults}: more than {FAULTS_OF_HUNDRED} of a hundred"
        ));
    }
    if first_faults == 0 {
        second.wrong += 1;
        second
            .complaints
            .push("the first generation took no fault".to_owned());
    }
    second
        .done
        .insert("faults of the first generation", first_faults);
    second.done.insert("faults of the second", second_faults);
    second.done.insert("recorded runs", u64::from(runs));
    Ok(second)
}

/// Clones one beside the other; the faults that their pagers had.
fn generation(
    stage: &Stage<'_>,
    subject: &Subject,
    engine: Engine,
    clones: u32,
    random: &mut Random,
) -> Result<(u64, Found)> {
    let mut options = stage.options(subject, engine);
    // Else a root has everything, and no clone takes a fault.
    options.root.budget_bytes = Some(0);
    let mut grove = Grove::new(options)?;
    let before = Footprint::take()?;
    for _ in 0..clones {
        let mut steps = vec![echo(1)];
        steps.extend(visits(random));
        grove.start(steps);
        let parallel = stage.cpus;
        grove.until("a clone has answered", |grove| grove.owing() < parallel)?;
    }
    grove.all_answer()?;
    grove.stop_all()?;
    let faults = PagerFacts::from(&grove.supervisor.pager_stats)
        .counters
        .iter()
        .filter(|(name, _)| name.starts_with("pando_pager_faults_total"))
        .map(|(_, count)| count)
        .sum();
    let found = stage.finish(grove, &before, [("clones", u64::from(clones))].into())?;
    Ok((faults, found))
}

/// Nine of ten pages of the range, in random order: some data, verified; some zero, written or read.
fn visits(random: &mut Random) -> Vec<Step> {
    let zero = RANGE * ZERO_OF_HUNDRED / 100;
    let mut visit = |first_page, range_pages: u64| Visit {
        first_page,
        range_pages,
        count: range_pages * 9 / 10,
        pattern: Pattern::Random {
            seed: random.next(),
        },
    };
    let data = visit(LAYOUT.first_data_page, RANGE - zero);
    let zeros = visit(LAYOUT.first_data_page + DATA_PAGES, zero);
    let touched = Outcome::Touched {
        count: zeros.count,
        sum: 0,
    };
    vec![
        crate::grove::verify(data, TEMPLATE_SALT),
        (Command::Touch(zeros), Some(touched)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_vmm::payload::model::DataPages;

    #[test]
    fn the_template_has_what_is_visited() {
        let mut guest = DataPages::new((64 << 20) / 4096);
        guest.obey(&crate::clone::workload::fill());
        let steps = visits(&mut Random::new(3));
        let counts: Vec<u64> = steps
            .iter()
            .map(|(command, expected)| {
                assert_eq!(guest.obey(command), *expected);
                match command {
                    Command::Verify { visit, .. } | Command::Touch(visit) => visit.count,
                    _ => 0,
                }
            })
            .collect();
        let zero_share = counts[1] * 100 / (counts[0] + counts[1]);
        assert!((62..=63).contains(&zero_share), "{counts:?}");
    }
}
