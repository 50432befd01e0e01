#![forbid(unsafe_code)]
//! Faults that cannot be answered with the page: an error instead of zeros, or of waiting.

use std::time::Instant;

use rustix::io::Errno;

use super::Server;
use super::place::Place;
use crate::counts::add;
use crate::health::{PoisonMethod, PoisonReason, PoisonedPage};
use crate::install::{Content, install};
use crate::page::{PageIndex, PageRange};
use crate::residency::PageState;

impl Server {
    /// Ends every fault that waited too long. A read that is still under way keeps its buffer;
    /// what it brings later finds nobody to install it for.
    pub(super) fn end_overdue(&mut self) {
        let limit = self.parts.fault_deadline;
        let now = Instant::now();
        while let Some(waiter) = self.queue.expired(now, limit) {
            if let Some(slot) = waiter.read
                && let Some(read) = self.reads[slot.index()].as_mut()
            {
                read.wanted &= !read.bit(waiter.page);
            }
            let reason = match waiter.refused {
                None => PoisonReason::Deadline { limit },
                Some(Errno::NOMEM) => PoisonReason::NoMemory,
                Some(errno) => PoisonReason::Install {
                    errno: errno.raw_os_error(),
                },
            };
            self.poison(waiter.image, waiter.page, reason);
        }
    }

    /// Makes every access to a page an error and wakes who waits for it. Whoever listens to
    /// `Health` learns of it first.
    pub(super) fn poison(&mut self, image: usize, page: PageIndex, reason: PoisonReason) {
        let poisoned = PoisonedPage {
            image: self.parts.images[image].image.id().to_owned(),
            page,
            reason,
        };
        tracing::error!(%poisoned, "a page cannot be served");
        self.parts.metrics.poisoned();
        add(&self.parts.tally.poisoned, 1);
        self.parts.health.report(&poisoned);
        let pages = PageRange::single(page);
        self.queue.answer(image, pages, |_| ());
        let Some(mapping) = self.parts.images[image].region.pin() else {
            return;
        };
        let mut state = PageState::Poisoned;
        let mut marked = false;
        if self.parts.health.poison_method() == PoisonMethod::Marker {
            let mut place = Place {
                uffd: &self.parts.uffd,
                mapping: &mapping,
                inbox: &mut self.inbox,
            };
            let report = install(&mut place, pages, Content::Poison);
            marked = report.stopped.is_none();
            if report.present > 0 {
                // Somebody else filled it: nothing is missing.
                state = PageState::Present;
            }
        }
        if !marked {
            // More mappings than the kernel allows: then all of the clone's memory must go.
            let forbidden = mapping
                .forbid(pages)
                .or_else(|_| mapping.forbid(self.parts.images[image].whole()));
            if let Err(error) = forbidden {
                tracing::error!(%error, "a page that cannot be served cannot be protected either");
            }
            self.wake(image, pages);
        }
        self.parts.images[image].residency.set(page, state);
    }
}
