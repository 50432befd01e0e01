#![forbid(unsafe_code)]
//! How long the stages of making a machine took.

use std::time::{Duration, Instant};

/// Named durations in the order in which they were measured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stages {
    stages: Vec<(&'static str, Duration)>,
}

impl Stages {
    /// Names and durations, first stage first.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Duration)> + '_ {
        self.stages.iter().copied()
    }

    /// How long a stage took; `None` when there was no such stage.
    pub fn get(&self, name: &str) -> Option<Duration> {
        self.iter()
            .find(|(stage, _)| *stage == name)
            .map(|(_, took)| took)
    }

    /// All stages together.
    pub fn total(&self) -> Duration {
        self.stages.iter().map(|(_, took)| *took).sum()
    }
}

/// Measures one stage after the other.
#[derive(Debug)]
pub(super) struct StageTimer {
    stages: Stages,
    begun: Instant,
}

impl StageTimer {
    pub(super) fn start() -> Self {
        Self {
            stages: Stages::default(),
            begun: Instant::now(),
        }
    }

    /// Says that the work since the last call was the stage `name`.
    pub(super) fn done(&mut self, name: &'static str) {
        let now = Instant::now();
        self.stages.stages.push((name, now - self.begun));
        self.begun = now;
    }

    pub(super) fn finish(self) -> Stages {
        self.stages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_keep_their_order_and_add_up() {
        let mut timer = StageTimer::start();
        timer.done("vm");
        timer.done("state");
        let stages = timer.finish();
        let names: Vec<_> = stages.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["vm", "state"]);
        assert_eq!(
            stages.total(),
            stages.get("vm").unwrap() + stages.get("state").unwrap()
        );
        assert_eq!(stages.get("none"), None);
    }
}
