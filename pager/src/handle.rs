#![forbid(unsafe_code)]
//! A pager of one clone in this process: made, given images, set to serve, stopped.

use std::sync::Arc;

use userfaultfd::Uffd;

use crate::client::{ClientId, ForgottenRun, ImageId};
use crate::counts::{Counts, Tally};
use crate::error::PagerError;
use crate::health::{Health, PoisonMethod};
use crate::image::Image;
use crate::memory::CloneMemory;
use crate::metrics::{Metrics, Origin};
use crate::options::{PagerOptions, Verify};
use crate::page::{PageIndex, PageRange};
use crate::port::IoPath;
use crate::range_faults::RangeFaults;
use crate::record::Recorder;
use crate::region::Region;
use crate::root_memory::RootMemory;
use crate::serve::{Attach, Client, Command, Served, ServedImage, Stop, Tells};
use crate::shard::{Decorate, Shard, ShardPlan};
use crate::source::PageSource;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd::{self as uffd_sys, Opened, Tracking};
use crate::working_set::Trace;

/// The one client of such a pager.
const LOCAL: ClientId = ClientId::new(0);

/// State of a pager that does not serve yet.
pub struct Idle {
    options: PagerOptions,
    uffd: Arc<Uffd>,
    tracking: Tracking,
    regions: Vec<Served>,
    health: Health,
    metrics: Arc<Metrics>,
    decorate: Option<Decorate>,
    /// Pages that were installed before serving.
    ahead_pages: u64,
    /// Pages without data that were.
    ahead_zero_pages: u64,
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
        let tracking = if options.track_writes {
            Tracking::On
        } else {
            Tracking::Off
        };
        let Opened {
            uffd,
            poison,
            tracks,
        } = uffd_sys::open(tracking).map_err(PagerError::Userfaultfd)?;
        let method = if poison {
            PoisonMethod::Marker
        } else {
            PoisonMethod::Protect
        };
        let metrics = Arc::new(Metrics::new(&options.template));
        let recorder = options.record.map(|most| Recorder::new(LOCAL, most));
        Ok(Self {
            state: Idle {
                options,
                uffd: Arc::new(uffd),
                tracking: if tracks { Tracking::On } else { Tracking::Off },
                regions: Vec::new(),
                health: Health::new(method),
                metrics,
                decorate: None,
                ahead_pages: 0,
                ahead_zero_pages: 0,
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
        self.state.tracking == Tracking::On
    }

    /// Maps memory for a clone of `image`. Nothing is read; what touches it before the pager
    /// serves sleeps until then.
    pub fn attach(&mut self, image: Image) -> Result<CloneMemory, PagerError> {
        let bytes = image.bytes();
        if bytes == 0 {
            let image = image.id().to_owned();
            return Err(PagerError::Empty { image });
        }
        let map = |source| PagerError::Map {
            image: image.id().to_owned(),
            bytes,
            source,
        };
        let mapping = Arc::new(ServedMapping::new(bytes).map_err(map)?);
        let whole = PageRange::new(PageIndex::default(), image.pages());
        self.register(&image, &mapping, whole)
            .map_err(|error| error.of(&image))?;
        self.serve_in(image, mapping)
    }

    /// Takes over memory that this process inherited from a root: registers its holes, so that
    /// nothing reads them as zeros. Comes before anything can touch the memory.
    pub fn attach_inherited(
        &mut self,
        image: Image,
        memory: RootMemory,
    ) -> Result<CloneMemory, PagerError> {
        let holes = |source| PagerError::Holes {
            image: image.id().to_owned(),
            source,
        };
        let (mapping, runs) = memory.into_parts().map_err(holes)?;
        for &run in &runs {
            self.register(&image, &mapping, run)
                .map_err(|error| match error {
                    Unregistered::Kernel(source) => holes(source),
                    Unregistered::Ioctls(_) => error.of(&image),
                })?;
        }
        let memory = self.serve_in(image, mapping)?;
        if let Some(served) = self.state.regions.last_mut() {
            served.inherits_all_but(&runs);
        }
        Ok(memory)
    }

    fn register(
        &self,
        image: &Image,
        mapping: &ServedMapping,
        pages: PageRange,
    ) -> Result<(), Unregistered> {
        let state = &self.state;
        let missing = uffd_sys::register(&state.uffd, mapping, pages, state.tracking)
            .map_err(Unregistered::Kernel)?;
        if missing.is_empty() {
            return Ok(());
        }
        tracing::debug!(image = image.id(), ?missing, "memory cannot be served");
        Err(Unregistered::Ioctls(missing))
    }

    /// Memory of `image` that is registered: the pager's part of it, and the clone's.
    fn serve_in(
        &mut self,
        image: Image,
        mapping: Arc<ServedMapping>,
    ) -> Result<CloneMemory, PagerError> {
        let own = uffd_sys::duplicate(&self.state.uffd).map_err(|source| PagerError::Map {
            image: image.id().to_owned(),
            bytes: image.bytes(),
            source,
        })?;
        let metrics = Arc::clone(&self.state.metrics);
        let counts = self.state.options.fault_counts;
        let image = ServedImage::new(image, self.state.regions.len(), metrics, counts);
        let served = Served::new(Arc::new(image), Region::own(&mapping));
        self.state.regions.push(served);
        Ok(CloneMemory::new(mapping, own))
    }

    pub(crate) fn verifies(&self) -> bool {
        self.state.options.verify == Verify::OnRead
    }

    pub(crate) fn installed_ahead(&mut self, pages: u64) {
        self.state.ahead_pages += pages;
        self.state.metrics.installed(Origin::Cache, pages);
        self.state.metrics.ahead(pages);
    }

    pub(crate) fn zeros_ahead(&mut self, pages: u64) {
        self.state.ahead_zero_pages += pages;
        self.state.metrics.installed(Origin::Zero, pages);
    }

    pub(crate) fn for_installing(&mut self) -> (&Uffd, Tracking, &mut [Served]) {
        let state = &mut self.state;
        (&state.uffd, state.tracking, &mut state.regions)
    }

    /// What goes wrong later, to be listened to before it does.
    pub fn health(&self) -> Health {
        self.state.health.clone()
    }

    /// Starts the pager thread; it serves when this returns.
    pub fn serve(self) -> Result<Pager<Serving>, PagerError> {
        let idle = self.state;
        let tally = Arc::new(Tally::default());
        crate::counts::add(&tally.pages_cache, idle.ahead_pages);
        crate::counts::add(&tally.pages_zero, idle.ahead_zero_pages);
        let (health, recorder) = (idle.health.clone(), idle.recorder.clone());
        let tracks_writes = idle.tracking == Tracking::On;
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

/// Why memory could not be registered.
enum Unregistered {
    Kernel(std::io::Error),
    Ioctls(Vec<&'static str>),
}

impl Unregistered {
    fn of(self, image: &Image) -> PagerError {
        let (id, bytes) = (image.id().to_owned(), image.bytes());
        match self {
            Self::Kernel(source) => PagerError::Register {
                image: id,
                bytes,
                source,
            },
            Self::Ioctls(missing) => PagerError::Ioctls { image: id, missing },
        }
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
    let (uffd, health, metrics) = (Arc::clone(&idle.uffd), idle.health.clone(), idle.metrics);
    let tells = Tells::Health(idle.health.clone());
    let mut client = Client::new(LOCAL, idle.uffd, idle.regions, tells);
    client.poison = idle.health.poison_method();
    client.tracking = idle.tracking;
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
    pub fn forget(&self, runs: &[ForgottenRun]) -> Result<(), PagerError> {
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
