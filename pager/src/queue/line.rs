#![forbid(unsafe_code)]
//! The lines that ready pages stand in, one per client, and whose turn it is. Pure.

use std::collections::VecDeque;

use super::{ClientKey, PageKey};

/// Entries of a line that may be out of date before it is cleared of them.
const STALE_ENTRIES: usize = 64;

#[derive(Debug, Default)]
struct Line {
    /// Whose it is: a place is used by one client after the other.
    client: Option<ClientKey>,
    ready: VecDeque<(PageKey, u64)>,
    /// It is among `turns`.
    in_turn: bool,
    /// Faults that wait, ready or not.
    waiting: usize,
}

/// All lines, by the place of their client.
#[derive(Debug, Default)]
pub(super) struct Lines {
    lines: Vec<Line>,
    /// Clients whose line is not empty, the next one first.
    turns: VecDeque<ClientKey>,
}

impl Lines {
    fn line(&mut self, client: ClientKey) -> &mut Line {
        let at = client.slot.index();
        if self.lines.len() <= at {
            self.lines.resize_with(at + 1, Line::default);
        }
        let line = &mut self.lines[at];
        line.client = Some(client);
        line
    }

    /// How many faults of `client` wait.
    pub(super) fn waiting(&self, client: ClientKey) -> usize {
        let line = self.lines.get(client.slot.index());
        line.filter(|line| line.client == Some(client))
            .map_or(0, |line| line.waiting)
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.turns.is_empty()
    }

    pub(super) fn add(&mut self, client: ClientKey, faults: usize) {
        self.line(client).waiting += faults;
    }

    pub(super) fn remove(&mut self, client: ClientKey, faults: usize) {
        let line = self.line(client);
        line.waiting = line.waiting.saturating_sub(faults);
    }

    /// The client is gone; its place may get another.
    pub(super) fn forget(&mut self, client: ClientKey) {
        *self.line(client) = Line::default();
        self.turns.retain(|&other| other != client);
    }

    /// A page goes to the end of its client's line.
    pub(super) fn queue(&mut self, key: PageKey, ticket: u64) {
        let client = key.client();
        let line = self.line(client);
        line.ready.push_back((key, ticket));
        if !line.in_turn {
            line.in_turn = true;
            self.turns.push_back(client);
        }
    }

    /// A page goes to the front of its client's line, and the client to the front of all.
    pub(super) fn put_back(&mut self, key: PageKey, ticket: u64) {
        let client = key.client();
        let line = self.line(client);
        line.ready.push_front((key, ticket));
        if line.in_turn {
            self.turns.retain(|&other| other != client);
        }
        self.line(client).in_turn = true;
        self.turns.push_front(client);
    }

    /// The first page of the next client that `may`, if `counts` says that its entry is not out of
    /// date. That client is the last in turn then.
    pub(super) fn next(
        &mut self,
        may: impl Fn(ClientKey) -> bool,
        counts: impl Fn(PageKey, u64) -> bool,
    ) -> Option<PageKey> {
        for _ in 0..self.turns.len() {
            let client = self.turns.pop_front()?;
            if !may(client) {
                self.clear_stale(client, &counts);
                self.turns.push_back(client);
                continue;
            }
            let line = self.line(client);
            let mut found = None;
            while let Some((key, ticket)) = line.ready.pop_front() {
                if counts(key, ticket) {
                    found = Some(key);
                    break;
                }
            }
            if line.ready.is_empty() {
                line.in_turn = false;
            } else {
                self.turns.push_back(client);
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// A line that is not served for long must not grow with what is answered otherwise.
    fn clear_stale(&mut self, client: ClientKey, counts: &impl Fn(PageKey, u64) -> bool) {
        let line = self.line(client);
        if line.ready.len() > line.waiting + STALE_ENTRIES {
            line.ready.retain(|&(key, ticket)| counts(key, ticket));
        }
    }
}
