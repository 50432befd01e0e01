#![forbid(unsafe_code)]
//! The life of a pager thread: set up, serve, and an end that leaves neither sleepers nor zeros.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam::channel::Sender;
use rustix::event::{EventfdFlags, eventfd};
use userfaultfd::Uffd;

use crate::counts::Tally;
use crate::error::PagerError;
use crate::handle::Idle;
use crate::options::{IoMode, PagerOptions, Verify};
use crate::page::{PageCount, PageIndex, PageRange};
use crate::port::{IoPath, Poller, Port};
use crate::region::Region;
use crate::serve::{Parts, Server};
use crate::source::{FileSource, PageSource, PreadSource};
use crate::sys::buffers::BufferPool;
use crate::sys::uring::{Ring, UffdWait};
use crate::sys::userfaultfd as uffd_sys;

/// The pager thread: sets up, says how that went, serves, and sees to it that its end by a bug
/// or an error leaves neither sleepers nor zeros.
pub(crate) fn main(
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
    let mut options = idle.options;
    if idle.recorder.is_some() {
        options.budget.data_window_pages = 1;
        options.budget.zero_window_pages = 1;
    }
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
        spin: options.spin,
        budget: options.budget,
        health: idle.health,
        metrics: idle.metrics,
        tally,
        recorder: idle.recorder,
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
        let wait = match options.io {
            IoMode::UringPoll => UffdWait::Poll,
            _ => UffdWait::Read,
        };
        match Ring::new(
            files.clone(),
            pool,
            Arc::clone(uffd),
            Arc::clone(&stop),
            wait,
        ) {
            Ok(ring) => return Ok((Port::Ring(Box::new(ring)), Box::new(FileSource))),
            Err(error) if options.io != IoMode::Auto => return Err(PagerError::Uring(error)),
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
