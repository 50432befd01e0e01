#![forbid(unsafe_code)]
//! What comes to a device from outside, without the guest asking for it: the guest gives room ahead, in
//! requests that wait in a queue until there is something to put there.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use super::device::Interrupt;
use super::queue::{Chain, QueueError, VirtQueue};
use crate::memory::guest::GuestRam;

/// How much room the next thing needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// One request, whatever it has: what does not fit is the guest's loss.
    One,
    /// As many requests as have this many bytes.
    Bytes(u64),
}

/// The side of a device that is fed from outside. It is called from one thread at a time.
pub trait Inbound: fmt::Debug {
    /// The queue that has the room.
    fn queue(&self) -> usize;

    /// Readable when something waits outside; `None` where nothing ever comes.
    fn source(&self) -> Option<Arc<File>>;

    /// What the next thing needs; `None` where nothing waits. The same until it is delivered.
    fn next(&mut self) -> Option<Room>;

    /// Puts it into requests; how many bytes of each were written.
    fn deliver(&mut self, requests: &[Chain], ram: &GuestRam) -> Vec<u32>;

    /// Drops it: the guest will never have room.
    fn discard(&mut self);
}

/// What a queue waits for after it was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// For its next turn: there is more.
    ForNothing,
    /// For the source.
    ForInput,
    /// For the guest, which will notify.
    ForRoom,
}

/// What was found in a queue.
enum Found {
    Enough(Vec<Chain>),
    TooFew,
    /// All that the guest can give is not enough.
    Never,
}

/// Delivers until nothing waits, the guest has no room, `most` requests were used, or it `is_over`.
pub(super) fn serve(
    inbound: &mut dyn Inbound,
    queue: &mut VirtQueue,
    ram: &GuestRam,
    interrupt: &dyn Interrupt,
    most: u32,
    is_over: &dyn Fn() -> bool,
) -> Result<Waits, QueueError> {
    let mut done = 0;
    queue.hush(ram)?;
    while done < most && !is_over() {
        let Some(room) = inbound.next() else {
            return Ok(Waits::ForInput);
        };
        match gather(queue, ram, room)? {
            Found::Enough(requests) => {
                let written = inbound.deliver(&requests, ram);
                queue.push_all(ram, requests.iter().zip(written))?;
                if queue.wants_interrupt(ram)? {
                    interrupt.queue(inbound.queue());
                }
                done = done.saturating_add(u32::try_from(requests.len()).unwrap_or(u32::MAX));
            }
            Found::TooFew => return Ok(Waits::ForRoom),
            Found::Never => {
                inbound.discard();
                done += u32::from(queue.size());
            }
        }
    }
    Ok(Waits::ForNothing)
}

/// Takes requests that have enough room together, or none.
fn gather(queue: &mut VirtQueue, ram: &GuestRam, room: Room) -> Result<Found, QueueError> {
    let mut requests: Vec<Chain> = Vec::new();
    let (mut bytes, mut refused) = (0, 0);
    loop {
        // A guest that gives back at once what it got is not waited for.
        if requests.len() + refused >= usize::from(queue.size()) {
            queue.put_back(requests.len());
            return Ok(Found::Never);
        }
        let Some(request) = queue.pop(ram)? else {
            // Asked for behind all that was taken: the guest notifies of what is new.
            if queue.listen(ram)? {
                continue;
            }
            queue.put_back(requests.len());
            return Ok(Found::TooFew);
        };
        if request.is_malformed() {
            // It has no room; the guest gets it back.
            queue.push(ram, &request, 0)?;
            refused += 1;
            continue;
        }
        bytes += request.writable_bytes();
        requests.push(request);
        let is_enough = match room {
            Room::One => true,
            Room::Bytes(needed) => bytes >= needed,
        };
        if is_enough {
            return Ok(Found::Enough(requests));
        }
    }
}
