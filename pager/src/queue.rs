#![forbid(unsafe_code)]
//! Faults that wait for bytes: bounded, in order of arrival. Pure.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::page::{PageIndex, PageRange};
use crate::prefetch::plan::Window;
use crate::retry::pause;
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
    /// No try before then: the last one failed for want of something that may come back.
    pub(crate) not_before: Option<Instant>,
    /// Why the last install failed, if it may be tried again.
    pub(crate) refused: Option<Errno>,
    /// How much to read at the first try.
    pub(crate) window: Window,
    /// The read that will answer it; `None` while it waits for a buffer or another try.
    pub(crate) read: Option<ReadSlot>,
}

impl Waiter {
    fn put_off(&mut self, now: Instant) {
        self.read = None;
        self.window.pages = 1;
        self.attempts += 1;
        self.not_before = now.checked_add(pause(self.attempts));
    }
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

    /// Ends the pauses that are over at `now`.
    pub(crate) fn end_pauses(&mut self, now: Instant) {
        for waiter in &mut self.waiters {
            if waiter.not_before.is_some_and(|then| then <= now) {
                waiter.not_before = None;
            }
        }
    }

    /// When the first pause is over.
    pub(crate) fn next_try(&self) -> Option<Instant> {
        let waiting = self.waiters.iter().filter(|waiter| waiter.read.is_none());
        waiting.filter_map(|waiter| waiter.not_before).min()
    }

    /// The oldest fault from position `from` on that no read answers and that may be tried now,
    /// and its position.
    pub(crate) fn unassigned(&self, from: usize) -> Option<(usize, Waiter)> {
        let waiting = self.waiters.iter().enumerate().skip(from);
        waiting
            .filter(|(_, waiter)| waiter.read.is_none() && waiter.not_before.is_none())
            .map(|(at, waiter)| (at, *waiter))
            .next()
    }

    /// Whether anybody waits for `page`.
    pub(crate) fn waits_for(&self, image: usize, page: PageIndex) -> bool {
        self.oldest_for(image, page).is_some()
    }

    /// Who waits for `page` for the longest time.
    pub(crate) fn oldest_for(&self, image: usize, page: PageIndex) -> Option<Waiter> {
        let mut waiters = self.waiters.iter();
        waiters
            .find(|waiter| waiter.image == image && waiter.page == page)
            .copied()
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

    /// `read` failed its waiters at `now`: they count the try and wait for another, of their page
    /// alone, after a pause.
    pub(crate) fn release(&mut self, read: ReadSlot, now: Instant) {
        for waiter in &mut self.waiters {
            if waiter.read == Some(read) {
                waiter.put_off(now);
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

    /// Installing `pages` failed at `now` with an `errno` that may pass: their waiters count the
    /// try and wait for another, of their page alone, after a pause.
    pub(crate) fn put_off(&mut self, image: usize, pages: PageRange, now: Instant, errno: Errno) {
        for waiter in &mut self.waiters {
            if waiter.image == image && pages.contains(waiter.page) {
                waiter.put_off(now);
                waiter.refused = Some(errno);
            }
        }
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
            not_before: None,
            refused: None,
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
        queue.release(read, start);
        assert_eq!(queue.unassigned(0).unwrap().1.page.get(), 9);
        queue.end_pauses(start + Duration::from_millis(1));
        assert_eq!(queue.unassigned(0).unwrap().1.page.get(), 4);
        assert_eq!(queue.unassigned(2).unwrap().0, 2);
        assert!(queue.waits_for(0, PageIndex::new(5)));
        assert!(!queue.waits_for(1, PageIndex::new(5)));
    }

    #[test]
    fn a_fault_that_was_put_off_waits_longer_each_time() {
        let start = Instant::now();
        let mut queue = Queue::new(9);
        queue.push(waiter(4, start));
        queue.push(waiter(7, start));
        let page = PageRange::single(PageIndex::new(4));
        let mut now = start;
        for (tries, pause) in (1..).zip([1, 2, 4, 8, 16, 32, 64, 100, 100]) {
            queue.put_off(0, page, now, Errno::NOMEM);
            let then = now + Duration::from_millis(pause);
            assert_eq!(queue.next_try(), Some(then));
            queue.end_pauses(then.checked_sub(Duration::from_nanos(1)).unwrap());
            assert_eq!(queue.unassigned(0).unwrap().1.page.get(), 7);
            queue.end_pauses(then);
            assert_eq!(queue.next_try(), None);
            let oldest = queue.unassigned(0).unwrap().1;
            assert_eq!((oldest.page, oldest.attempts), (page.start(), tries));
            assert_eq!(oldest.refused, Some(Errno::NOMEM));
            now = then;
        }
        // A read on its way needs no try.
        queue.put_off(0, page, now, Errno::NOMEM);
        queue.assign(0, page, ReadSlot::new(1));
        assert_eq!(queue.next_try(), None);
    }
}
