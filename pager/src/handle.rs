#![forbid(unsafe_code)]
//! A pager of one clone in this process: made, given images, set to serve, stopped.

use std::sync::Arc;

use userfaultfd::Uffd;

use crate::ahead::{Ahead, Brought};
use crate::client::{ClientId, ImageId, ImageRun};
use crate::counts::{Counts, Tally};
use crate::error::PagerError;
use crate::health::{Health, PoisonMethod};
use crate::image::Image;
use crate::memory::CloneMemory;
use crate::metrics::Metrics;
use crate::options::{PagerOptions, Verify};
use crate::port::IoPath;
use crate::range_faults::RangeFaults;
use crate::record::Recorder;
use crate::region::Region;
use crate::registration::Registration;
use crate::residency::PageState;
use crate::root_memory::RootMemory;
use crate::serve::{Attach, Client, Command, Served, ServedImage, Stop, Tells};
use crate::shard::{Decorate, Shard, ShardPlan};
use crate::source::PageSource;
use crate::sys::userfaultfd::{self as uffd_sys, Tracking};
use crate::working_set::{Plan, Trace};

/// The one client of such a pager.
const LOCAL: ClientId = ClientId::new(0);

/// State of a pager that does not serve yet.
pub struct Idle {
    options: PagerOptions,
    registration: Registration,
    regions: Vec<Served>,
    health: Health,
    metrics: Arc<Metrics>,
    decorate: Option<Decorate>,
    /// What was installed before serving.
    brought: Brought,
    recorder: Option<Recorder>,
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idle")
            .field("options", &self.options)
            .field("images", &self.regions.len())
            .finish_non_exhaustive()
    }
}

/// State of a pager that serves; dropping it stops it.
#[derive(Debug)]
pub struct Serving {
    shard: Shard,
    health: Health,
    recorder: Option<Recorder>,
    tracks_writes: bool,
    images: Vec<Arc<ServedImage>>,
}

/// Serves the pages of images to memory of this process: one thread, one userfaultfd.
#[derive(Debug)]
pub struct Pager<S> {
    state: S,
}

impl Pager<Idle> {
    /// Gets a userfaultfd and fetches the metric handles: install a recorder before.
    pub fn new(options: PagerOptions) -> Result<Self, PagerError> {
        let opened = uffd_sys::open(Tracking::wanted(options.track_writes))
            .map_err(PagerError::Userfaultfd)?;
        let method = if opened.poison {
            PoisonMethod::Marker
        } else {
            PoisonMethod::Protect
        };
        let metrics = Arc::new(Metrics::new(&options.template));
        let recorder = options.record.map(|most| Recorder::new(LOCAL, most));
        Ok(Self {
            state: Idle {
                options,
                registration: Registration::of(opened),
                regions: Vec::new(),
                health: Health::new(method),
                metrics,
                decorate: None,
                brought: Brought::default(),
                recorder,
            },
        })
    }

    /// Puts `decorate` around the source: to delay or fail reads in tests and measurements.
    #[must_use]
    pub fn with_source(
        mut self,
        decorate: impl FnOnce(Box<dyn PageSource>) -> Box<dyn PageSource> + Send + 'static,
    ) -> Self {
        self.state.decorate = Some(Box::new(decorate));
        self
    }

    /// Makes pages that cannot be had inaccessible in another way than the kernel's best: for
    /// guests that tell the two apart, and to see what older kernels do.
    #[must_use]
    pub fn with_poison_method(mut self, method: PoisonMethod) -> Self {
        self.state.health = self.state.health.with_method(method);
        self
    }

    /// Whether the kernel will know which pages of this clone were written: that was asked for
    /// (`PagerOptions::track_writes`), and it can.
    pub fn tracks_writes(&self) -> bool {
        self.state.registration.tracks_writes()
    }

    /// Maps memory for a clone of `image`. Nothing is read; what touches it before the pager
    /// serves sleeps until then.
    pub fn attach(&mut self, image: Image) -> Result<CloneMemory, PagerError> {
        let memory = self.state.registration.map(&image)?;
        self.serve_in(image, &memory);
        Ok(memory)
    }

    /// Takes over memory that this process inherited from a root: registers its holes, so that
    /// nothing reads them as zeros. Comes before anything can touch the memory.
    pub fn attach_inherited(
        &mut self,
        image: Image,
        memory: RootMemory,
    ) -> Result<CloneMemory, PagerError> {
        let missing = memory.holes();
        let memory = self.state.registration.inherit(&image, memory)?;
        self.serve_in(image, &memory);
        if let Some(served) = self.state.regions.last_mut() {
            served.inherits_all_but(&missing);
        }
        Ok(memory)
    }

    /// From now on the clone may discard pages of all memory that was attached for good
    /// (`CloneMemory::discard_to_zero`): `memories` are in the order in which they were attached.
    pub fn allow_discards<'a>(
        &mut self,
        memories: impl Iterator<Item = &'a mut CloneMemory>,
    ) -> Result<(), PagerError> {
        let maps = self.state.registration.make_discard_maps(memories)?;
        for (served, map) in self.state.regions.iter_mut().zip(maps) {
            served.discards = Some(map);
        }
        Ok(())
    }

    fn serve_in(&mut self, image: Image, memory: &CloneMemory) {
        let counts = self.state.options.fault_counts;
        let state = &mut self.state;
        let image = ServedImage::new(
            image,
            state.regions.len(),
            Arc::clone(&state.metrics),
            counts,
        );
        let served = Served::new(Arc::new(image), memory.region());
        state.regions.push(served);
    }

    /// Installs every page of `plan` in the memory that was attached, in the plan's order, its zero
    /// pages last. Images are counted as they were attached; pages of others are left out, and so
    /// are those that cannot be had: whoever touches them meets the pager's own tries.
    pub fn install_ahead(&mut self, plan: &Plan) -> Ahead {
        let state = &mut self.state;
        let images: Vec<Arc<ServedImage>> = state
            .regions
            .iter()
            .map(|served| Arc::clone(served.image()))
            .collect();
        let verify = state.options.verify == Verify::OnRead;
        let brought = state.registration.bring(
            plan,
            verify,
            |number| images.get(number).map(|served| served.image()),
            |number, pages| {
                if let Some(served) = state.regions.get_mut(number) {
                    served.set_all(pages, PageState::Present);
                }
            },
        );
        brought.count(&state.metrics);
        state.brought.fresh += brought.fresh;
        state.brought.fresh_zeros += brought.fresh_zeros;
        brought.ahead
    }

    /// What goes wrong later, to be listened to before it does.
    pub fn health(&self) -> Health {
        self.state.health.clone()
    }

    /// Starts the pager thread; it serves when this returns.
    pub fn serve(self) -> Result<Pager<Serving>, PagerError> {
        let idle = self.state;
        let tally = Arc::new(Tally::default());
        crate::counts::add(&tally.pages_cache, idle.brought.fresh);
        crate::counts::add(&tally.pages_zero, idle.brought.fresh_zeros);
        let (health, recorder) = (idle.health.clone(), idle.recorder.clone());
        let tracks_writes = idle.registration.tracks_writes();
        let regions = idle.regions.iter();
        let images = regions.map(|served| Arc::clone(served.image())).collect();
        let shard = Shard::start(plan(idle, tally)).map_err(|error| match health.failure() {
            Some(reason) => PagerError::Failed { reason },
            None => error,
        })?;
        Ok(Pager {
            state: Serving {
                shard,
                health,
                recorder,
                tracks_writes,
                images,
            },
        })
    }
}

/// The shard of one local client.
fn plan(idle: Idle, tally: Arc<Tally>) -> ShardPlan {
    let options = idle.options;
    let regions: Vec<Region> = idle
        .regions
        .iter()
        .map(|served| served.region().clone())
        .collect();
    let (health, metrics) = (idle.health.clone(), idle.metrics);
    let tells = Tells::Health(idle.health.clone());
    let tracking = idle.registration.tracking();
    let uffd = Arc::new(idle.registration.into_uffd());
    let mut client = Client::new(LOCAL, Arc::clone(&uffd), idle.regions, tells);
    client.poison = idle.health.poison_method();
    client.tracking = tracking;
    client.recorder = idle.recorder;
    ShardPlan {
        name: "pando-pager".to_owned(),
        io: options.io,
        verify: options.verify,
        fault_deadline: options.fault_deadline,
        budget: options.budget,
        cpu: options.cpu,
        spin: options.spin,
        decorate: idle.decorate,
        tally,
        first: Some(Box::new(Attach {
            client,
            pidfd: None,
            wake: false,
        })),
        on_gone: Box::new(|_| ()),
        on_serving: Box::new(move |path, begins| metrics.serving(path.name(), begins)),
        on_failure: Box::new(move |reason| forbid_all(reason, &health, &regions, &uffd)),
    }
}

/// The pager ended by itself: its clones' memory is made inaccessible, and who waits is woken.
fn forbid_all(reason: &str, health: &Health, regions: &[Region], uffd: &Uffd) {
    tracing::error!(
        reason,
        "the pager ended; its clones' memory is made inaccessible"
    );
    health.fail(reason);
    for memory in regions.iter().filter_map(Region::pin) {
        if let Err(error) = memory.forbid(memory.pages()) {
            tracing::error!(%error, "memory without a pager cannot be protected");
        }
        uffd_sys::wake(uffd, &memory, memory.pages());
    }
}

impl Pager<Serving> {
    /// What went wrong so far.
    pub fn health(&self) -> Health {
        self.state.health.clone()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.state.shard.counts()
    }

    /// Faults by image and range since the last call, in order; none where they are not counted so
    /// (`PagerOptions::fault_counts`). Images are counted in the order in which they were attached.
    pub fn take_range_faults(&self) -> Vec<RangeFaults> {
        let mut taken = Vec::new();
        for (number, image) in (0..).zip(&self.state.images) {
            if let Some(ranges) = image.ranges() {
                ranges.take(ImageId::new(number), &mut taken);
            }
        }
        taken
    }

    /// What the clone has touched so far, if that is recorded. Images are counted in the order in
    /// which they were attached.
    pub fn trace(&self) -> Option<Trace> {
        self.state.recorder.as_ref().map(Recorder::trace)
    }

    /// Makes pages absent again: the next touch brings the template's bytes. In force when this
    /// returns. Call it while nothing touches the pages, and discard them (MADV_DONTNEED) then.
    /// Images are counted in the order in which they were attached.
    pub fn forget(&self, runs: &[ImageRun]) -> Result<(), PagerError> {
        let runs = runs.to_vec();
        let answer = self
            .state
            .shard
            .ask(|reply| Command::Forget(LOCAL, runs, reply))?;
        answer.map_err(|reason| PagerError::Client {
            client: LOCAL,
            reason,
        })
    }

    /// Whether the kernel knows which pages of this clone were written.
    pub fn tracks_writes(&self) -> bool {
        self.state.tracks_writes
    }

    /// Which way messages and bytes take.
    pub fn io(&self) -> IoPath {
        self.state.shard.path()
    }

    /// Answers every fault that was raised until now, then ends the thread. Stop what touches the
    /// memory first: a fault raised later sleeps until the memory is dropped.
    pub fn stop(mut self) -> Result<Counts, PagerError> {
        self.state.end();
        match self.state.health.failure() {
            None => Ok(self.state.shard.counts()),
            Some(reason) => Err(PagerError::Failed { reason }),
        }
    }
}

impl Serving {
    fn end(&mut self) {
        if !self.shard.end(Stop::WhenAnswered) {
            self.health.fail("the pager thread panicked while it ended");
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.end();
    }
}
