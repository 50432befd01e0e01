#![forbid(unsafe_code)]
//! Faults that wait for bytes: bounded, in order of arrival. Pure.

use std::time::{Duration, Instant};

use crate::page::{PageIndex, PageRange};
use crate::prefetch::plan::Window;
use crate::token::ReadSlot;

/// One fault that is not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiter {
    /// Which image.
    pub(crate) image: usize,
    /// The page asked for.
    pub(crate) page: PageIndex,
    /// When the pager learned of it.
    pub(crate) arrived: Instant,
    /// Failed tries so far.
    pub(crate) attempts: u32,
    /// How much to read at the first try.
    pub(crate) window: Window,
    /// The read that will answer it; `None` while it waits for a buffer or another try.
    pub(crate) read: Option<ReadSlot>,
}

/// The waiting faults. Holds at most its limit and never allocates after it was made.
#[derive(Debug)]
pub(crate) struct Queue {
    waiters: Vec<Waiter>,
    limit: usize,
}

impl Queue {
    /// Room for `limit` faults.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            waiters: Vec::with_capacity(limit),
            limit,
        }
    }

    /// How many more there is room for.
    pub(crate) fn room(&self) -> usize {
        self.limit.saturating_sub(self.waiters.len())
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.waiters.len()
    }

    /// Appends a fault. Whoever takes faults from the kernel asks for room first; what was taken
    /// must not be lost, so a fault beyond the limit is kept all the same.
    pub(crate) fn push(&mut self, waiter: Waiter) {
        self.waiters.push(waiter);
    }

    /// The oldest fault from position `from` on that no read answers, and its position.
    pub(crate) fn unassigned(&self, from: usize) -> Option<(usize, Waiter)> {
        let waiting = self.waiters.iter().enumerate().skip(from);
        waiting
            .filter(|(_, waiter)| waiter.read.is_none())
            .map(|(at, waiter)| (at, *waiter))
            .next()
    }

    /// Whether anybody waits for `page`.
    pub(crate) fn waits_for(&self, image: usize, page: PageIndex) -> bool {
        let mut waiters = self.waiters.iter();
        waiters.any(|waiter| waiter.image == image && waiter.page == page)
    }

    /// Lets `read` answer everybody who waits for one of `pages`.
    pub(crate) fn assign(&mut self, image: usize, pages: PageRange, read: ReadSlot) {
        for waiter in &mut self.waiters {
            if waiter.image == image && pages.contains(waiter.page) {
                waiter.read = Some(read);
            }
        }
    }

    /// The most failed tries of any waiter of `read`.
    pub(crate) fn attempts_of(&self, read: ReadSlot) -> u32 {
        let waiters = self.waiters.iter();
        let waiters = waiters.filter(|waiter| waiter.read == Some(read));
        waiters.map(|waiter| waiter.attempts).max().unwrap_or(0)
    }

    /// `read` failed its waiters: they count the try and wait for another, of their page alone.
    pub(crate) fn release(&mut self, read: ReadSlot) {
        for waiter in &mut self.waiters {
            if waiter.read == Some(read) {
                waiter.read = None;
                waiter.window.pages = 1;
                waiter.attempts += 1;
            }
        }
    }

    /// `read` failed, but perhaps only for pages that nobody waits for: its waiters wait for
    /// another of their page alone, which counts as their first try.
    pub(crate) fn narrow(&mut self, read: ReadSlot) {
        for waiter in &mut self.waiters {
            if waiter.read == Some(read) {
                waiter.read = None;
                waiter.window.pages = 1;
            }
        }
    }

    /// The same for everybody who waits for one of `pages`.
    pub(crate) fn narrow_pages(&mut self, image: usize, pages: PageRange) {
        for waiter in &mut self.waiters {
            if waiter.image == image && pages.contains(waiter.page) {
                waiter.read = None;
                waiter.window.pages = 1;
            }
        }
    }

    /// `page` failed its waiters: they count the try and wait for another. The most failed tries
    /// of any; `None` if nobody waits for it.
    pub(crate) fn release_page(&mut self, image: usize, page: PageIndex) -> Option<u32> {
        let mut most = None;
        for waiter in &mut self.waiters {
            if waiter.image == image && waiter.page == page {
                waiter.read = None;
                waiter.window.pages = 1;
                waiter.attempts += 1;
                most = most.max(Some(waiter.attempts));
            }
        }
        most
    }

    /// Removes everybody who waits for one of `pages`, telling `each`.
    pub(crate) fn answer(&mut self, image: usize, pages: PageRange, mut each: impl FnMut(&Waiter)) {
        self.waiters.retain(|waiter| {
            let answered = waiter.image == image && pages.contains(waiter.page);
            if answered {
                each(waiter);
            }
            !answered
        });
    }

    /// The first page that a waiter of `read` asked for.
    pub(crate) fn first_of(&self, read: ReadSlot) -> Option<Waiter> {
        let mut waiters = self.waiters.iter();
        waiters.find(|waiter| waiter.read == Some(read)).copied()
    }

    /// The oldest fault, if it waited for `limit` or longer at `now`.
    pub(crate) fn expired(&self, now: Instant, limit: Duration) -> Option<Waiter> {
        let oldest = self.waiters.first()?;
        (now.saturating_duration_since(oldest.arrived) >= limit).then_some(*oldest)
    }

    /// When the oldest fault will have waited for `limit`.
    pub(crate) fn next_deadline(&self, limit: Duration) -> Option<Instant> {
        self.waiters.first()?.arrived.checked_add(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageCount;

    use crate::prefetch::plan::Direction;

    fn waiter(page: u64, arrived: Instant) -> Waiter {
        Waiter {
            image: 0,
            page: PageIndex::new(page),
            arrived,
            attempts: 0,
            window: Window {
                direction: Direction::Forward,
                pages: 1,
                stream: 0,
            },
            read: None,
        }
    }

    #[test]
    fn it_knows_its_limit_and_keeps_order() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut queue = Queue::new(2);
        queue.push(waiter(1, start));
        queue.push(waiter(2, later));
        assert_eq!((queue.room(), queue.len()), (0, 2));
        queue.push(waiter(3, later));
        assert_eq!((queue.room(), queue.len()), (0, 3));
        let limit = Duration::from_secs(10);
        assert_eq!(queue.next_deadline(limit), Some(start + limit));
        assert_eq!(queue.expired(start + limit, limit).unwrap().page.get(), 1);
        assert_eq!(queue.expired(later, limit), None);
        let mut answered = 0;
        queue.answer(0, PageRange::single(PageIndex::new(1)), |_| answered += 1);
        assert_eq!((answered, queue.len()), (1, 2));
        assert_eq!(queue.next_deadline(limit), Some(later + limit));
    }

    #[test]
    fn waiters_of_one_read_share_its_fate() {
        let start = Instant::now();
        let mut queue = Queue::new(9);
        for page in [4, 5, 5, 9] {
            queue.push(waiter(page, start));
        }
        let read = ReadSlot::new(3);
        queue.assign(
            0,
            PageRange::new(PageIndex::new(4), PageCount::new(4)),
            read,
        );
        assert_eq!(queue.unassigned(0).unwrap().1.page.get(), 9);
        assert_eq!(queue.first_of(read).unwrap().page.get(), 4);
        assert_eq!(queue.attempts_of(read), 0);
        queue.release(read);
        assert_eq!(queue.unassigned(0).unwrap().1.page.get(), 4);
        assert_eq!(queue.unassigned(2).unwrap().0, 2);
        assert!(queue.waits_for(0, PageIndex::new(5)));
        assert!(!queue.waits_for(1, PageIndex::new(5)));
        assert_eq!(queue.release_page(0, PageIndex::new(5)), Some(2));
        assert_eq!(queue.release_page(0, PageIndex::new(6)), None);
    }
}
