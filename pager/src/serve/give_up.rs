#![forbid(unsafe_code)]
//! Faults that cannot be answered with the page: an error instead of zeros, or of waiting.

use std::time::Instant;

use rustix::io::Errno;

use super::Server;
use super::place::Place;
use crate::counts::add;
use crate::health::{PoisonMethod, PoisonReason, PoisonedPage};
use crate::install::{Content, Stopped, install};
use crate::page::PageRange;
use crate::queue::{PageKey, Stage};
use crate::residency::PageState;
use crate::sys::userfaultfd::{self as sys, Tracking};

impl Server {
    /// Ends every fault that waited too long. A read that is still under way keeps its buffer;
    /// what it brings later finds nobody to install it for.
    pub(super) fn end_overdue(&mut self) {
        if self.queue.len() == 0 {
            return;
        }
        let limit = self.parts.fault_deadline;
        let now = Instant::now();
        while let Some(key) = self.queue.expired(now, limit) {
            let Some(want) = self.queue.get(key) else {
                return;
            };
            let reason = match want.refused {
                None => PoisonReason::Deadline { limit },
                Some(Errno::NOMEM) => PoisonReason::NoMemory,
                Some(errno) => PoisonReason::Install {
                    errno: errno.raw_os_error(),
                },
            };
            if let Stage::Reading(slot) = want.stage
                && let Some(read) = self.reads[slot.index()].as_mut()
            {
                read.leave_out(key.region, key.page);
            }
            self.poison(key, reason);
        }
    }

    /// Makes every access to a page an error and wakes who waits for it. Whoever listens learns of
    /// it first. Where the page is another process's and the kernel cannot mark it, nobody is woken.
    pub(super) fn poison(&mut self, key: PageKey, reason: PoisonReason) {
        self.queue.answer(key);
        let Some(client) = self.clients.get_mut(key.client()) else {
            return;
        };
        let served = &mut client.regions[key.region.region as usize];
        let poisoned = PoisonedPage {
            image: served.image.image().id().to_owned(),
            page: key.page,
            reason,
        };
        tracing::error!(%poisoned, client = %client.id, "a page cannot be served");
        served.image.metrics().poisoned();
        add(&self.parts.tally.poisoned, 1);
        client.tells.poisoned(client.id, &poisoned);
        let Some(memory) = served.pin() else {
            return;
        };
        let pages = PageRange::single(key.page);
        let mut state = PageState::Poisoned;
        let mut marked = false;
        if client.poison == PoisonMethod::Marker {
            let mut place = Place {
                uffd: &client.uffd,
                memory: &memory,
                pending: &mut client.pending,
                tracking: Tracking::Off,
            };
            let report = install(&mut place, pages, Content::Poison);
            marked = report.stopped.is_none();
            if report.present > 0 {
                // Somebody else filled it: nothing is missing.
                state = PageState::Present;
            }
            if report.stopped == Some(Stopped::Gone) {
                self.lost.push(key.client());
                return;
            }
        }
        if !marked {
            // More mappings than the kernel allows: then all of the clone's memory must go.
            let forbidden = memory
                .forbid(pages)
                .or_else(|_| memory.forbid(memory.pages()));
            match forbidden {
                Ok(true) => sys::wake(&client.uffd, &memory, pages),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%error, "a page that cannot be served cannot be protected either");
                    sys::wake(&client.uffd, &memory, pages);
                }
            }
        }
        served.set(key.page, state);
        if !client.pending.is_empty() && !std::mem::replace(&mut client.in_turn, true) {
            self.turns.push_back(key.client());
        }
    }
}
