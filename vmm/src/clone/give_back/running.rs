#![forbid(unsafe_code)]
//! A clone of this process that runs, as the one that gives memory back.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pando_pager::{ImageId, ImageRun};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{GiveBackError, GivenRun, Subject};
use crate::clone::control::{Channel, FromWorker, RawRun, ToWorker};
use crate::clone::instantiate::Paging;
use crate::machine::MachineHandle;
use crate::memory::guest::{RamBacking, place};
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
    /// Its memory as its pager counts it: what the guest lets go of stays mapped as long as this is there.
    pub backings: Vec<Option<Arc<RamBacking>>>,
    /// The way to the supervisor, for [`Paging::Shared`].
    pub asking: Asking<'a>,
}

/// The way to a pager elsewhere, through the supervisor.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// To the supervisor.
    pub channel: &'a Channel,
    /// How many orders were given: the number of the last.
    pub orders: &'a Cell<u64>,
    /// Set when an order to stop came instead of an answer.
    pub is_stopped: &'a Cell<bool>,
}

impl Asking<'_> {
    /// Asks the pager process and waits for the answer at most for `limit`. An order that was given up
    /// is answered late, perhaps while the next one is waited for: it says nothing of that one.
    fn ask(&self, runs: &[GivenRun], limit: Duration) -> bool {
        let runs = runs
            .iter()
            .map(|run| RawRun {
                image: u32::try_from(run.backend).unwrap_or(u32::MAX),
                first_page: run.pages.start().get(),
                pages: run.pages.count().get(),
            })
            .collect();
        let order = self.orders.get().wrapping_add(1);
        self.orders.set(order);
        let forget = FromWorker::Forget { order, runs };
        if let Err(error) = self.channel.send(&forget, &[]) {
            tracing::debug!("{}", chain(&error));
            return false;
        }
        let deadline = Instant::now() + limit;
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
                Ok(Some((
                    ToWorker::Forgotten {
                        order: answered,
                        is_done,
                    },
                    _,
                ))) => {
                    if answered == order {
                        return is_done;
                    }
                }
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
        let backings = self.backings.iter();
        backings.map(|backing| place(backing.as_deref())).collect()
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
            Paging::Shared => self.asking.ask(runs, ANSWER_LIMIT),
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
        let backing = self.backings.get(run.backend).and_then(Option::as_deref);
        match backing {
            Some(RamBacking::Paged(memory)) => memory.discard(run.pages),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pando_pager::{PageCount, PageIndex, PageRange};

    #[test]
    fn a_late_answer_is_none_to_the_next_order() {
        let (ours, theirs) = Channel::pair().unwrap();
        let supervisor = Channel::new(theirs);
        let (orders, is_stopped) = (Cell::new(0), Cell::new(false));
        let asking = Asking {
            channel: &ours,
            orders: &orders,
            is_stopped: &is_stopped,
        };
        let runs = [GivenRun {
            backend: 0,
            pages: PageRange::new(PageIndex::new(3), PageCount::new(2)),
        }];
        let next = || match supervisor.receive::<FromWorker>().unwrap().unwrap().0 {
            FromWorker::Forget { order, .. } => order,
            other => panic!("{other:?}"),
        };
        let answer = |order, is_done| {
            let answer = ToWorker::Forgotten { order, is_done };
            supervisor.send(&answer, &[]).unwrap();
        };
        assert!(!asking.ask(&runs, Duration::ZERO), "nobody answers");
        let first = next();
        answer(first, true);
        assert!(!asking.ask(&runs, Duration::ZERO), "of the first alone");
        let second = next();
        assert_ne!(first, second);
        answer(second, false);
        answer(second + 1, true);
        assert!(asking.ask(&runs, Duration::from_secs(10)));
        supervisor.send(&ToWorker::Stop, &[]).unwrap();
        assert!(!asking.ask(&runs, Duration::from_secs(10)));
        assert!(is_stopped.get());
    }
}
