#![forbid(unsafe_code)]
//! One pager for many clients of many images.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::budget::Budget;
use crate::client::{
    Attached, ClientEvent, ClientId, ClientSpec, ImageId, ImageRun, SpecError, check_regions,
};
use crate::counts::Counts;
use crate::error::PagerError;
use crate::health::PoisonMethod;
use crate::image::Image;
use crate::metrics::Metrics;
use crate::options::{IoMode, Verify};
use crate::page::PageRange;
use crate::port::IoPath;
use crate::range_faults::{FaultCounts, RangeFaults};
use crate::record::Recorder;
use crate::region::Region;
use crate::registry::Registry;
use crate::serve::{Attach, Client, Command, Served, ServedImage, Tells};
use crate::shard::{self, Shard, ShardPlan};
use crate::source::PageSource;
use crate::sys::adopt::adopt;
use crate::sys::discard_map::DiscardMap;
use crate::sys::userfaultfd::Tracking;
use crate::working_set::Trace;

/// Puts something around the source of each shard: to delay or fail reads in tests.
pub type Decorate = Arc<dyn Fn(Box<dyn PageSource>) -> Box<dyn PageSource> + Send + Sync>;

/// Who listens to what a shared pager tells.
pub type Listener = Arc<dyn Fn(ClientEvent) + Send + Sync>;

/// How a shared pager is to work.
#[derive(Clone)]
pub struct SharedOptions {
    /// How to read.
    pub io: IoMode,
    /// Whether to verify.
    pub verify: Verify,
    /// How long a fault may wait before its page is poisoned.
    pub fault_deadline: Duration,
    /// What each shard may use.
    pub budget: Budget,
    /// One shard for each: a thread, pinned to the CPU if one is given. At least one.
    pub shards: Vec<Option<usize>>,
    /// How long at most a shard looks for the next fault before it sleeps; see `PagerOptions::spin`.
    pub spin: Duration,
    /// What is done about a page that cannot be had: a mark, or (as on kernels without
    /// UFFDIO_POISON) nothing, so that who waits for it sleeps until its process is ended.
    pub poison: PoisonMethod,
    /// How faults are counted.
    pub fault_counts: FaultCounts,
    /// Around the source of each shard.
    pub decorate: Option<Decorate>,
}

impl fmt::Debug for SharedOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedOptions")
            .field("io", &self.io)
            .field("verify", &self.verify)
            .field("fault_deadline", &self.fault_deadline)
            .field("budget", &self.budget)
            .field("shards", &self.shards)
            .field("spin", &self.spin)
            .field("poison", &self.poison)
            .field("fault_counts", &self.fault_counts)
            .finish_non_exhaustive()
    }
}

impl Default for SharedOptions {
    fn default() -> Self {
        Self {
            io: IoMode::default(),
            verify: Verify::default(),
            fault_deadline: Duration::from_secs(10),
            budget: Budget::shared(),
            shards: vec![None],
            spin: Duration::ZERO,
            poison: PoisonMethod::Marker,
            fault_counts: FaultCounts::default(),
            decorate: None,
        }
    }
}

/// A pager whose clients live in any process: shards of one thread and one ring each. Dropping it
/// ends it at once; faults that are not answered then stay in the kernel, or wait for a wake-up
/// from the pager that the client is attached to next.
pub struct SharedPager {
    // Before the rest: their threads tell the others.
    shards: Vec<Shard>,
    registry: Arc<Mutex<Registry>>,
    images: Mutex<Vec<Arc<ServedImage>>>,
    /// By template: who has it in its label.
    metrics: Mutex<HashMap<String, Arc<Metrics>>>,
    events: Listener,
    options: SharedOptions,
}

impl fmt::Debug for SharedPager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedPager")
            .field("shards", &self.shards.len())
            .field("clients", &self.clients())
            .finish_non_exhaustive()
    }
}

impl SharedPager {
    /// Starts the shards; they wait for clients when this returns.
    pub fn start(options: SharedOptions, events: Listener) -> Result<Self, PagerError> {
        let cpus = match options.shards.as_slice() {
            [] => &[None],
            cpus => cpus,
        };
        let registry = Arc::new(Mutex::new(Registry::new(cpus.len())));
        let shards = cpus
            .iter()
            .enumerate()
            .map(|(number, &cpu)| {
                let plan = plan(&options, (number, cpu), &registry, &events);
                Shard::start(plan)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            shards,
            registry,
            images: Mutex::default(),
            metrics: Mutex::default(),
            events,
            options,
        })
    }

    /// Gives it an image. `template` is the label of its metrics.
    pub fn add_image(&self, image: Image, template: &str) -> Result<ImageId, PagerError> {
        if image.bytes() == 0 {
            let image = image.id().to_owned();
            return Err(PagerError::Empty { image });
        }
        let metrics = self.metrics_of(template);
        let mut images = lock(&self.images);
        let Ok(number) = u32::try_from(images.len()) else {
            return Err(PagerError::Failed {
                reason: "it has as many images as there can be".to_owned(),
            });
        };
        let served = ServedImage::new(image, images.len(), metrics, self.options.fault_counts);
        images.push(Arc::new(served));
        Ok(ImageId::new(number))
    }

    fn metrics_of(&self, template: &str) -> Arc<Metrics> {
        let mut all = lock(&self.metrics);
        let known = all.entry(template.to_owned()).or_insert_with(|| {
            let metrics = Metrics::new(template);
            metrics.serving(self.io().name(), true);
            Arc::new(metrics)
        });
        Arc::clone(known)
    }

    /// Serves a client; it is served when this returns. Everything in `spec` is proven first.
    pub fn attach(&self, id: ClientId, spec: ClientSpec) -> Result<Attached, PagerError> {
        let refused = |reason| PagerError::Client { client: id, reason };
        let asked_shard = spec.shard;
        let attach = self.prove(id, spec).map_err(refused)?;
        let shard = lock(&self.registry)
            .take(id, asked_shard)
            .map_err(refused)?;
        let answer = self.shards[shard].ask(|reply| Command::Attach(Box::new(attach), reply));
        match answer {
            Ok(Ok(io)) => Ok(Attached {
                client: id,
                shard,
                io,
            }),
            Ok(Err(reason)) => {
                lock(&self.registry).free(id);
                Err(refused(reason))
            }
            Err(error) => {
                lock(&self.registry).free(id);
                Err(error)
            }
        }
    }

    /// A client of what was asked for, if that can be served.
    fn prove(&self, id: ClientId, mut spec: ClientSpec) -> Result<Attach, SpecError> {
        let images = lock(&self.images).clone();
        check_regions(&mut spec.regions, |image| {
            images.get(image.index()).map(|known| known.image().pages())
        })?;
        let unknown = spec
            .ahead
            .iter()
            .find(|run| run.image.index() >= images.len());
        if let Some(run) = unknown {
            return Err(SpecError::UnknownImage { image: run.image });
        }
        let pages: Vec<_> = images.iter().map(|image| image.image().pages()).collect();
        let discards = spec.discards.take();
        let discards = discards
            .map(|file| DiscardMap::adopt(file, &pages))
            .transpose();
        let discards = discards.map_err(SpecError::Discards)?.unwrap_or_default();
        let regions: Vec<Served> = spec
            .regions
            .iter()
            .map(|region| {
                let image = Arc::clone(&images[region.image.index()]);
                let mut served = Served::new(image, Region::other(region.address, region.pages));
                served.discards = discards.get(region.image.index()).cloned();
                served
            })
            .collect();
        let tracking = Tracking::wanted(spec.track_writes);
        let wrong = |(what, source)| SpecError::Uffd { what, source };
        let first = regions.first().and_then(Served::pin);
        let first = first.ok_or(SpecError::NoRegions)?;
        let page = PageRange::single(first.pages().start());
        let uffd = adopt(spec.uffd, &first, page, tracking).map_err(wrong)?;
        let tells = Tells::Listener(Arc::clone(&self.events));
        let mut client = Client::new(id, Arc::new(uffd), regions, tells);
        client.poison = self.options.poison;
        client.tracking = tracking;
        client.recorder = spec.record.map(|most| Recorder::new(id, most));
        client.plan(&spec.ahead, self.options.budget.ahead_pages);
        Ok(Attach {
            client,
            pidfd: spec.pidfd,
            wake: spec.wake,
        })
    }

    /// The shard that serves a client.
    fn shard_of(&self, id: ClientId) -> Option<&Shard> {
        let shard = lock(&self.registry).shard_of(id)?;
        self.shards.get(shard)
    }

    /// Makes pages of a client absent again: the next touch brings the template's bytes. In force
    /// when it returns. Call it while nothing touches the pages, and discard them then.
    pub fn forget(&self, id: ClientId, runs: &[ImageRun]) -> Result<(), PagerError> {
        let refused = |reason| PagerError::Client { client: id, reason };
        let shard = self
            .shard_of(id)
            .ok_or_else(|| refused(SpecError::Unknown))?;
        let runs = runs.to_vec();
        let answer = shard.ask(|reply| Command::Forget(id, runs, reply))?;
        answer.map_err(refused)
    }

    /// Serves a client no longer; one that is unknown is none. Faults that it raises later sleep.
    /// Its id is free when this returns.
    pub fn detach(&self, id: ClientId) {
        if let Some(shard) = self.shard_of(id) {
            let answer = shard.ask(|reply| Command::Detach(id, reply));
            if answer.is_err() {
                // A shard that ended serves nobody, and frees no id.
                lock(&self.registry).free(id);
            }
        }
    }

    /// What a recorded client touched so far; `None` for one that is not recorded or unknown.
    pub fn trace(&self, id: ClientId) -> Option<Trace> {
        let shard = self.shard_of(id)?;
        shard.ask(|reply| Command::Trace(id, reply)).ok()?
    }

    /// What all shards did so far.
    pub fn counts(&self) -> Counts {
        let mut all = Counts::default();
        for shard in &self.shards {
            all += shard.counts();
        }
        all
    }

    /// Faults by image and range since the last call, in order; none where they are not counted so
    /// ([`SharedOptions::fault_counts`]).
    pub fn take_range_faults(&self) -> Vec<RangeFaults> {
        let images = lock(&self.images).clone();
        let mut taken = Vec::new();
        for (number, image) in (0..).zip(&images) {
            if let Some(ranges) = image.ranges() {
                ranges.take(ImageId::new(number), &mut taken);
            }
        }
        taken
    }

    /// How many clients are served.
    pub fn clients(&self) -> usize {
        lock(&self.registry).len()
    }

    /// Which way messages and bytes take. What a ring's wait comes to is seen with the first
    /// client: see [`Attached::io`].
    pub fn io(&self) -> IoPath {
        self.shards.first().map_or(IoPath::Pread, Shard::path)
    }
}

impl Drop for SharedPager {
    fn drop(&mut self) {
        let path = self.io();
        self.shards.clear();
        for metrics in lock(&self.metrics).values() {
            metrics.serving(path.name(), false);
        }
    }
}

/// One shard of a shared pager.
fn plan(
    options: &SharedOptions,
    (number, cpu): (usize, Option<usize>),
    registry: &Arc<Mutex<Registry>>,
    events: &Listener,
) -> ShardPlan {
    let registry = Arc::clone(registry);
    let events = Arc::clone(events);
    let decorate = options.decorate.clone();
    ShardPlan {
        name: format!("pando-pager-{number}"),
        io: options.io,
        verify: options.verify,
        fault_deadline: options.fault_deadline,
        budget: options.budget.clone(),
        cpu,
        spin: options.spin,
        decorate: decorate
            .map(|decorate| -> shard::Decorate { Box::new(move |source| decorate(source)) }),
        tally: Arc::default(),
        first: None,
        on_gone: Box::new(move |id| lock(&registry).free(id)),
        on_serving: Box::new(|_, _| ()),
        on_failure: Box::new(move |reason| {
            tracing::error!(shard = number, reason, "a shard of the pager ended");
            events(ClientEvent::ShardFailed {
                shard: number,
                reason: reason.to_owned(),
            });
        }),
    }
}

/// Nothing behind these locks can be left half-changed, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
