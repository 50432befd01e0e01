#![forbid(unsafe_code)]
//! The loop: drain messages, plan, start reads, reap them, install, wake.

mod admit;
mod ahead;
mod by_page;
mod client;
mod command;
mod complete;
mod give_up;
mod messages;
mod place;
mod put;
mod read;
mod served;
mod start;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;

use crate::budget::Budget;
use crate::client::ClientId;
use crate::counts::{Tally, add};
use crate::port::{Inbox, Port, WaitLimits};
use crate::queue::{ClientKey, Queue, RegionKey};
use crate::source::{PageSource, ReadDone};
use crate::spin::Spin;
use crate::sys::buffers::BufferPool;
use crate::sys::uring::MESSAGES_PER_READ;
use client::Clients;
use read::{ActiveRead, Target};

pub(crate) use client::{Client, Tells};
pub(crate) use command::{Attach, Command, Stop};
pub(crate) use served::{Served, ServedImage};

/// Parts that a server is made of.
pub(crate) struct Parts {
    pub(crate) port: Port,
    pub(crate) source: Box<dyn PageSource>,
    pub(crate) pool: BufferPool,
    pub(crate) budget: Budget,
    pub(crate) verify: bool,
    pub(crate) fault_deadline: Duration,
    /// Most time to look for messages before sleeping.
    pub(crate) spin: Duration,
    pub(crate) tally: Arc<Tally>,
    pub(crate) commands: Receiver<Command>,
    /// Readable when there are commands.
    pub(crate) bell: Arc<OwnedFd>,
    /// Who keeps account of the clients; told when one is no more.
    pub(crate) on_gone: Box<dyn Fn(ClientId) + Send>,
}

/// The state of a shard's thread.
pub(crate) struct Server {
    parts: Parts,
    clients: Clients,
    ids: HashMap<ClientId, ClientKey>,
    queue: Queue,
    reads: Vec<Option<ActiveRead>>,
    /// Places of `reads` that are free.
    free_reads: Vec<usize>,
    /// Emptied lists of reads that are over, for the next ones.
    spare_targets: Vec<Vec<Target>>,
    inbox: Inbox,
    /// Clients with messages to be handled, the next one first.
    turns: VecDeque<ClientKey>,
    /// Clients that are not waited for: for want of room, or because they just had messages.
    unarmed: Vec<ClientKey>,
    /// Clients with pages of a plan to be brought, the next one first.
    planned: VecDeque<ClientKey>,
    spin: Spin,
    /// Reads in flight for plans.
    planned_reads: usize,
    /// Clients that an install found gone.
    lost: Vec<ClientKey>,
    /// Reads that are over, on their way to be handled.
    done: Vec<ReadDone>,
    pass: u64,
    stopping: Option<Stop>,
    /// Something was done that needs no wait before the next pass.
    goes_on: bool,
}

impl Server {
    pub(crate) fn new(parts: Parts) -> Self {
        let slots = parts.pool.capacity();
        Self {
            // Room for one whole read of messages, or none would ever be taken.
            queue: Queue::new(parts.budget.waiting_faults.max(MESSAGES_PER_READ)),
            clients: Clients::default(),
            ids: HashMap::new(),
            reads: (0..slots).map(|_| None).collect(),
            free_reads: (0..slots).rev().collect(),
            spare_targets: Vec::with_capacity(slots),
            inbox: Inbox::new(),
            turns: VecDeque::new(),
            unarmed: Vec::new(),
            planned: VecDeque::new(),
            spin: Spin::new(parts.spin),
            planned_reads: 0,
            lost: Vec::new(),
            done: Vec::with_capacity(slots),
            pass: 0,
            stopping: None,
            goes_on: false,
            parts,
        }
    }

    /// Which way messages and bytes take.
    pub(crate) fn path(&self) -> crate::port::IoPath {
        self.parts.port.path()
    }

    /// Serves until told to stop.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        loop {
            self.pass += 1;
            self.start_reads();
            self.start_planned();
            let at_once = self.collect()?;
            self.take_messages();
            self.handle_messages();
            self.handle_reads(at_once);
            self.end_overdue();
            self.drop_lost();
            self.obey();
            let ended = match self.stopping {
                None => false,
                Some(Stop::AtOnce) => true,
                Some(Stop::WhenAnswered) => self.is_drained()?,
            };
            if ended {
                self.finish();
                return Ok(());
            }
        }
    }

    /// Fills the inbox; true when what came in was there at once, without waiting for it.
    fn collect(&mut self) -> io::Result<bool> {
        self.arm_clients();
        if !self.done.is_empty() {
            return Ok(true);
        }
        if self.parts.port.submit(&mut self.inbox)? {
            return Ok(true);
        }
        let total = if std::mem::take(&mut self.goes_on) {
            Some(Duration::ZERO)
        } else {
            self.time_to_next_event()
        };
        let limits = WaitLimits {
            spin: self.spin.window(),
            total,
        };
        let began = self.spin.is_used().then(Instant::now);
        self.parts.port.wait(limits, &mut self.inbox)?;
        if let Some(began) = began
            && !self.inbox.messages.is_empty()
        {
            self.spin.waited(began.elapsed());
        }
        Ok(false)
    }

    fn time_to_next_event(&self) -> Option<Duration> {
        let deadline = self.queue.next_deadline(self.parts.fault_deadline);
        let due = self.parts.source.next_due();
        let events = [deadline, due, self.queue.next_try()];
        let next = events.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// After a stop: whether all faults that were raised before it are answered.
    fn is_drained(&mut self) -> io::Result<bool> {
        let keys = self.clients.keys();
        let port = &self.parts.port;
        if self.queue.len() > 0
            || !self.done.is_empty()
            || keys.iter().any(|key| port.is_armed(key.slot))
        {
            return Ok(false);
        }
        let mut nothing = true;
        for key in keys {
            nothing &= self.read_messages(key, usize::MAX / 2)? == 0;
        }
        self.handle_messages();
        Ok(nothing && self.queue.len() == 0)
    }

    /// The last accounts.
    fn finish(&mut self) {
        for key in self.clients.keys() {
            if let Some(mut client) = self.clients.remove(key) {
                self.settle_accounts(&mut client);
            }
        }
    }

    /// What was brought ahead for a client and never confirmed.
    fn settle_accounts(&self, client: &mut Client) {
        for served in &mut client.regions {
            let verdict = served.streams.finish();
            served.image.metrics().prefetch(0, 0, verdict.wasted);
            add(&self.parts.tally.prefetch_wasted, verdict.wasted);
        }
    }

    fn served(&self, key: RegionKey) -> Option<&Served> {
        let client = self.clients.get(key.client)?;
        client.regions.get(key.region as usize)
    }

    fn served_mut(&mut self, key: RegionKey) -> Option<&mut Served> {
        let client = self.clients.get_mut(key.client)?;
        client.regions.get_mut(key.region as usize)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for read in self.reads.iter().flatten() {
            read.image.metrics().read_ended(0);
        }
    }
}

#[cfg(test)]
mod tests;
