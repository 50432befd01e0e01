#![forbid(unsafe_code)]
//! A process with memory that another process's pager serves: what a clone is to its pager, without
//! the clone.

use std::hint::black_box;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pando_vmm::clone::control::Channel;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::sys::touch::Memory;

/// What this program is called with to be a client. Nobody types it.
pub(crate) const COMMAND: &str = "pager-client";
/// Most pages that a client is told to touch: the message has a bound.
pub(super) const MAX_PAGES: u64 = 8192;

/// To a client.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Map so many bytes and hand them over.
    Map { bytes: u64 },
    /// Touch these pages now, on this CPU or any.
    Touch { pages: Vec<u32>, cpu: Option<usize> },
}

/// From a client.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Where the memory is; its userfaultfd comes with it.
    Mapped { address: u64 },
    /// All was touched.
    Touched(Touched),
    /// Something went wrong.
    Failed(String),
}

/// What touching took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Touched {
    /// When it began, on the monotonic clock.
    pub(super) begun: Duration,
    /// Each touch, in nanoseconds.
    pub(super) touches_ns: Vec<u32>,
    /// Processor time of this client meanwhile.
    pub(super) processor: Duration,
}

impl Touched {
    /// When the last touch was over.
    pub(super) fn ended(&self) -> Duration {
        let all = self.touches_ns.iter().copied().map(u64::from).sum();
        self.begun + Duration::from_nanos(all)
    }
}

/// A client process; killed when dropped.
#[derive(Debug)]
pub(super) struct Client {
    process: Child,
    channel: Channel,
}

impl Client {
    /// Starts one.
    pub(super) fn start() -> Result<Self> {
        let program = std::env::current_exe().context("cannot tell where this program is")?;
        let (channel, theirs) = Channel::pair()?;
        let process = Command::new(program)
            .arg(COMMAND)
            .stdin(Stdio::from(theirs))
            .spawn()
            .context("cannot start a client")?;
        Ok(Self { process, channel })
    }

    /// Has it map `bytes`, in place of what it had; the address and the userfaultfd.
    pub(super) fn map(&self, bytes: u64) -> Result<(u64, OwnedFd)> {
        self.channel.send(&Order::Map { bytes }, &[])?;
        match self.channel.receive()?.context("a client is gone")? {
            (Answer::Mapped { address }, descriptors) => {
                let uffd = descriptors.into_iter().next();
                Ok((address, uffd.context("a client sent no userfaultfd")?))
            }
            (other, _) => bail!("a client that was to map memory said {other:?}"),
        }
    }

    /// Has it begin to touch.
    pub(super) fn go(&self, pages: Vec<u32>, cpu: Option<usize>) -> Result<()> {
        Ok(self.channel.send(&Order::Touch { pages, cpu }, &[])?)
    }

    /// What that took.
    pub(super) fn touched(&self) -> Result<Touched> {
        match self.channel.receive()?.context("a client is gone")?.0 {
            Answer::Touched(touched) => Ok(touched),
            other => bail!("a client that was to touch memory said {other:?}"),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Is a client, until the other end is closed.
pub(crate) fn serve() -> Result<()> {
    let stdin = rustix::stdio::stdin();
    let channel = Channel::new(
        stdin
            .try_clone_to_owned()
            .context("cannot take the socket")?,
    );
    let everywhere = sched_getaffinity(None).context("cannot tell this process's CPUs")?;
    // What was mapped last, with the descriptor that keeps missing pages from being zeros.
    let mut mapped: Option<(Memory, OwnedFd)> = None;
    while let Some((order, _)) = channel.receive()? {
        let answer = match order {
            Order::Map { bytes } => {
                drop(mapped.take());
                match Memory::missing(bytes) {
                    Ok((memory, uffd)) => {
                        let address = memory.address();
                        channel.send(&Answer::Mapped { address }, &[uffd.as_fd()])?;
                        mapped = Some((memory, uffd));
                        continue;
                    }
                    Err(error) => Answer::Failed(format!("{error:#}")),
                }
            }
            Order::Touch { pages, cpu } => match &mapped {
                Some((memory, _)) => touch(memory, &pages, cpu, &everywhere).map_or_else(
                    |error| Answer::Failed(format!("{error:#}")),
                    Answer::Touched,
                ),
                None => Answer::Failed("nothing is mapped".to_owned()),
            },
        };
        channel.send(&answer, &[])?;
    }
    Ok(())
}

fn touch(
    memory: &Memory,
    pages: &[u32],
    cpu: Option<usize>,
    everywhere: &CpuSet,
) -> Result<Touched> {
    let mut set = *everywhere;
    if let Some(cpu) = cpu {
        set = CpuSet::new();
        set.set(cpu);
    }
    sched_setaffinity(None, &set).context("cannot pin a client")?;
    // Written once, so that the room for the figures does not fault while it is measured.
    let mut touches_ns = vec![u32::MAX; pages.len()];
    touches_ns.clear();
    let before = clock(ClockId::ProcessCPUTime);
    let begun = clock(ClockId::Monotonic);
    let mut last = begun;
    for &page in pages {
        black_box(memory.read(page.into())?);
        let now = clock(ClockId::Monotonic);
        touches_ns.push(u32::try_from((now - last).as_nanos()).unwrap_or(u32::MAX));
        last = now;
    }
    Ok(Touched {
        begun,
        touches_ns,
        processor: clock(ClockId::ProcessCPUTime) - before,
    })
}

/// A clock's time.
pub(super) fn clock(id: ClockId) -> Duration {
    let time = clock_gettime(id);
    // Neither field is ever negative: these clocks start at zero.
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(time.tv_sec.unsigned_abs(), nanoseconds)
}
