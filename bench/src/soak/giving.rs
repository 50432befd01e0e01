#![forbid(unsafe_code)]
//! Idle clones give clean memory back to the host until each is within its budget, and nobody can tell.

use anyhow::{Result, anyhow};
use pando_vmm::clone::Engine;
use pando_vmm::demo::plan::Step;
use pando_vmm::host::require_write_tracking;
use pando_vmm::payload::LAYOUT;
use pando_vmm::payload::protocol::Visit;

use super::{Found, Stage};
use crate::clone::workload::{DATA_PAGES, TEMPLATE_SALT};
use crate::footprint::Footprint;
use crate::grove::{Grove, verify, write_and_verify};

/// Clones, and rounds of reading everything and idling; full and small.
const FULL: (u32, u32) = (100, 2);
const SMALL: (u32, u32) = (3, 2);
/// What clones may keep of clean memory, and when: as `pando clone --give-back` has it.
const POLICY: &str = "500ms:1M";
const BUDGET_BYTES: u64 = 1 << 20;
/// Pages that each clone writes.
const OWN_PAGES: u64 = 512;
/// Places where they can lie.
const PLACES: u64 = DATA_PAGES / OWN_PAGES;
const MIB: u64 = 1 << 20;

/// Runs the scenario.
pub(super) fn run(stage: &Stage<'_>, engine: Engine) -> Result<Found> {
    require_write_tracking().map_err(|why| anyhow!("give-back is off on this host: {why}"))?;
    let (clones, rounds) = stage.sizes(FULL, SMALL);
    let subject = stage.template()?;
    let mut options = stage.options(&subject, engine);
    options.pager.give_back = Some(POLICY.parse().map_err(anyhow::Error::msg)?);
    options.measure_memory = true;
    // Else a root has everything, and no clone has clean memory of its own.
    options.root.budget_bytes = Some(0);
    let mut grove = Grove::new(options)?;
    let before = Footprint::take()?;
    let clones: Vec<usize> = (0..clones)
        .map(|number| grove.start(own(u64::from(number), true)))
        .collect();
    grove.all_answer()?;
    let mut kept = 0;
    for _ in 0..rounds {
        let given = given(&grove, &clones);
        for &number in &clones {
            grove.ask(number, everything(number as u64));
        }
        grove.all_answer()?;
        kept = idle(&mut grove, &clones, &given)?;
    }
    for &number in &clones {
        grove.ask(number, everything(number as u64));
    }
    grove.all_answer()?;
    let given = grove.supervisor.given_back();
    let done = [
        ("clones", clones.len() as u64),
        ("rounds", u64::from(rounds)),
        ("MiB given back", given.bytes / MIB),
        ("pauses for it", given.pauses),
        ("KiB of clean memory left, at most", kept >> 10),
    ];
    stage.finish(grove, &before, done.into())
}

/// What each clone has given back so far, in bytes.
fn given(grove: &Grove, clones: &[usize]) -> Vec<u64> {
    let all = grove.supervisor.clones();
    let bytes = |&number: &usize| all[number].given_back.bytes;
    clones.iter().map(bytes).collect()
}

/// Waits until each clone has given back what it read and is within its budget; the most clean memory
/// that one still has, in bytes.
///
/// What it gave counts too: its memory may have been measured before it read anything.
fn idle(grove: &mut Grove, clones: &[usize], given_before: &[u64]) -> Result<u64> {
    let least = (DATA_PAGES - OWN_PAGES) * 4096 - BUDGET_BYTES;
    let mut kept = 0;
    let what = format!("each clone gave {least} bytes back and keeps at most {BUDGET_BYTES}");
    grove.until(&what, |grove| {
        let given = given(grove, clones);
        let usage = grove.supervisor.usage();
        let clean = |&number: &usize| Some(usage.of(number)?.ram.private_clean_bytes);
        let clean: Option<Vec<u64>> = clones.iter().map(clean).collect();
        kept = clean
            .and_then(|clean| clean.into_iter().max())
            .unwrap_or(u64::MAX);
        let mut gave = given
            .iter()
            .zip(given_before)
            .map(|(now, before)| now - before);
        (gave.all(|bytes| bytes >= least) && kept <= BUDGET_BYTES) || grove.is_wrong()
    })?;
    Ok(kept)
}

/// First of the pages that a clone writes, and the first behind them.
fn place(clone: u64) -> (u64, u64) {
    let first = LAYOUT.first_data_page + clone % PLACES * OWN_PAGES;
    (first, first + OWN_PAGES)
}

/// What a clone's own pages were written with. Never what the template's were written with.
fn salt(clone: u64) -> u64 {
    (clone + 1) << 1
}

/// Verifies a clone's own pages; writes them before, if they are not.
fn own(clone: u64, write: bool) -> Vec<Step> {
    let visit = Visit::all(place(clone).0, OWN_PAGES);
    if write {
        write_and_verify(visit, salt(clone))
    } else {
        vec![verify(visit, salt(clone))]
    }
}

/// Verifies a clone's own pages and all others that the template has.
fn everything(clone: u64) -> Vec<Step> {
    let (own_first, own_end) = place(clone);
    let (first, end) = (LAYOUT.first_data_page, LAYOUT.first_data_page + DATA_PAGES);
    let mut steps = own(clone, false);
    for (first, end) in [(first, own_first), (own_end, end)] {
        if first < end {
            steps.push(verify(Visit::all(first, end - first), TEMPLATE_SALT));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_vmm::payload::model::DataPages;

    /// The steps hold for a guest alone, and visit each page that the template wrote.
    #[test]
    fn everything_is_every_page() {
        for clone in [0, 1, PLACES - 1, PLACES] {
            let mut guest = DataPages::new((64 << 20) / 4096);
            guest.obey(&crate::clone::workload::fill());
            let mut pages = 0;
            for (command, expected) in own(clone, true).into_iter().chain(everything(clone)) {
                assert_eq!(guest.obey(&command), expected, "{command:?}");
                if let pando_vmm::payload::protocol::Command::Verify { visit, .. } = command {
                    pages += visit.count;
                }
            }
            assert_eq!(pages, OWN_PAGES + DATA_PAGES);
        }
    }
}
