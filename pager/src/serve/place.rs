#![forbid(unsafe_code)]
//! The real kernel below the install ladder.

use std::os::fd::AsFd;

use userfaultfd::Uffd;

use crate::install::PageOps;
use crate::page::PageRange;
use crate::port::Inbox;
use crate::sys::mmap::ServedMapping;
use crate::sys::userfaultfd::{self as sys, Answer};

/// Messages that an install may take off the userfaultfd to get it going again.
const DRAIN_ROOM: usize = 1024;

/// One clone's memory, held mapped while something is installed in it.
pub(super) struct Place<'a> {
    pub(super) uffd: &'a Uffd,
    pub(super) mapping: &'a ServedMapping,
    pub(super) inbox: &'a mut Inbox,
}

impl PageOps for Place<'_> {
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer {
        sys::copy(self.uffd.as_fd(), self.mapping, pages, source)
    }

    fn zero(&mut self, pages: PageRange) -> Answer {
        sys::zero(self.uffd.as_fd(), self.mapping, pages)
    }

    fn poison(&mut self, pages: PageRange) -> Answer {
        sys::poison(self.uffd.as_fd(), self.mapping, pages)
    }

    fn wake(&mut self, pages: PageRange) {
        sys::wake(self.uffd, self.mapping, pages);
    }

    fn drain(&mut self) {
        let room = DRAIN_ROOM.saturating_sub(self.inbox.messages.len());
        if let Err(error) = self.inbox.drain(self.uffd, room) {
            tracing::warn!(%error, "cannot read the userfaultfd");
        }
    }
}
