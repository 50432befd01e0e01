#![forbid(unsafe_code)]
//! The pager of a process, for clients of any number of peers: takes their orders, proves them,
//! tells them what becomes of their clients.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pando_pager::{
    Budget, ClientEvent, ClientSpec, FaultCounts, Image, ImageId, Listener, PageCount, PagerError,
    RangeFaults, SharedOptions, SharedPager,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_getaffinity};
use thiserror::Error;

use super::descriptor::{self, WrongDescriptor};
use super::outlet::Outlet;
use super::protocol::{
    ClientNews, ClientOrder, MAX_FORGOTTEN_RUNS, MAX_IMAGES, Ordered, RawAttach, RawForget,
    forgotten_runs, prove_regions,
};
use super::registry::{PeerId, Registry};
use crate::clone::control::PagerConfig;
use crate::host;
use crate::report::{chain, exit};

/// Most shards: more than this many CPUs are served by as many threads.
const MAX_SHARDS: usize = 64;
/// Most clients of one shard: any one may have to take all, where clones are kept on its CPU.
const SHARD_CLIENTS: usize = 1 << 14;

/// Why an order is refused.
#[derive(Debug, Error)]
pub enum OrderError {
    /// What came beside it.
    #[error(transparent)]
    Descriptor(#[from] WrongDescriptor),
    /// What it says of its memory.
    #[error("its memory cannot be served")]
    Regions(#[from] pando_pager::SpecError),
    /// A name that is taken.
    #[error("client {client} is served already: detach it first, or choose another number")]
    Duplicate {
        /// The name.
        client: u64,
    },
    /// No such client.
    #[error("there is no client {client}: it was never attached, or is gone")]
    Unknown {
        /// The name.
        client: u64,
    },
    /// As many as this peer may have.
    #[error("{limit} clients are served for this connection, which is its limit")]
    TooMany {
        /// How many.
        limit: usize,
    },
    /// An order that is too long.
    #[error(
        "it has {count} runs: join neighbours, or send several orders of {MAX_FORGOTTEN_RUNS} at most"
    )]
    TooLong {
        /// How many runs.
        count: usize,
    },
    /// More images than are taken.
    #[error("it has {MAX_IMAGES} images, which is its limit")]
    TooManyImages,
    /// The pager.
    #[error("the pager refuses")]
    Pager(#[from] PagerError),
}

impl OrderError {
    /// What a program that ends for it exits with.
    pub fn exit_code(&self) -> u8 {
        if host::is_lacking(self) {
            exit::HOST
        } else {
            exit::FAILED
        }
    }
}

/// A pager and whose clients it serves.
#[derive(Debug)]
pub struct Hub {
    pager: SharedPager,
    pages: Vec<PageCount>,
    registry: Arc<Mutex<Registry>>,
    failure: Arc<Mutex<Option<String>>>,
    wake: Arc<OwnedFd>,
    /// Of each shard, where they are kept on CPUs.
    cpus: Vec<usize>,
    max_clients: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in them can be left half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// Starts a shard for each CPU of this process. A peer may have `max_clients`; faults are counted
    /// as `counts` says.
    pub fn start(
        config: &PagerConfig,
        max_clients: usize,
        counts: FaultCounts,
    ) -> Result<Self, PagerError> {
        let setup = |errno: rustix::io::Errno| PagerError::Setup {
            what: "wake-up eventfd",
            source: errno.into(),
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(setup)?;
        let wake = Arc::new(wake);
        let registry = Arc::new(Mutex::new(Registry::default()));
        let failure = Arc::new(Mutex::new(None));
        let cpus = own_cpus();
        let shards = cpus
            .iter()
            .map(|&cpu| config.keep_together.then_some(cpu))
            .collect();
        let options = SharedOptions {
            io: config.io.into(),
            verify: config.verify(),
            fault_deadline: config.fault_deadline,
            budget: Budget {
                clients: SHARD_CLIENTS,
                ..Budget::shared()
            },
            shards,
            fault_counts: counts,
            ..SharedOptions::default()
        };
        let events = listener(&registry, &failure, &wake);
        Ok(Self {
            pager: SharedPager::start(options, events)?,
            pages: Vec::new(),
            registry,
            failure,
            wake,
            cpus: if config.keep_together {
                cpus
            } else {
                Vec::new()
            },
            max_clients,
        })
    }

    /// Gives it one more image; `template` is the label of its metrics.
    pub fn add_image(&mut self, image: Image, template: &str) -> Result<(), OrderError> {
        if self.pages.len() >= MAX_IMAGES {
            return Err(OrderError::TooManyImages);
        }
        let pages = image.index().pages();
        self.pager.add_image(image, template)?;
        self.pages.push(pages);
        Ok(())
    }

    /// Faults by image and range since the last call, if they are counted.
    pub fn take_range_faults(&self) -> Vec<RangeFaults> {
        self.pager.take_range_faults()
    }

    /// Which way messages and bytes take.
    pub fn io(&self) -> &'static str {
        self.pager.io().name()
    }

    /// An eventfd that is readable when something waits to be sent, or the pager failed.
    pub fn waker(&self) -> &Arc<OwnedFd> {
        &self.wake
    }

    /// Why the pager ended by itself, if it did.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Makes the eventfd unreadable.
    pub fn clear_wake(&self) {
        let _empty = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Does what `peer` wants and tells it through `outlet` what came of it.
    pub fn obey(
        &self,
        peer: PeerId,
        outlet: &Arc<Outlet>,
        order: ClientOrder,
        descriptors: Vec<OwnedFd>,
    ) {
        let (client, ordered, done) = match order {
            ClientOrder::Attach(raw) => {
                let done = self.attach(peer, outlet, &raw, descriptors);
                (raw.client, Ordered::Attach, done)
            }
            ClientOrder::Forget(raw) => {
                let done = self.forget(peer, &raw, descriptors);
                if done.is_ok() {
                    let client = raw.client;
                    outlet.tell_client(ClientNews::Forgotten { client });
                }
                (raw.client, Ordered::Forget, done)
            }
            ClientOrder::Detach { client } => {
                let done = self.detach(peer, client, descriptors);
                (client, Ordered::Detach, done)
            }
        };
        if let Err(error) = done {
            tracing::info!(client, "refused: {}", chain(&error));
            outlet.tell_client(ClientNews::Refused {
                client,
                order: ordered,
                code: error.exit_code(),
                why: chain(&error),
            });
        }
    }

    fn attach(
        &self,
        peer: PeerId,
        outlet: &Arc<Outlet>,
        raw: &RawAttach,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), OrderError> {
        let (uffd, pidfd, discards) = descriptor::prove(descriptors, raw.discards)?;
        let regions = prove_regions(&raw.regions, |image: ImageId| {
            let number = usize::try_from(image.number()).ok()?;
            self.pages.get(number).copied()
        })?;
        let client = raw.client;
        let id = {
            let mut registry = lock(&self.registry);
            if registry.count(peer) >= self.max_clients {
                let limit = self.max_clients;
                return Err(OrderError::TooMany { limit });
            }
            registry
                .begin(peer, client, outlet)
                .ok_or(OrderError::Duplicate { client })?
        };
        let cpu = raw.cpu.and_then(|cpu| usize::try_from(cpu).ok());
        let spec = ClientSpec {
            pidfd: Some(pidfd),
            wake: raw.wake,
            track_writes: raw.track_writes,
            discards,
            shard: cpu.and_then(|cpu| self.cpus.iter().position(|own| *own == cpu)),
            ..ClientSpec::new(uffd, regions)
        };
        // Not under the lock: the shard that serves it may have something to tell.
        match self.pager.attach(id, spec) {
            Ok(attached) => {
                lock(&self.registry).attached(id, attached.io.name());
                Ok(())
            }
            Err(error) => {
                lock(&self.registry).remove(id);
                Err(error.into())
            }
        }
    }

    /// A client that is not there any more is as good as detached.
    fn detach(
        &self,
        peer: PeerId,
        client: u64,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), OrderError> {
        descriptor::none(descriptors)?;
        let mut registry = lock(&self.registry);
        if let Some(id) = registry.find(peer, client) {
            registry.remove(id);
            drop(registry);
            self.pager.detach(id);
        }
        Ok(())
    }

    fn forget(
        &self,
        peer: PeerId,
        raw: &RawForget,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), OrderError> {
        descriptor::none(descriptors)?;
        let client = raw.client;
        let count = raw.runs.len();
        let runs = forgotten_runs(&raw.runs).ok_or(OrderError::TooLong { count })?;
        let id = lock(&self.registry).find(peer, client);
        let id = id.ok_or(OrderError::Unknown { client })?;
        Ok(self.pager.forget(id, &runs)?)
    }

    /// A peer is gone, and so are its clients.
    pub fn leave(&self, peer: PeerId) {
        let ids = lock(&self.registry).remove_peer(peer);
        ids.into_iter().for_each(|id| self.pager.detach(id));
    }
}

impl AsFd for Hub {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Runs on the threads of shards: does not wait.
fn listener(
    registry: &Arc<Mutex<Registry>>,
    failure: &Arc<Mutex<Option<String>>>,
    wake: &Arc<OwnedFd>,
) -> Listener {
    let (registry, failure) = (Arc::clone(registry), Arc::clone(failure));
    let wake = Arc::clone(wake);
    Arc::new(move |event| {
        if let ClientEvent::ShardFailed { shard, reason } = &event {
            let why = format!("shard {shard} failed: {reason}");
            lock(&failure).get_or_insert(why);
            let _told = rustix::io::write(&wake, &1_u64.to_ne_bytes());
        }
        lock(&registry).hear(&event);
    })
}

/// The CPUs that this process may use, at most as many as there are shards.
fn own_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(None).unwrap_or_default();
    let mut cpus: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|&cpu| allowed.is_set(cpu))
        .take(MAX_SHARDS)
        .collect();
    if cpus.is_empty() {
        cpus.push(0);
    }
    cpus
}
