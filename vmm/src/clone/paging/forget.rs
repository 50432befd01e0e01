#![forbid(unsafe_code)]
//! A clone that gives memory back asks for the pager process to bring it again. Its guest stands
//! meanwhile, so it is answered in any case: with no, when the pager is lost or busy.

use super::super::control::{RawRun, ToWorker};
use super::super::supervise::Supervisor;
use super::Owner;
use crate::pager_process::protocol::{MAX_FORGOTTEN_RUNS, RawForget};
use crate::report::one_line;

impl Supervisor {
    /// Passes on what clone `number` wants to be forgotten.
    pub(in crate::clone) fn forget_pages(&mut self, number: usize, runs: Vec<RawRun>) {
        let client = self.paging.numbers.get(&Owner::Clone(number)).copied();
        let is_sent = match (client, &self.paging.process) {
            (Some(client), Some(process)) if runs.len() <= MAX_FORGOTTEN_RUNS => {
                let sent = process.forget(RawForget { client, runs });
                sent.unwrap_or_else(|error| {
                    // Its end will be heard of.
                    tracing::debug!("{}", one_line(&error));
                    false
                })
            }
            _ => false,
        };
        match client {
            Some(client) if is_sent => {
                self.paging.forgetting.insert(client);
            }
            _ => self.answer_clone(number, false),
        }
    }

    /// What the pager says of an order to forget pages of `client`.
    pub(super) fn forgotten(&mut self, client: u64, is_done: bool) {
        if !self.paging.forgetting.remove(&client) {
            return;
        }
        if let Some(Owner::Clone(number)) = self.paging.clients.get(&client).map(|c| c.owner) {
            self.answer_clone(number, is_done);
        }
    }

    /// The pager is lost, and with it what it was asked.
    pub(super) fn forget_nothing(&mut self) {
        let forgetting: Vec<u64> = self.paging.forgetting.iter().copied().collect();
        for client in forgetting {
            self.forgotten(client, false);
        }
    }

    fn answer_clone(&self, number: usize, is_done: bool) {
        let clone = self.clones.get(number);
        if let Some(process) = clone.and_then(|clone| clone.process.as_ref()) {
            // One that does not read gives up by itself.
            let _ = process
                .channel
                .send_now(&ToWorker::Forgotten { is_done }, &[]);
        }
    }
}
