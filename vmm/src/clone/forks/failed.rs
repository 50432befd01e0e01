#![forbid(unsafe_code)]
//! Forks that could not be made.

use super::super::control::Ending;
use super::super::member::Event;
use super::super::paging::Owner;
use super::super::supervise::Supervisor;
use super::Purpose;
use crate::observe::metrics;

impl Supervisor {
    pub(super) fn fail_waiting(&mut self, code: u8, message: &str) {
        let waiting: Vec<Purpose> = self.forks.waiting.drain(..).collect();
        for purpose in waiting {
            self.fail_purpose(&purpose, code, message);
        }
    }

    pub(super) fn fail_purpose(&mut self, purpose: &Purpose, code: u8, message: &str) {
        match purpose {
            Purpose::Clone { number, .. } => self.fail_clone(*number, code, message),
            Purpose::Shell => tracing::warn!("a shell could not be made: {message}"),
        }
    }

    pub(super) fn fail_clone(&mut self, number: usize, code: u8, message: &str) {
        metrics::count_failure(&self.options.name);
        self.forks.refill.has_started(number);
        let process = self.clones.get(number).and_then(|c| c.process.as_ref());
        if let Some(process) = process {
            self.unwatch(process.pidfd());
        }
        if let Some(clone) = self.clones.get_mut(number) {
            if clone.process.take().is_some() {
                self.usage.unmade();
            }
            self.paging.forget(Owner::Clone(number));
            let message = message.to_owned();
            clone.ending = Some(Ending::Failed { code, message });
            self.pending.push(Event::Ended(number));
        }
        self.publish_counts();
    }
}
