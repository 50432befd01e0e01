#![forbid(unsafe_code)]
//! One thread that serves: set up, given orders, and an end that leaves neither sleepers nor zeros.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};

use crate::budget::Budget;
use crate::client::ClientId;
use crate::counts::{Counts, Tally};
use crate::error::PagerError;
use crate::options::{IoMode, Verify};
use crate::poller::Poller;
use crate::port::{IoPath, Port};
use crate::serve::{Attach, Command, Parts, Server, Stop};
use crate::source::{FileSource, PageSource, PreadSource};
use crate::sys::buffers::BufferPool;
use crate::sys::uring::{Ring, UffdWait};

/// Commands that a shard has not seen yet; who sends more waits.
const COMMANDS: usize = 64;

/// Puts something around a source.
pub(crate) type Decorate = Box<dyn FnOnce(Box<dyn PageSource>) -> Box<dyn PageSource> + Send>;

/// What a shard is made of.
pub(crate) struct ShardPlan {
    pub(crate) name: String,
    pub(crate) io: IoMode,
    pub(crate) verify: Verify,
    pub(crate) fault_deadline: Duration,
    pub(crate) budget: Budget,
    pub(crate) cpu: Option<usize>,
    pub(crate) spin: Duration,
    pub(crate) decorate: Option<Decorate>,
    pub(crate) tally: Arc<Tally>,
    /// Served from the beginning.
    pub(crate) first: Option<Box<Attach>>,
    /// Told when a client is no more.
    pub(crate) on_gone: Box<dyn Fn(ClientId) + Send>,
    /// Called on the thread around serving: that it begins and ends.
    pub(crate) on_serving: Box<dyn Fn(IoPath, bool) + Send>,
    /// Called on the thread when it ends by itself, with the reason.
    pub(crate) on_failure: Box<dyn Fn(&str) + Send>,
}

/// A thread that serves; dropping it ends it at once.
#[derive(Debug)]
pub(crate) struct Shard {
    thread: Option<JoinHandle<()>>,
    commands: Sender<Command>,
    bell: Arc<OwnedFd>,
    tally: Arc<Tally>,
    path: IoPath,
}

impl Shard {
    /// Starts the thread; it serves when this returns.
    pub(crate) fn start(plan: ShardPlan) -> Result<Self, PagerError> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            PagerError::Setup {
                what: "the bell of a shard",
                source: errno.into(),
            }
        })?;
        let bell = Arc::new(bell);
        let (commands, orders) = bounded(COMMANDS);
        let (ready, answer) = bounded(1);
        let (tally, thread_bell) = (Arc::clone(&plan.tally), Arc::clone(&bell));
        let thread = std::thread::Builder::new()
            .name(plan.name.clone())
            .spawn(move || main(plan, thread_bell, orders, &ready))
            .map_err(|source| PagerError::Setup {
                what: "pager thread",
                source,
            })?;
        let path = answer.recv().map_err(|_| ended())??;
        Ok(Self {
            thread: Some(thread),
            commands,
            bell,
            tally,
            path,
        })
    }

    /// Which way messages and bytes took when it began.
    pub(crate) fn path(&self) -> IoPath {
        self.path
    }

    /// What it did so far.
    pub(crate) fn counts(&self) -> Counts {
        self.tally.counts()
    }

    /// Asks the shard, and waits for its answer.
    pub(crate) fn ask<T>(
        &self,
        command: impl FnOnce(Sender<T>) -> Command,
    ) -> Result<T, PagerError> {
        let (reply, answer) = bounded(1);
        self.order(command(reply))?;
        answer.recv().map_err(|_| ended())
    }

    fn order(&self, command: Command) -> Result<(), PagerError> {
        self.commands.send(command).map_err(|_| ended())?;
        // Fails only when the counter is full: then the thread has been told.
        let _told = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        Ok(())
    }

    /// Ends the thread; false when it ended by a panic of its own.
    pub(crate) fn end(&mut self, stop: Stop) -> bool {
        let Some(thread) = self.thread.take() else {
            return true;
        };
        // It may have ended by itself.
        let _ended = self.order(Command::Stop(stop));
        thread.join().is_ok()
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.end(Stop::AtOnce);
    }
}

fn ended() -> PagerError {
    PagerError::Failed {
        reason: "its thread ended".to_owned(),
    }
}

/// The thread: sets up, says how that went, serves, and tells of its end by a bug or an error.
fn main(
    mut plan: ShardPlan,
    bell: Arc<OwnedFd>,
    orders: Receiver<Command>,
    ready: &Sender<Result<IoPath, PagerError>>,
) {
    let on_failure = std::mem::replace(&mut plan.on_failure, Box::new(|_| ()));
    let on_serving = std::mem::replace(&mut plan.on_serving, Box::new(|_, _| ()));
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut server = match set_up(plan, bell, orders) {
            Ok(server) => server,
            Err(error) => {
                let _caller_gone = ready.send(Err(error));
                return Ok(());
            }
        };
        let path = server.path();
        on_serving(path, true);
        let _caller_gone = ready.send(Ok(path));
        let result = server.run();
        on_serving(path, false);
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
    on_failure(&reason);
}

fn set_up(
    plan: ShardPlan,
    bell: Arc<OwnedFd>,
    commands: Receiver<Command>,
) -> Result<Server, PagerError> {
    if let Some(cpu) = plan.cpu {
        let mut set = rustix::thread::CpuSet::new();
        if cpu < rustix::thread::CpuSet::MAX_CPU {
            set.set(cpu);
        }
        rustix::thread::sched_setaffinity(None, &set).map_err(|errno| PagerError::Setup {
            what: "the CPU to pin the pager to",
            source: errno.into(),
        })?;
    }
    let pool = BufferPool::new(plan.budget.read_chunks).map_err(|source| PagerError::Setup {
        what: "read buffers",
        source,
    })?;
    let (port, source) = connect(plan.io, &plan.budget, &pool, &bell)?;
    let source = match plan.decorate {
        Some(decorate) => decorate(source),
        None => source,
    };
    let mut server = Server::new(Parts {
        port,
        source,
        pool,
        budget: plan.budget,
        verify: plan.verify == Verify::OnRead,
        fault_deadline: plan.fault_deadline,
        spin: plan.spin,
        tally: plan.tally,
        commands,
        bell,
        on_gone: plan.on_gone,
    });
    if let Some(first) = plan.first {
        let client = first.client.id;
        server
            .attach(*first)
            .map_err(|reason| PagerError::Client { client, reason })?;
    }
    Ok(server)
}

/// Chooses the way: a ring if it may and can be had, else epoll and pread.
fn connect(
    io: IoMode,
    budget: &Budget,
    pool: &BufferPool,
    bell: &Arc<OwnedFd>,
) -> Result<(Port, Box<dyn PageSource>), PagerError> {
    if io != IoMode::Pread {
        let wait = match io {
            IoMode::UringPoll => UffdWait::Poll,
            _ => UffdWait::Read,
        };
        match Ring::new(pool, Arc::clone(bell), wait, budget.clients.max(1)) {
            Ok(ring) => return Ok((Port::Ring(Box::new(ring)), Box::new(FileSource))),
            Err(error) if io != IoMode::Auto => return Err(PagerError::Uring(error)),
            Err(error) => tracing::info!(%error, "io_uring is refused, reading with pread"),
        }
    }
    let setup = |source: io::Error| PagerError::Setup {
        what: "reading threads",
        source,
    };
    let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let signal = Arc::new(signal.map_err(|errno| setup(errno.into()))?);
    let source = PreadSource::new(budget.read_threads, pool.capacity(), &signal).map_err(setup)?;
    let poller = Poller::new(bell, signal).map_err(setup)?;
    Ok((Port::Poll(poller), Box::new(source)))
}
