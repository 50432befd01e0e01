#![forbid(unsafe_code)]
//! A pager from the outside: made, given images, set to serve, stopped.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::bounded;
use rustix::event::{EventfdFlags, eventfd};
use userfaultfd::Uffd;

use crate::counts::{Counts, Tally};
use crate::error::PagerError;
use crate::health::{Health, PoisonMethod};
use crate::image::Image;
use crate::memory::CloneMemory;
use crate::metrics::{Metrics, Origin};
use crate::options::{PagerOptions, Verify};
use crate::port::IoPath;
use crate::record::Recorder;
use crate::region::Region;
use crate::root_memory::RootMemory;
use crate::serve::Served;
use crate::source::PageSource;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd as uffd_sys;
use crate::working_set::Trace;

type Decorate = Box<dyn FnOnce(Box<dyn PageSource>) -> Box<dyn PageSource> + Send>;

/// State of a pager that does not serve yet.
pub struct Idle {
    pub(crate) options: PagerOptions,
    pub(crate) uffd: Arc<Uffd>,
    pub(crate) images: Vec<Served>,
    pub(crate) mappings: Vec<Region>,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) decorate: Option<Decorate>,
    /// Pages that were installed before serving.
    pub(crate) ahead_pages: u64,
    /// Pages without data that were.
    pub(crate) ahead_zero_pages: u64,
    pub(crate) recorder: Option<Recorder>,
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idle")
            .field("options", &self.options)
            .field("images", &self.images.len())
            .finish_non_exhaustive()
    }
}

/// State of a pager that serves; dropping it stops it.
#[derive(Debug)]
pub struct Serving {
    thread: Option<JoinHandle<()>>,
    stop: Arc<OwnedFd>,
    health: Health,
    tally: Arc<Tally>,
    path: IoPath,
    recorder: Option<Recorder>,
}

/// Serves the pages of images to memory of this process: one thread, one userfaultfd.
#[derive(Debug)]
pub struct Pager<S> {
    state: S,
}

impl Pager<Idle> {
    /// Gets a userfaultfd and fetches the metric handles: install a recorder before.
    pub fn new(options: PagerOptions) -> Result<Self, PagerError> {
        let (uffd, poison) = uffd_sys::open().map_err(PagerError::Userfaultfd)?;
        let method = if poison {
            PoisonMethod::Marker
        } else {
            PoisonMethod::Protect
        };
        let metrics = Arc::new(Metrics::new(&options.template));
        let recorder = options.record.map(Recorder::new);
        Ok(Self {
            state: Idle {
                options,
                uffd: Arc::new(uffd),
                images: Vec::new(),
                mappings: Vec::new(),
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

    /// Maps memory for a clone of `image`. Nothing is read; what touches it before the pager
    /// serves sleeps until then.
    pub fn attach(&mut self, image: Image) -> Result<CloneMemory, PagerError> {
        let id = || image.id().to_owned();
        let bytes = image.bytes();
        if bytes == 0 {
            return Err(PagerError::Empty { image: id() });
        }
        let map = |source| PagerError::Map {
            image: id(),
            bytes,
            source,
        };
        let mapping = Arc::new(ServedMapping::new(bytes).map_err(map)?);
        let own = uffd_sys::duplicate(&self.state.uffd).map_err(map)?;
        let missing = uffd_sys::register(&self.state.uffd, &mapping).map_err(|source| {
            PagerError::Register {
                image: id(),
                bytes,
                source,
            }
        })?;
        if !missing.is_empty() {
            let image = id();
            return Err(PagerError::Ioctls { image, missing });
        }
        Ok(self.serve_in(image, mapping, own))
    }

    /// Takes over memory that this process inherited from a root: registers its holes, so that
    /// nothing reads them as zeros. Comes before anything can touch the memory.
    pub fn attach_inherited(
        &mut self,
        image: Image,
        memory: RootMemory,
    ) -> Result<CloneMemory, PagerError> {
        let id = || image.id().to_owned();
        let holes = |source| PagerError::Holes {
            image: id(),
            source,
        };
        let (mapping, runs) = memory.into_parts().map_err(holes)?;
        let own = uffd_sys::duplicate(&self.state.uffd).map_err(holes)?;
        for run in runs {
            let missing =
                uffd_sys::register_pages(&self.state.uffd, &mapping, run).map_err(holes)?;
            if !missing.is_empty() {
                let image = id();
                return Err(PagerError::Ioctls { image, missing });
            }
        }
        Ok(self.serve_in(image, mapping, own))
    }

    /// Memory of `image` that is registered: the pager's part of it, and the clone's.
    fn serve_in(&mut self, image: Image, mapping: Arc<ServedMapping>, own: OwnedFd) -> CloneMemory {
        self.state.mappings.push(Region::new(&mapping));
        let served = Served::new(image, Region::new(&mapping));
        self.state.images.push(served);
        CloneMemory::new(mapping, own)
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

    pub(crate) fn for_installing(&mut self) -> (&Uffd, &mut [Served]) {
        let state = &mut self.state;
        (&state.uffd, &mut state.images)
    }

    /// What goes wrong later, to be listened to before it does.
    pub fn health(&self) -> Health {
        self.state.health.clone()
    }

    /// Starts the pager thread; it serves when this returns.
    pub fn serve(self) -> Result<Pager<Serving>, PagerError> {
        let idle = self.state;
        let setup = |what| {
            move |errno: rustix::io::Errno| PagerError::Setup {
                what,
                source: errno.into(),
            }
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(setup("stop eventfd"))?;
        let stop = Arc::new(stop);
        let tally = Arc::new(Tally::default());
        crate::counts::add(&tally.pages_cache, idle.ahead_pages);
        crate::counts::add(&tally.pages_zero, idle.ahead_zero_pages);
        let health = idle.health.clone();
        let recorder = idle.recorder.clone();
        let (ready, answer) = bounded(1);
        let (thread_stop, thread_tally) = (Arc::clone(&stop), Arc::clone(&tally));
        let thread = std::thread::Builder::new()
            .name("pando-pager".to_owned())
            .spawn(move || crate::thread::main(idle, thread_stop, thread_tally, &ready))
            .map_err(|source| PagerError::Setup {
                what: "pager thread",
                source,
            })?;
        let failed = |health: &Health| PagerError::Failed {
            reason: health.failure().unwrap_or_default(),
        };
        let path = answer.recv().map_err(|_| failed(&health))??;
        Ok(Pager {
            state: Serving {
                thread: Some(thread),
                stop,
                health,
                tally,
                path,
                recorder,
            },
        })
    }
}

impl Pager<Serving> {
    /// What went wrong so far.
    pub fn health(&self) -> Health {
        self.state.health.clone()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.state.tally.counts()
    }

    /// What the clone has touched so far, if that is recorded. Images are counted in the order in
    /// which they were attached.
    pub fn trace(&self) -> Option<Trace> {
        self.state.recorder.as_ref().map(Recorder::trace)
    }

    /// Which way messages and bytes take.
    pub fn io(&self) -> IoPath {
        self.state.path
    }

    /// Answers every fault that was raised until now, then ends the thread. Stop what touches the
    /// memory first: a fault raised later sleeps until the memory is dropped.
    pub fn stop(mut self) -> Result<Counts, PagerError> {
        self.state.end();
        match self.state.health.failure() {
            None => Ok(self.state.tally.counts()),
            Some(reason) => Err(PagerError::Failed { reason }),
        }
    }
}

impl Serving {
    fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        // Fails only when the counter is full: then the thread has been told.
        let _told = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if thread.join().is_err() {
            self.health.fail("the pager thread panicked while it ended");
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.end();
    }
}
