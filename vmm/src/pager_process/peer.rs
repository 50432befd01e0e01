#![forbid(unsafe_code)]
//! One peer in the loop of a pager process.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::PollFlags;

use super::outlet::Outlet;
use super::registry::PeerId;
use crate::clone::control::{ControlError, Received};

/// Most orders of one peer that are done before the others have their turn.
pub const ORDERS_AT_ONCE: usize = 16;

/// A connection.
#[derive(Debug)]
pub struct Peer {
    /// Who.
    pub id: PeerId,
    /// The way to it, and what it says.
    pub outlet: Arc<Outlet>,
}

impl Peer {
    /// What to wait for. What a peer wants is not looked at while it does not read what it was told.
    pub fn flags(&self) -> PollFlags {
        if self.outlet.is_clear() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        }
    }

    /// Sends what waits, then has at most [`ORDERS_AT_ONCE`] orders done; `false` when the peer is
    /// gone. `next` takes one message from its socket.
    pub fn attend<T>(
        &self,
        next: impl Fn(&Outlet) -> Result<Received<T>, ControlError>,
        mut obey: impl FnMut(T, Vec<OwnedFd>),
    ) -> Result<bool, ControlError> {
        self.outlet.flush();
        for _ in 0..ORDERS_AT_ONCE {
            if self.outlet.is_broken() {
                return Ok(false);
            }
            if !self.outlet.is_clear() {
                break;
            }
            match next(&self.outlet)? {
                Received::Message(message, descriptors) => obey(message, descriptors),
                Received::Nothing => break,
                Received::Closed => return Ok(false),
            }
        }
        Ok(true)
    }
}
