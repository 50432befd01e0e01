#![forbid(unsafe_code)]
//! What comes to a device from outside, without the guest asking for it: the guest gives room ahead, in
//! requests that wait in a queue until there is something to put there.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::device::Interrupt;
use super::queue::{Chain, QueueError, VirtQueue};
use crate::memory::guest::GuestRam;

/// What a device wants of a queue in which the guest gives room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Nothing: there is nothing to say.
    Nothing,
    /// Nothing before this time has passed: it has a limit.
    Later(Duration),
    /// A request to fill.
    Room,
    /// Requests that have this many bytes together, to be filled with one thing.
    Bytes(u64),
    /// To hear that the guest has given another request: by that it says that it has read the last.
    Return,
}

/// The side of a device that is fed from outside. It is called from one thread at a time.
pub trait Inbound: fmt::Debug {
    /// The queues in which the guest gives room, a bit for each.
    fn queues(&self) -> u64;

    /// Readable when something has happened outside; `None` where nothing ever does.
    fn source(&self) -> Option<Arc<OwnedFd>>;

    /// Takes in what has happened outside, as much as is done in bounded time: the source stays
    /// readable, or it [`Self::is_behind`], when there is more.
    fn look(&mut self);

    /// Whether there is more to take in that the source does not tell of.
    fn is_behind(&self) -> bool {
        false
    }

    /// What it wants of a queue. Where that is room, [`Self::fill`] has something to put there; where it is
    /// bytes, [`Self::fill_all`].
    fn wants(&mut self, queue: usize) -> Want;

    /// Fills a request; how many bytes were written. Guests give requests of any form.
    fn fill(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32;

    /// Fills requests with one thing; how many bytes of each were written. They are given back at once: the
    /// guest sees all of them, or none.
    fn fill_all(&mut self, _queue: usize, requests: &[Chain], _ram: &GuestRam) -> Vec<u32> {
        vec![0; requests.len()]
    }

    /// What it wants to put into a queue is lost: all that the guest can give is too little for it.
    fn lose(&mut self, _queue: usize) {}

    /// The guest has given another request where [`Want::Return`] was wanted.
    fn returned(&mut self, _queue: usize) {}
}

/// What is left when requests were filled.
pub(super) enum Left {
    /// Nothing, until something happens outside or the guest gives room.
    Nothing,
    /// More to do.
    More,
    /// More to do when this time has passed.
    Later(Duration),
}

/// Fills requests until nothing is wanted, the guest gives none, `most` were used, or it `is_over`.
pub(super) fn deliver(
    inbound: &mut dyn Inbound,
    (number, queue): (usize, &mut VirtQueue),
    ram: &GuestRam,
    interrupt: &dyn Interrupt,
    most: u32,
    is_over: &dyn Fn() -> bool,
) -> Result<Left, QueueError> {
    let mut done = 0;
    loop {
        match inbound.wants(number) {
            Want::Nothing => return Ok(Left::Nothing),
            Want::Later(time) => return Ok(Left::Later(time)),
            Want::Return if !queue.has_grown(ram)? => return Ok(Left::Nothing),
            Want::Return => inbound.returned(number),
            Want::Room | Want::Bytes(_) if done >= most || is_over() => return Ok(Left::More),
            Want::Bytes(bytes) => match gather(queue, ram, bytes)? {
                Found::Enough(requests) => {
                    done = done.saturating_add(u32::try_from(requests.len()).unwrap_or(u32::MAX));
                    let written = inbound.fill_all(number, &requests, ram);
                    queue.push_all(ram, requests.iter().zip(written))?;
                    if queue.wants_interrupt(ram)? {
                        interrupt.queue(number);
                    }
                }
                Found::TooFew => return Ok(Left::Nothing),
                Found::Never => {
                    done = done.saturating_add(queue.size().into());
                    inbound.lose(number);
                }
            },
            Want::Room => {
                done += 1;
                queue.hush(ram)?;
                let Some(request) = queue.pop(ram)? else {
                    if queue.listen(ram)? {
                        continue;
                    }
                    return Ok(Left::Nothing);
                };
                let bytes = if request.is_malformed() {
                    // It has no room; the guest gets it back.
                    0
                } else {
                    inbound.fill(number, &request, ram)
                };
                if inbound.wants(number) == Want::Return {
                    // Before the guest can have read it.
                    queue.watch(ram)?;
                }
                queue.push(ram, &request, bytes)?;
                if queue.wants_interrupt(ram)? {
                    interrupt.queue(number);
                }
            }
        }
    }
}

/// What was found in a queue.
enum Found {
    Enough(Vec<Chain>),
    /// The guest notifies of more.
    TooFew,
    /// All that the guest can give is not enough.
    Never,
}

/// Takes requests that have so many bytes together, or none.
fn gather(queue: &mut VirtQueue, ram: &GuestRam, bytes: u64) -> Result<Found, QueueError> {
    let mut requests: Vec<Chain> = Vec::new();
    let (mut room, mut refused) = (0_u64, 0);
    queue.hush(ram)?;
    while room < bytes || requests.is_empty() {
        // A guest that gives back at once what it got is not waited for.
        if requests.len() + refused >= usize::from(queue.size()) {
            queue.put_back(requests.len());
            return Ok(Found::Never);
        }
        let Some(request) = queue.pop(ram)? else {
            // Asked for behind all that was taken.
            if queue.listen(ram)? {
                continue;
            }
            queue.put_back(requests.len());
            return Ok(Found::TooFew);
        };
        if request.is_malformed() {
            // It has no room: the guest gets it back, and what was taken before it, so that the order stays.
            for taken in requests.drain(..).chain([request]) {
                queue.push(ram, &taken, 0)?;
                refused += 1;
            }
            room = 0;
            continue;
        }
        room = room.saturating_add(request.writable_bytes());
        requests.push(request);
    }
    Ok(Found::Enough(requests))
}
