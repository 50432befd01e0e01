#![forbid(unsafe_code)]
//! The pager process in the supervisor: started when the first clone needs it, started again when
//! it dies, with every client attached again.
//!
//! ```text
//! Memory --> proven --> waiting -- Attach, few at a time --> sent -- Attached --> served
//!                          ^                                   |                    |
//!                          +--------- the pager died ----------+--------------------+
//! ```
//! All that is needed to attach a client again is kept here: its userfaultfd, what lies where, and
//! (with its process) its pidfd. A clone whose pager is away sleeps at its next missing page.

mod abandoned;
mod forget;
mod restart;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use self::restart::{CannotStart, Ending};
use super::control::{ClientMemory, IO_SHARED, PagerPlace, RawRegion, Received};
use super::silence::Silence;
use super::supervise::Supervisor;
use crate::observe::relay::{Delta, Series, replay};
use crate::pager_process::descriptor::prove_one;
use crate::pager_process::process::{PagerProcess, ServedTemplate};
use crate::pager_process::protocol::{ClientNews, FromPager, Ordered, RawAttach, prove_regions};
use crate::report::{chain, exit, one_line};
use crate::root::faults::{RawRangeFaults, prove};

/// Most clients that are sent and not answered for: neither end of a socket may fill it while the
/// other does the same.
const SENT_LIMIT: usize = 64;
/// Most messages of the pager that are heard in one go.
const MESSAGES_AT_ONCE: usize = 256;

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    Clone(usize),
    /// A fork that is no clone yet.
    Shell(u64),
}

/// Memory that the pager process serves.
#[derive(Debug)]
struct Client {
    owner: Owner,
    uffd: OwnedFd,
    regions: Vec<RawRegion>,
    cpu: Option<u32>,
    track_writes: bool,
    /// The map of the pages that it discards for good.
    discards: Option<OwnedFd>,
    /// A pager may have taken messages of it with it.
    was_sent: bool,
}

/// Why nobody is served.
#[derive(Debug, Clone)]
struct GivenUp {
    code: u8,
    message: String,
}

/// What the supervisor has of its pager process.
#[derive(Debug, Default)]
pub struct SharedPaging {
    template: Option<ServedTemplate>,
    process: Option<PagerProcess>,
    /// The last one, killed: no other is started before it has ended, for it may still take messages
    /// of its clients.
    ending: Option<Ending>,
    /// How the pager reads, since it serves somebody.
    io: Option<String>,
    clients: BTreeMap<u64, Client>,
    numbers: HashMap<Owner, u64>,
    next: u64,
    /// To be sent.
    waiting: BTreeSet<u64>,
    /// At most [`SENT_LIMIT`].
    sent: HashSet<u64>,
    /// Those whose pages are being forgotten, with the numbers of their orders in the order in which
    /// the pager has them; each at most `forget::ORDERS_LIMIT`.
    forgetting: HashMap<u64, VecDeque<u64>>,
    /// Of those that came about; at most `restart::RESTART_LIMIT`.
    starts: VecDeque<Instant>,
    /// When it was tried last, and how often in a row that failed.
    tried: Option<Instant>,
    failed: usize,
    /// Why there is no template to serve.
    refusal: Option<GivenUp>,
    /// It is given up because the last one does not end.
    is_stuck: bool,
    unready: usize,
    silence: Silence,
    gauges: HashMap<Series, f64>,
    /// Clients that the pager serves no longer, since when: their processes are to end.
    abandoned: HashMap<u64, Instant>,
    given_up: Option<GivenUp>,
    is_ended: bool,
    /// Pagers that were started because one had died.
    pub restarts: u64,
}

impl SharedPaging {
    /// The process number of the pager, if there is one.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(PagerProcess::pid)
    }

    /// How many clones and shells have their memory served.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// How pages of a clone are read that may have said that the pager process knows.
    pub(super) fn known_io(&self, said: String) -> String {
        match &self.io {
            Some(io) if said == IO_SHARED => io.clone(),
            _ => said,
        }
    }

    /// A shell has become a clone.
    pub(super) fn give(&mut self, from: Owner, to: Owner) {
        if let Some(number) = self.numbers.remove(&from) {
            self.numbers.insert(to, number);
            if let Some(client) = self.clients.get_mut(&number) {
                client.owner = to;
            }
        }
    }

    /// Its process has ended.
    pub(super) fn forget(&mut self, owner: Owner) {
        let Some(number) = self.numbers.remove(&owner) else {
            return;
        };
        self.clients.remove(&number);
        self.waiting.remove(&number);
        self.forgetting.remove(&number);
        self.abandoned.remove(&number);
        // One that is sent is answered for all the same.
        if let Some(process) = &self.process {
            process.detach(number);
        }
    }

    fn add(
        &mut self,
        owner: Owner,
        (uffd, discards): (OwnedFd, Option<OwnedFd>),
        memory: ClientMemory,
    ) {
        let number = self.next;
        self.next += 1;
        let client = Client {
            owner,
            uffd,
            regions: memory.regions,
            cpu: memory.cpu,
            track_writes: memory.track_writes,
            discards,
            was_sent: false,
        };
        self.clients.insert(number, client);
        self.numbers.insert(owner, number);
        self.waiting.insert(number);
    }
}

impl Supervisor {
    /// The pager process, if clones share one.
    pub fn paging(&self) -> &SharedPaging {
        &self.paging
    }

    /// Takes over memory that a clone or a shell says it has; ends it by name if that cannot be.
    pub(super) fn take_memory(
        &mut self,
        owner: Owner,
        memory: ClientMemory,
        descriptors: Vec<OwnedFd>,
    ) {
        if let Err(GivenUp { code, message }) = self.try_take(owner, memory, descriptors) {
            self.end_owner(
                owner,
                code,
                &format!("its memory cannot be served: {message}"),
            );
            return;
        }
        self.send_clients();
    }

    fn try_take(
        &mut self,
        owner: Owner,
        memory: ClientMemory,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), GivenUp> {
        let wrong = |message: String| GivenUp {
            code: exit::FAILED,
            message,
        };
        let given = prove_one(descriptors, memory.discards);
        let given = given.map_err(|error| wrong(chain(&error)))?;
        if self.options.pager.place != PagerPlace::Shared {
            return Err(wrong("nobody asked for it".to_owned()));
        }
        if self.paging.numbers.contains_key(&owner) {
            return Err(wrong("it was handed over twice".to_owned()));
        }
        if let Some(given_up) = &self.paging.given_up {
            return Err(given_up.clone());
        }
        // One that cannot be had just now is tried again when others wait for it.
        if self.paging.process.is_none() && self.paging.rests() {
            if self.paging.template.is_none()
                && let Some(refusal) = &self.paging.refusal
            {
                return Err(refusal.clone());
            }
        } else if self.paging.process.is_none() {
            match self.start_pager() {
                // It is tried again, and this clone then waits with the others.
                Err(CannotStart::Now(message)) if self.paging.template.is_some() => {
                    tracing::debug!("{message}");
                }
                Err(CannotStart::Now(message)) => return Err(wrong(message)),
                Err(CannotStart::Ever(given_up)) => return Err(given_up),
                Ok(()) => (),
            }
        }
        let template = &self.paging.template;
        prove_regions(&memory.regions, |image| {
            template.as_ref()?.pages(image.number())
        })
        .map_err(|error| wrong(chain(&error)))?;
        self.paging.add(owner, given, memory);
        Ok(())
    }

    /// Sends as many clients to the pager as may be under way.
    fn send_clients(&mut self) {
        let paging = &mut self.paging;
        let Some(process) = &paging.process else {
            return;
        };
        while paging.sent.len() < SENT_LIMIT {
            let Some(number) = paging.waiting.pop_first() else {
                return;
            };
            let Some(client) = paging.clients.get_mut(&number) else {
                continue;
            };
            let pidfd = match client.owner {
                Owner::Clone(clone) => {
                    let clone = self.clones.get(clone);
                    clone.and_then(|clone| Some(clone.process.as_ref()?.pidfd()))
                }
                Owner::Shell(id) => self.forks.shell_pidfd(id),
            };
            // One that is just ending needs nobody.
            let Some(pidfd) = pidfd else { continue };
            let attach = RawAttach {
                client: number,
                regions: client.regions.clone(),
                wake: client.was_sent,
                cpu: client.cpu,
                track_writes: client.track_writes,
                discards: client.discards.is_some(),
            };
            let map = client.discards.as_ref().map(AsFd::as_fd);
            match process.attach(attach, client.uffd.as_fd(), pidfd, map) {
                Ok(true) => {
                    client.was_sent = true;
                    paging.sent.insert(number);
                }
                other => {
                    // Full, or its end will be heard of: it is tried again either way.
                    if let Err(error) = other {
                        tracing::debug!("{}", one_line(&error));
                    }
                    paging.waiting.insert(number);
                    return;
                }
            }
        }
    }

    /// The pager has something to say, or has ended.
    pub(super) fn hear_pager(&mut self) {
        for _ in 0..MESSAGES_AT_ONCE {
            let Some(process) = &self.paging.process else {
                return;
            };
            match process.receive() {
                Ok(Received::Message(message, _)) => self.obey_pager(message),
                Ok(Received::Nothing) => break,
                Ok(Received::Closed) => return self.lose_pager("it ended"),
                Err(error) => return self.lose_pager(&one_line(&error)),
            }
        }
        self.send_clients();
    }

    fn obey_pager(&mut self, message: FromPager) {
        self.paging.silence.heard();
        match message {
            FromPager::Ready => self.paging.unready = 0,
            FromPager::Client(news) => self.hear_news(news),
            FromPager::Metrics(mut delta) => {
                self.series.sift(&mut delta);
                self.take_metrics(&delta);
            }
            FromPager::HoleFaults(report) => self.hear_pager_faults(&report),
            FromPager::Failed { code, message } => {
                if code == exit::FAILED {
                    self.lose_pager(&message);
                } else {
                    // Another would say the same.
                    self.drop_pager();
                    self.give_up(&GivenUp { code, message });
                }
            }
            FromPager::Stopped => self.lose_pager("it stopped"),
        }
    }

    fn hear_pager_faults(&mut self, report: &[RawRangeFaults]) {
        let template = self.paging.template.as_ref();
        let proven = prove(report, |image| template?.backend(image.number()));
        self.take_hole_faults("the pager process", proven);
    }

    fn hear_news(&mut self, news: ClientNews) {
        let number = news.client();
        let owner = self.paging.clients.get(&number).map(|client| client.owner);
        match (news, owner) {
            (ClientNews::Attached { io, .. }, owner) => {
                self.paging.sent.remove(&number);
                if let Some(Owner::Clone(clone)) = owner
                    && let Some(clone) = self.clones.get_mut(clone)
                    && clone.io == IO_SHARED
                {
                    clone.io.clone_from(&io);
                }
                self.paging.io = Some(io);
            }
            (
                ClientNews::Refused {
                    order: Ordered::Attach,
                    code,
                    why,
                    ..
                },
                owner,
            ) => {
                self.paging.sent.remove(&number);
                if let Some(owner) = owner {
                    self.paging.forget(owner);
                    let why = format!("the pager process does not serve it: {why}");
                    self.end_owner(owner, code, &why);
                }
            }
            (ClientNews::Forgotten { .. }, _) => self.forgotten(number, true),
            (
                ClientNews::Refused {
                    order: Ordered::Forget,
                    ..
                },
                _,
            ) => self.forgotten(number, false),
            (ClientNews::Poisoned { page, .. }, Some(owner)) => {
                let why = format!("guest memory could not be read: {page}");
                self.end_owner(owner, exit::MEMORY, &why);
            }
            (ClientNews::Gone { .. }, Some(_)) => {
                self.paging.abandoned.insert(number, Instant::now());
            }
            // Nothing else was ordered.
            (news, _) => tracing::debug!(?news, "the pager says"),
        }
    }

    fn take_metrics(&mut self, delta: &Delta) {
        self.pager_stats.add(delta);
        let gauges = &mut self.paging.gauges;
        replay(delta, |series, value| {
            gauges.insert(series.clone(), value).unwrap_or(0.0)
        });
    }

    fn end_owner(&mut self, owner: Owner, code: u8, message: &str) {
        match owner {
            Owner::Clone(number) => self.condemn(number, code, message),
            Owner::Shell(id) => {
                tracing::warn!(shell = id, "{message}");
                self.forks.kill_shell(id);
            }
        }
    }
}
