#![forbid(unsafe_code)]
//! A clone of this process that runs, as the one that gives memory back.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use pando_pager::{ImageId, ImageRun};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{GiveBackError, GivenRun, Subject};
use crate::clone::control::{Channel, FromWorker, RawRun, ToWorker};
use crate::clone::instantiate::Paging;
use crate::machine::MachineHandle;
use crate::memory::guest::{GuestRam, RamBacking};
use crate::observe::memory::ram::MemoryPlace;
use crate::report::chain;

/// How long the guest stands at most for an answer of the pager process.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A clone while it runs.
#[derive(Debug)]
pub struct Running<'a> {
    /// Its machine.
    pub handle: &'a MachineHandle,
    /// Who brings pages again.
    pub paging: &'a Paging,
    /// Its memory.
    pub ram: &'a GuestRam,
    /// The way to the supervisor, for [`Paging::Shared`].
    pub channel: &'a Channel,
    /// Set when an order to stop came instead of an answer.
    pub is_stopped: &'a Cell<bool>,
}

impl Running<'_> {
    /// Asks the pager process, by way of the supervisor.
    fn ask(&self, runs: &[GivenRun]) -> bool {
        let runs = runs
            .iter()
            .map(|run| RawRun {
                image: u32::try_from(run.backend).unwrap_or(u32::MAX),
                first_page: run.pages.start().get(),
                pages: run.pages.count().get(),
            })
            .collect();
        if let Err(error) = self.channel.send(&FromWorker::Forget(runs), &[]) {
            tracing::debug!("{}", chain(&error));
            return false;
        }
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let pause = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(1),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(self.channel, PollFlags::IN)];
            match poll(&mut fds, Some(&pause)) {
                Ok(1..) => (),
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) | Err(_) => return false,
            }
            match self.channel.receive::<ToWorker>() {
                Ok(Some((ToWorker::Forgotten { is_done }, _))) => return is_done,
                _ => {
                    self.is_stopped.set(true);
                    return false;
                }
            }
        }
    }
}

impl Subject for Running<'_> {
    fn places(&self) -> Vec<MemoryPlace> {
        self.ram.places().collect()
    }

    fn pause(&mut self) -> Result<(), GiveBackError> {
        Ok(self.handle.pause()?)
    }

    fn resume(&mut self) -> Result<(), GiveBackError> {
        Ok(self.handle.resume()?)
    }

    fn forget(&mut self, runs: &[GivenRun]) -> bool {
        match self.paging {
            Paging::None => false,
            Paging::Shared => self.ask(runs),
            Paging::Own(pager) => {
                let runs: Vec<_> = runs
                    .iter()
                    .map(|run| ImageRun {
                        image: ImageId::new(u32::try_from(run.backend).unwrap_or(u32::MAX)),
                        pages: run.pages,
                    })
                    .collect();
                pager.forget(&runs).is_ok()
            }
        }
    }

    fn discard(&mut self, run: &GivenRun) -> io::Result<()> {
        match self.ram.backings().get(run.backend) {
            Some(RamBacking::Paged(memory)) => memory.discard(run.pages),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }
}
