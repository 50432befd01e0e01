#![forbid(unsafe_code)]
//! Faults that wait for bytes: each client has a line of its own, and the lines are served in turn.
//! Pure.
//!
//! Everybody who waits for one page is one [`Want`]. Nothing here looks through all wants: they are
//! found by page, by age, by the end of their pause, or as the first of their client's line.

mod hash;
mod line;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::page::PageIndex;
use crate::prefetch::plan::Window;
use crate::retry::pause;
use crate::token::{ClientSlot, ReadSlot};
use hash::PageHash;
use line::Lines;

/// Entries of answered faults, beyond as many as wait, that are kept in order of age.
const ANSWERED_ENTRIES: usize = 64;

/// A client, told apart from those that had its place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClientKey {
    pub(crate) slot: ClientSlot,
    pub(crate) generation: u32,
}

/// One of a client's regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RegionKey {
    pub(crate) client: ClientKey,
    pub(crate) region: u32,
}

impl RegionKey {
    /// A page of the region's image.
    pub(crate) fn page(self, page: PageIndex) -> PageKey {
        PageKey { region: self, page }
    }
}

/// A page in one of a client's regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PageKey {
    pub(crate) region: RegionKey,
    pub(crate) page: PageIndex,
}

impl PageKey {
    pub(crate) fn client(self) -> ClientKey {
        self.region.client
    }
}

/// What a page waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its turn: a buffer, and a read to be started.
    Ready,
    /// A moment to pass, because the last try failed for want of something that may come back.
    Paused(Instant),
    /// A read.
    Reading(ReadSlot),
}

/// A page that somebody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// When the pager learned of the first fault.
    pub(crate) arrived: Instant,
    /// When it learned of the others.
    pub(crate) joined: Vec<Instant>,
    /// Somebody is about to write it.
    pub(crate) write: bool,
    /// Failed tries so far.
    pub(crate) attempts: u32,
    /// Why the last install failed, if it may be tried again.
    pub(crate) refused: Option<Errno>,
    /// How much to read at the first try.
    pub(crate) window: Window,
    pub(crate) stage: Stage,
    age: u64,
    /// Its place in the line; an older entry there counts no more.
    ticket: u64,
}

/// The waiting faults.
#[derive(Debug)]
pub(crate) struct Queue {
    /// As small as what waits: it is used for each fault, and what is used stays in the cache.
    wants: HashMap<PageKey, Want, PageHash>,
    /// In order of age. Entries of those that were answered meanwhile are cleared when they are in
    /// front, or too many.
    by_age: VecDeque<(u64, PageKey)>,
    paused: BTreeMap<(Instant, u64), PageKey>,
    lines: Lines,
    /// Faults that one client may have waiting.
    limit: usize,
    waiting: usize,
    next: u64,
}

impl Queue {
    /// Room for `limit` faults of each client.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            wants: HashMap::default(),
            by_age: VecDeque::new(),
            paused: BTreeMap::new(),
            lines: Lines::default(),
            limit,
            waiting: 0,
            next: 0,
        }
    }

    /// How many more faults of `client` there is room for.
    pub(crate) fn room(&self, client: ClientKey) -> usize {
        self.limit.saturating_sub(self.lines.waiting(client))
    }

    /// How many faults wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting
    }

    /// Whether anybody waits for a read to be started.
    pub(crate) fn has_ready(&self) -> bool {
        self.lines.has_ready()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A fault on a page that nobody waits for. Whoever takes faults from the kernel asks for room
    /// first; what was taken must not be lost, so a fault beyond the limit is kept all the same.
    pub(crate) fn push(&mut self, key: PageKey, arrived: Instant, write: bool, window: Window) {
        if self.waiting > 0 && self.join(key, arrived, write) {
            return;
        }
        let (age, ticket) = (self.number(), self.number());
        let want = Want {
            arrived,
            joined: Vec::new(),
            write,
            attempts: 0,
            refused: None,
            window,
            stage: Stage::Ready,
            age,
            ticket,
        };
        self.wants.insert(key, want);
        self.by_age.push_back((age, key));
        self.lines.add(key.client(), 1);
        self.waiting += 1;
        self.lines.queue(key, ticket);
    }

    /// One more fault on a page that somebody waits for; false when nobody does. Who comes later
    /// does not cut a pause short.
    pub(crate) fn join(&mut self, key: PageKey, arrived: Instant, write: bool) -> bool {
        let Some(want) = self.wants.get_mut(&key) else {
            return false;
        };
        want.joined.push(arrived);
        want.write |= write;
        self.lines.add(key.client(), 1);
        self.waiting += 1;
        true
    }

    /// Who waits for a page.
    pub(crate) fn get(&self, key: PageKey) -> Option<&Want> {
        self.wants.get(&key)
    }

    /// Whether anybody waits for a page.
    pub(crate) fn waits_for(&self, key: PageKey) -> bool {
        self.waiting > 0 && self.wants.contains_key(&key)
    }

    /// Whether `read` is what a page waits for.
    pub(crate) fn waits_for_read(&self, key: PageKey, read: ReadSlot) -> bool {
        let want = self.wants.get(&key);
        want.is_some_and(|want| want.stage == Stage::Reading(read))
    }

    /// Ends the pauses that are over at `now`.
    pub(crate) fn end_pauses(&mut self, now: Instant) {
        while let Some((&(then, _), &key)) = self.paused.first_key_value() {
            if then > now {
                return;
            }
            self.make_ready(key);
        }
    }

    /// When the first pause is over.
    pub(crate) fn next_try(&self) -> Option<Instant> {
        self.paused.keys().next().map(|&(then, _)| then)
    }

    /// The next page whose read may be started, of the clients in turn. One whose client `may` not
    /// now keeps its place. The page is out of its line: it is assigned, put off, answered, or put
    /// back.
    pub(crate) fn next_ready(&mut self, may: impl Fn(ClientKey) -> bool) -> Option<PageKey> {
        let wants = &self.wants;
        self.lines.next(may, |key, ticket| {
            let want = wants.get(&key);
            want.is_some_and(|want| want.ticket == ticket && want.stage == Stage::Ready)
        })
    }

    /// It could not be started: it is the first of its line again, and its client the next in turn.
    pub(crate) fn put_back(&mut self, key: PageKey) {
        if let Some(want) = self.wants.get(&key) {
            self.lines.put_back(key, want.ticket);
        }
    }

    fn set_stage(&mut self, key: PageKey, stage: Stage) {
        if let Some(want) = self.wants.get_mut(&key) {
            if let Stage::Paused(then) = want.stage {
                self.paused.remove(&(then, want.age));
            }
            if let Stage::Paused(then) = stage {
                self.paused.insert((then, want.age), key);
            }
            want.stage = stage;
        }
    }

    fn make_ready(&mut self, key: PageKey) {
        self.set_stage(key, Stage::Ready);
        let ticket = self.number();
        if let Some(want) = self.wants.get_mut(&key) {
            want.ticket = ticket;
            self.lines.queue(key, ticket);
        }
    }

    /// Lets `read` answer who waits for a page, if anybody does.
    pub(crate) fn assign(&mut self, key: PageKey, read: ReadSlot) {
        self.set_stage(key, Stage::Reading(read));
    }

    /// Its read failed, but perhaps only for pages that nobody waits for: another of the page
    /// alone, which counts as its first try.
    pub(crate) fn narrow(&mut self, key: PageKey) {
        if let Some(want) = self.wants.get_mut(&key) {
            want.window.pages = 1;
            self.make_ready(key);
        }
    }

    /// A try failed at `now`, of an install with an `errno` that may pass: it is counted, and
    /// another follows, of the page alone, after a pause.
    pub(crate) fn put_off(&mut self, key: PageKey, now: Instant, errno: Option<Errno>) {
        let Some(want) = self.wants.get_mut(&key) else {
            return;
        };
        want.window.pages = 1;
        want.attempts += 1;
        want.refused = errno.or(want.refused);
        let then = now.checked_add(pause(want.attempts)).unwrap_or(now);
        self.set_stage(key, Stage::Paused(then));
    }

    /// Nobody waits for a page any more; who did.
    pub(crate) fn answer(&mut self, key: PageKey) -> Option<Want> {
        if self.waiting == 0 {
            return None;
        }
        let want = self.wants.remove(&key)?;
        self.clear_answered();
        if let Stage::Paused(then) = want.stage {
            self.paused.remove(&(then, want.age));
        }
        let faults = 1 + want.joined.len();
        self.waiting -= faults;
        self.lines.remove(key.client(), faults);
        Some(want)
    }

    fn clear_answered(&mut self) {
        let wants = &self.wants;
        let waits = |&(age, key): &(u64, PageKey)| {
            let want: Option<&Want> = wants.get(&key);
            want.is_some_and(|want| want.age == age)
        };
        while self.by_age.front().is_some_and(|oldest| !waits(oldest)) {
            self.by_age.pop_front();
        }
        if self.by_age.len() > 2 * self.wants.len() + ANSWERED_ENTRIES {
            self.by_age.retain(waits);
        }
    }

    /// Forgets everything of a client. Costs a look at all who wait.
    pub(crate) fn remove_client(&mut self, client: ClientKey) {
        let keys: Vec<PageKey> = self
            .wants
            .keys()
            .filter(|key| key.client() == client)
            .copied()
            .collect();
        for key in keys {
            self.answer(key);
        }
        self.lines.forget(client);
    }

    /// The page that was waited for longest, if that is `limit` or longer at `now`.
    pub(crate) fn expired(&self, now: Instant, limit: Duration) -> Option<PageKey> {
        let &(_, key) = self.by_age.front()?;
        let waited = now.saturating_duration_since(self.wants.get(&key)?.arrived);
        (waited >= limit).then_some(key)
    }

    /// When the oldest fault will have waited for `limit`.
    pub(crate) fn next_deadline(&self, limit: Duration) -> Option<Instant> {
        let (_, key) = self.by_age.front()?;
        self.wants.get(key)?.arrived.checked_add(limit)
    }
}

#[cfg(test)]
mod tests;
