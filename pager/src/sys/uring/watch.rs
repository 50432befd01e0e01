#![forbid(unsafe_code)]
//! The clients that a ring waits for: which of their requests are pending. A place is used again
//! only when none is, so that no completion finds another client in it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use userfaultfd::Uffd;

use super::MESSAGE_BUFFER_BYTES;
use crate::token::ClientSlot;

/// What a ring waits for on behalf of one client.
pub(super) struct Watched {
    pub(super) uffd: Arc<Uffd>,
    pub(super) pidfd: Option<Arc<OwnedFd>>,
    /// What the kernel writes messages to while a READ is pending.
    pub(super) messages: Box<[u8; MESSAGE_BUFFER_BYTES]>,
    /// A READ or POLL of the userfaultfd is pending.
    pub(super) is_armed: bool,
    /// A POLL of the pidfd is pending.
    pub(super) watches_end: bool,
    /// Nobody is interested any more.
    pub(super) is_closing: bool,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched")
            .field("is_armed", &self.is_armed)
            .field("watches_end", &self.watches_end)
            .field("is_closing", &self.is_closing)
            .finish_non_exhaustive()
    }
}

impl Watched {
    pub(super) fn new(uffd: Arc<Uffd>, pidfd: Option<Arc<OwnedFd>>) -> Self {
        Self {
            uffd,
            pidfd,
            messages: Box::new([0; MESSAGE_BUFFER_BYTES]),
            is_armed: false,
            watches_end: false,
            is_closing: false,
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.is_armed || self.watches_end
    }
}

/// Everybody that a ring waits for, by place.
#[derive(Debug, Default)]
pub(super) struct Watch {
    places: Vec<Option<Watched>>,
    free: Vec<ClientSlot>,
}

impl Watch {
    /// Gives `watched` a place.
    pub(super) fn add(&mut self, watched: Watched) -> ClientSlot {
        let slot = self.free.pop().unwrap_or_else(|| {
            let next = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
            self.places.push(None);
            ClientSlot::new(next)
        });
        self.places[slot.index()] = Some(watched);
        slot
    }

    pub(super) fn get_mut(&mut self, slot: ClientSlot) -> Option<&mut Watched> {
        self.places.get_mut(slot.index())?.as_mut()
    }

    pub(super) fn get(&self, slot: ClientSlot) -> Option<&Watched> {
        self.places.get(slot.index())?.as_ref()
    }

    /// Frees the place of a client that nobody is interested in and that has nothing pending.
    pub(super) fn settle(&mut self, slot: ClientSlot) {
        let done = self.get(slot).is_some_and(|w| w.is_closing && !w.is_busy());
        if done {
            self.places[slot.index()] = None;
            self.free.push(slot);
        }
    }

    /// Everybody who has something pending.
    pub(super) fn busy(&mut self) -> impl Iterator<Item = (ClientSlot, &mut Watched)> {
        let places = (0u32..).zip(&mut self.places);
        places.filter_map(|(number, place)| {
            let watched = place.as_mut().filter(|watched| watched.is_busy())?;
            Some((ClientSlot::new(number), watched))
        })
    }
}
