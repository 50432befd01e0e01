#![forbid(unsafe_code)]
//! A clone that gives memory back asks for the pager process to bring it again. Its guest stands
//! meanwhile, so it is answered in any case: with no, when the pager is lost or busy.

use super::super::control::{RawRun, ToWorker};
use super::super::supervise::Supervisor;
use super::{Owner, SharedPaging};
use crate::pager_process::protocol::{MAX_FORGOTTEN_RUNS, RawForget};
use crate::report::one_line;

/// Most orders of one clone that the pager has not answered. A clone gives an order up after a while
/// and may give another; one that has so many open is told no.
const ORDERS_LIMIT: usize = 8;

impl SharedPaging {
    /// Whether order number `order` to forget pages of `client` is on its way to the pager.
    fn send_order(&mut self, client: u64, order: u64, runs: Vec<RawRun>) -> bool {
        let Some(process) = &self.process else {
            return false;
        };
        let open = self.forgetting.entry(client).or_default();
        let is_sent = open.len() < ORDERS_LIMIT
            && runs.len() <= MAX_FORGOTTEN_RUNS
            && process
                .forget(RawForget { client, runs })
                .unwrap_or_else(|error| {
                    // Its end will be heard of.
                    tracing::debug!("{}", one_line(&error));
                    false
                });
        if is_sent {
            open.push_back(order);
        }
        is_sent
    }

    /// The number of the order that the pager answers now: it answers them one after the other.
    fn answered_order(&mut self, client: u64) -> Option<u64> {
        self.forgetting.get_mut(&client)?.pop_front()
    }
}

impl Supervisor {
    /// Passes on what clone `number` wants to be forgotten.
    pub(in crate::clone) fn forget_pages(&mut self, number: usize, order: u64, runs: Vec<RawRun>) {
        let client = self.paging.numbers.get(&Owner::Clone(number)).copied();
        if !client.is_some_and(|client| self.paging.send_order(client, order, runs)) {
            self.answer_clone(number, order, false);
        }
    }

    /// What the pager says of an order to forget pages of `client`.
    pub(super) fn forgotten(&mut self, client: u64, is_done: bool) {
        let Some(order) = self.paging.answered_order(client) else {
            return;
        };
        if let Some(Owner::Clone(number)) = self.paging.clients.get(&client).map(|c| c.owner) {
            self.answer_clone(number, order, is_done);
        }
    }

    /// The pager is lost, and with it what it was asked.
    pub(super) fn forget_nothing(&mut self) {
        for (client, orders) in std::mem::take(&mut self.paging.forgetting) {
            if let Some(Owner::Clone(number)) = self.paging.clients.get(&client).map(|c| c.owner) {
                for order in orders {
                    self.answer_clone(number, order, false);
                }
            }
        }
    }

    fn answer_clone(&self, number: usize, order: u64, is_done: bool) {
        let clone = self.clones.get(number);
        if let Some(process) = clone.and_then(|clone| clone.process.as_ref()) {
            // One that does not read gives up by itself.
            let _ = process
                .channel
                .send_now(&ToWorker::Forgotten { order, is_done }, &[]);
        }
    }
}
