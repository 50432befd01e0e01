#![forbid(unsafe_code)]
//! What a clone's process says to its supervisor.

use std::path::Path;
use std::time::Duration;

use super::Engine;
use super::control::{FromWorker, STAGES};
use super::member::Event;
use super::process::CloneProcess;
use super::supervise::Supervisor;
use crate::observe::memory::ram::{MAX_PLACES, MemoryPlace};
use crate::observe::metrics;
use crate::observe::relay::replay;
use crate::report::exit;

impl Supervisor {
    /// Takes a message of clone `number`; what it means for others.
    pub(super) fn hear(&mut self, number: usize, message: FromWorker) -> Option<Event> {
        let clone = self.clones.get_mut(number)?;
        match message {
            FromWorker::Started { .. } if clone.running.is_some() => {
                let why = "its process said twice that it had started";
                self.condemn(number, exit::FAILED, why);
                None
            }
            FromWorker::Started { stages, .. } if !are_stages(&stages) => {
                let names: Vec<&str> = stages.iter().map(|(name, _)| name.as_str()).collect();
                let names: String = names.join(", ").chars().take(200).collect();
                let why = format!("its process started in stages that there are not: {names:?}");
                self.condemn(number, exit::FAILED, &why);
                None
            }
            FromWorker::Started {
                began,
                stages,
                io,
                places,
            } => {
                clone.io = self.paging.known_io(io);
                self.forks.refill.has_started(number);
                if let Some(process) = &clone.process {
                    clone.running = Some(process.requested.elapsed());
                    if self.options.engine != Engine::Root {
                        // The loader and what runs before the program's own code.
                        let exec = began.saturating_sub(process.spawned);
                        clone.stages.push(("exec".to_owned(), exec));
                    }
                }
                clone.stages.extend(stages);
                for (stage, took) in &clone.stages {
                    let engine = self.options.engine.name();
                    metrics::record_start(&self.options.name, engine, stage, *took);
                }
                let is_paged = clone.io != "none";
                let cgroup = clone.process.as_ref().and_then(CloneProcess::cgroup);
                let cgroup = cgroup.map(Path::to_owned);
                let places = proven_places(places, self.ram_bytes);
                self.usage
                    .started(&self.options.name, number, places, is_paged, cgroup);
                self.publish_counts();
                Some(Event::Started(number))
            }
            FromWorker::Metrics(mut delta) => {
                self.series.sift(&mut delta);
                self.pager_stats.add(&delta);
                replay(&delta, |series, value| {
                    clone.gauges.insert(series.clone(), value).unwrap_or(0.0)
                });
                None
            }
            FromWorker::HoleFaults(report) => {
                self.hear_fork_faults(number, &report);
                None
            }
            // A shell that was asked for while it said so.
            FromWorker::Warm => None,
            FromWorker::Touched(piece) => {
                self.learner.hear(number, piece);
                None
            }
            FromWorker::Judged(judged) => {
                metrics::count_judgement(&self.options.name, &judged);
                None
            }
            FromWorker::Forget { order, runs } => {
                self.forget_pages(number, order, runs);
                None
            }
            FromWorker::GaveBack { bytes, pauses } => {
                clone.given_back.add(bytes, pauses);
                metrics::count_given_back(&self.options.name, bytes, pauses);
                None
            }
            // Too late to be served: its process has ended.
            FromWorker::Memory(_) => None,
            FromWorker::Ended(ending) => {
                clone.ending.get_or_insert(ending);
                None
            }
        }
    }
}

/// No stage takes longer: what is added to a sum of durations stays there.
const LONGEST_STAGE: Duration = Duration::from_secs(3600);

/// Whether each is a stage, of a possible length, and none is there twice.
fn are_stages(said: &[(String, Duration)]) -> bool {
    said.len() <= STAGES.len()
        && said.iter().enumerate().all(|(at, (name, took))| {
            let is_first = said[..at].iter().all(|(before, _)| before != name);
            is_first && STAGES.contains(&name.as_str()) && *took <= LONGEST_STAGE
        })
}

/// What a process says of where its RAM lies, if that is as much as the guest has and none of it is
/// there twice: measuring takes as long as it is large. `None` for anything else.
fn proven_places(places: Vec<MemoryPlace>, ram_bytes: Option<u64>) -> Option<Vec<MemoryPlace>> {
    if places.len() > MAX_PLACES {
        return None;
    }
    let mut sorted = places.clone();
    sorted.sort_by_key(|place| place.address);
    let (mut behind, mut bytes) = (0_u64, 0_u64);
    for place in &sorted {
        if place.address < behind {
            return None;
        }
        behind = place.address.checked_add(place.bytes)?;
        bytes = bytes.checked_add(place.bytes)?;
    }
    (bytes <= ram_bytes?).then_some(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_known_and_there_once() {
        let said = |names: &[&str]| -> Vec<_> {
            let took = |name: &&str| ((*name).to_owned(), Duration::ZERO);
            names.iter().map(took).collect()
        };
        assert!(are_stages(&said(&[])) && are_stages(&said(&STAGES)));
        assert!(!are_stages(&said(&["vm", "vm"])));
        assert!(!are_stages(&said(&["vm", "pwned"])));
        assert!(!are_stages(&said(&[""])));
        assert!(!are_stages(&[("vm".to_owned(), Duration::MAX)]));
    }

    #[test]
    fn places_are_disjoint_and_no_more_than_the_guest_has() {
        let place = |address, bytes| MemoryPlace { address, bytes };
        let good = vec![place(0x9000, 0x1000), place(0x1000, 0x8000)];
        assert_eq!(
            proven_places(good.clone(), Some(0x9000)),
            Some(good.clone())
        );
        assert_eq!(proven_places(good.clone(), Some(0x8fff)), None);
        assert_eq!(proven_places(good, None), None);
        for bad in [
            vec![place(0x1000, 0x1000); 2],
            vec![place(0x1000, 0x2000), place(0x2000, 0x1000)],
            vec![place(u64::MAX, 2)],
            vec![place(0, 0); MAX_PLACES + 1],
        ] {
            assert_eq!(proven_places(bad, Some(u64::MAX)), None);
        }
    }
}
