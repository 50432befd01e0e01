#![forbid(unsafe_code)]
//! A pager from the outside: made, given images, set to serve, stopped.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};
use userfaultfd::Uffd;

use crate::budget::Budget;
use crate::counts::{Counts, Tally};
use crate::error::PagerError;
use crate::health::{Health, PoisonMethod};
use crate::image::Image;
use crate::metrics::Metrics;
use crate::page::{PageCount, PageIndex, PageRange};
use crate::port::{IoPath, Poller, Port};
use crate::region::Region;
use crate::serve::{Parts, Served, Server};
use crate::source::{FileSource, PageSource, PreadSource};
use crate::sys::buffers::BufferPool;
use crate::sys::mmap::ServedMapping;
use crate::sys::uring::{Ring, UffdWait};
use crate::sys::userfaultfd as uffd_sys;

/// How a pager reads its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoMode {
    /// io_uring, or pread where that is refused.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// pread with a few threads.
    Pread,
}

/// Whether bytes are compared with the index before they are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Each chunk when it is read for the first time.
    #[default]
    OnRead,
    /// Never: the file is known to be good (fs-verity, or checked by the caller).
    Off,
}

/// How a pager is to work.
#[derive(Clone, Debug)]
pub struct PagerOptions {
    /// Value of the `template` label of its metrics.
    pub template: String,
    /// How to read.
    pub io: IoMode,
    /// Whether to verify.
    pub verify: Verify,
    /// How long a fault may wait before its page is poisoned.
    pub fault_deadline: Duration,
    /// What may be used.
    pub budget: Budget,
    /// The CPU to pin the pager thread to: best the one where the faults are raised.
    pub cpu: Option<usize>,
}

impl Default for PagerOptions {
    fn default() -> Self {
        Self {
            template: "unnamed".to_owned(),
            io: IoMode::default(),
            verify: Verify::default(),
            fault_deadline: Duration::from_secs(10),
            budget: Budget::default(),
            cpu: None,
        }
    }
}

/// Anonymous memory of a clone that its pager fills. It has no way to reach the template's file.
///
/// The memory is unmapped when this is dropped, and only then (or when the pager is done with the
/// page it is just installing). It holds a descriptor of the userfaultfd of its own: a pager that
/// ends leaves missing pages missing, never zero.
#[derive(Debug)]
pub struct CloneMemory {
    // Before the descriptor: with the last descriptor closed, missing pages would read as zero.
    mapping: Arc<ServedMapping>,
    _uffd: OwnedFd,
}

impl CloneMemory {
    /// First address in this process; page aligned.
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.address()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes()
    }
}

type Decorate = Box<dyn FnOnce(Box<dyn PageSource>) -> Box<dyn PageSource> + Send>;

/// State of a pager that does not serve yet.
pub struct Idle {
    options: PagerOptions,
    uffd: Arc<Uffd>,
    images: Vec<Served>,
    mappings: Vec<Region>,
    health: Health,
    metrics: Arc<Metrics>,
    decorate: Option<Decorate>,
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
}

/// Serves the pages of images to memory of this process: one thread, one userfaultfd.
#[derive(Debug)]
pub struct Pager<S> {
    state: S,
}

impl Pager<Idle> {
    /// Gets a userfaultfd and fetches the metric handles: install a recorder before.
    pub fn new(options: PagerOptions) -> Result<Self, PagerError> {
        let (_, features) = uffd_sys::probe().map_err(PagerError::Userfaultfd)?;
        let uffd = uffd_sys::open(features).map_err(PagerError::Userfaultfd)?;
        let method = if features.poison() {
            PoisonMethod::Marker
        } else {
            PoisonMethod::Protect
        };
        let metrics = Arc::new(Metrics::new(&options.template));
        Ok(Self {
            state: Idle {
                options,
                uffd: Arc::new(uffd),
                images: Vec::new(),
                mappings: Vec::new(),
                health: Health::new(method),
                metrics,
                decorate: None,
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
        uffd_sys::register(&self.state.uffd, &mapping).map_err(|source| PagerError::Register {
            image: id(),
            bytes,
            source,
        })?;
        self.state.mappings.push(Region::new(&mapping));
        let served = Served::new(image, Region::new(&mapping));
        self.state.images.push(served);
        Ok(CloneMemory {
            mapping,
            _uffd: own,
        })
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
        let health = idle.health.clone();
        let (ready, answer) = bounded(1);
        let (thread_stop, thread_tally) = (Arc::clone(&stop), Arc::clone(&tally));
        let thread = std::thread::Builder::new()
            .name("pando-pager".to_owned())
            .spawn(move || thread_main(idle, thread_stop, thread_tally, &ready))
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

/// The pager thread: sets up, says how that went, serves, and sees to it that its end by a bug
/// or an error leaves neither sleepers nor zeros.
fn thread_main(
    mut idle: Idle,
    stop: Arc<OwnedFd>,
    tally: Arc<Tally>,
    ready: &Sender<Result<IoPath, PagerError>>,
) {
    let regions = std::mem::take(&mut idle.mappings);
    let (uffd, health) = (Arc::clone(&idle.uffd), idle.health.clone());
    let metrics = Arc::clone(&idle.metrics);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut server = match set_up(idle, stop, tally) {
            Ok(server) => server,
            Err(error) => {
                let _caller_gone = ready.send(Err(error));
                return Ok(());
            }
        };
        let path = server.path();
        metrics.serving(path.name(), true);
        let _caller_gone = ready.send(Ok(path));
        let result = server.run();
        metrics.serving(path.name(), false);
        result
    }));
    let reason = match outcome {
        Ok(Ok(())) => return,
        Ok(Err(error)) => format!("waiting for faults failed: {error}"),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned());
            format!("panic: {}", text.unwrap_or_default())
        }
    };
    tracing::error!(
        reason,
        "the pager ended; its clones' memory is made inaccessible"
    );
    health.fail(&reason);
    for mapping in regions.iter().filter_map(Region::pin) {
        let pages = PageCount::from_bytes(mapping.bytes()).unwrap_or_default();
        let whole = PageRange::new(PageIndex::default(), pages);
        if let Err(error) = mapping.forbid(whole) {
            tracing::error!(%error, "memory without a pager cannot be protected");
        }
        uffd_sys::wake(&uffd, &mapping, whole);
    }
}

fn set_up(idle: Idle, stop: Arc<OwnedFd>, tally: Arc<Tally>) -> Result<Server, PagerError> {
    if let Some(cpu) = idle.options.cpu {
        let mut set = rustix::thread::CpuSet::new();
        if cpu < rustix::thread::CpuSet::MAX_CPU {
            set.set(cpu);
        }
        rustix::thread::sched_setaffinity(None, &set).map_err(|errno| PagerError::Setup {
            what: "the CPU to pin the pager to",
            source: errno.into(),
        })?;
    }
    let options = idle.options;
    let pool = BufferPool::new(options.budget.read_chunks).map_err(|source| PagerError::Setup {
        what: "read buffers",
        source,
    })?;
    let files: Vec<Arc<File>> = idle
        .images
        .iter()
        .map(|served| Arc::clone(served.image().file()))
        .collect();
    let (port, source) = connect(&options, files, &pool, &idle.uffd, stop)?;
    let source = match idle.decorate {
        Some(decorate) => decorate(source),
        None => source,
    };
    Ok(Server::new(Parts {
        uffd: idle.uffd,
        port,
        source,
        pool,
        images: idle.images,
        verify: options.verify == Verify::OnRead,
        fault_deadline: options.fault_deadline,
        budget: options.budget,
        health: idle.health,
        metrics: idle.metrics,
        tally,
    }))
}

/// Chooses the way: a ring if it may and can be had, else poll and pread.
fn connect(
    options: &PagerOptions,
    files: Vec<Arc<File>>,
    pool: &BufferPool,
    uffd: &Arc<Uffd>,
    stop: Arc<OwnedFd>,
) -> Result<(Port, Box<dyn PageSource>), PagerError> {
    if options.io != IoMode::Pread {
        match Ring::new(files.clone(), pool, Arc::clone(uffd), Arc::clone(&stop)) {
            Ok(ring) => return Ok((Port::Ring(Box::new(ring)), Box::new(FileSource))),
            Err(error) if options.io == IoMode::Uring => return Err(PagerError::Uring(error)),
            Err(error) => tracing::info!(%error, "io_uring is refused, reading with pread"),
        }
    }
    let setup = |source: io::Error| PagerError::Setup {
        what: "reading threads",
        source,
    };
    let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let signal = Arc::new(signal.map_err(|errno| setup(errno.into()))?);
    let budget = &options.budget;
    let source =
        PreadSource::new(files, budget.read_threads, pool.capacity(), &signal).map_err(setup)?;
    Ok((Port::Poll(Poller::new(stop, signal)), Box::new(source)))
}

/// The path that a pager would take here; `Err` when io_uring is refused.
pub(crate) fn uring_path() -> io::Result<IoPath> {
    Ok(match crate::sys::uring::probe()? {
        UffdWait::Read => IoPath::UringRead,
        UffdWait::Poll => IoPath::UringPoll,
    })
}
