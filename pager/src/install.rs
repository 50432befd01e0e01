#![forbid(unsafe_code)]
//! Putting pages in place: the only errno ladder of the crate.
//!
//! | the kernel says | what it means | what is done |
//! |---|---|---|
//! | all bytes done | installed, waiters woken | nothing more |
//! | fewer bytes done (with or without EAGAIN) | the prefix is installed and woken | go on behind it |
//! | EEXIST | the first page is there already; *nobody was woken* | wake it, go on behind it |
//! | EAGAIN, nothing done | the address space is changing, or an event is unread | drain messages, try again, at most [`AGAIN_LIMIT`] times |
//! | ENOMEM | no memory, or the cgroup's limit | try again, at most [`NO_MEMORY_LIMIT`] times |
//! | ENOENT, several pages | not one registered mapping: perhaps two | try again, page by page |
//! | ENOENT, one page | no registered mapping | stop: who waits must look again |
//! | ESRCH | the address space is gone | stop, quietly |
//! | EFAULT | the source bytes could not be read | stop: an error of the page |
//! | anything else | a bug, or a kernel that does not know the ioctl | stop: an error of the page |

use rustix::io::Errno;

use crate::page::{PAGE_BYTES, PageCount, PageRange};
use crate::sys::userfaultfd::Answer;

/// How often one install is tried again because the address space is changing.
pub(crate) const AGAIN_LIMIT: u32 = 64;
/// How often one install is tried again because there is no memory.
pub(crate) const NO_MEMORY_LIMIT: u32 = 3;

/// What the ladder needs of the kernel; the tests answer in its place.
pub(crate) trait PageOps {
    /// One COPY of `source` to `pages`.
    fn copy(&mut self, pages: PageRange, source: &[u8]) -> Answer;
    /// One ZEROPAGE.
    fn zero(&mut self, pages: PageRange) -> Answer;
    /// One POISON.
    fn poison(&mut self, pages: PageRange) -> Answer;
    /// Wakes who waits for `pages`.
    fn wake(&mut self, pages: PageRange);
    /// Takes unread messages off the userfaultfd, so that it can go on.
    fn drain(&mut self);
}

/// What to put at the pages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    /// These bytes, one page after the other; what is behind the last page is not used.
    Bytes(&'a [u8]),
    /// The zero page.
    Zero,
    /// A mark that makes every access an error.
    Poison,
}

impl Content<'_> {
    /// The same from byte `done` on.
    pub(crate) fn behind(self, done: u64) -> Self {
        match self {
            Self::Bytes(bytes) => {
                let at = usize::try_from(done).unwrap_or(usize::MAX);
                Self::Bytes(bytes.get(at..).unwrap_or(&[]))
            }
            other => other,
        }
    }
}

/// Why an install ended before its last page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The memory or its process is gone: nobody waits.
    Gone,
    /// The first page that was not done lies in no registered mapping any more, though the
    /// process lives: something else was mapped there. Who waits for it sleeps until woken.
    Unmapped,
    /// Still changing after [`AGAIN_LIMIT`] tries.
    Changing,
    /// Still no memory after [`NO_MEMORY_LIMIT`] tries.
    NoMemory,
    /// The kernel refused for another reason.
    Refused(Errno),
}

/// What an install did, from its first page on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Installed {
    /// Pages that this install filled.
    pub(crate) fresh: u64,
    /// Pages that were there already; their waiters were woken.
    pub(crate) present: u64,
    /// Tries repeated because of EAGAIN or a short copy.
    pub(crate) again: u32,
    /// Tries repeated because of ENOMEM.
    pub(crate) no_memory: u32,
    /// Tries repeated page by page because of ENOENT.
    pub(crate) split: u32,
    /// Why the rest was not done.
    pub(crate) stopped: Option<Stopped>,
}

impl Installed {
    /// The pages that are done for, either way.
    pub(crate) fn done(&self) -> u64 {
        self.fresh + self.present
    }

    /// Adds what was done of the pages right behind.
    pub(crate) fn add(&mut self, next: &Self) {
        self.fresh += next.fresh;
        self.present += next.present;
        self.again += next.again;
        self.no_memory += next.no_memory;
        self.split += next.split;
        self.stopped = next.stopped;
    }
}

/// Where an install goes from one answer.
enum Step {
    /// To what is not done yet.
    On,
    /// The same, but no call may ask for more than one page any more.
    PageByPage,
    /// Nowhere.
    Stop(Stopped),
}

/// Puts `content` at `pages`, whatever it takes, within the limits above.
pub(crate) fn install(ops: &mut dyn PageOps, pages: PageRange, content: Content<'_>) -> Installed {
    let mut report = Installed::default();
    let mut most = pages.count().get();
    while report.done() < pages.count().get() {
        let done = report.done();
        let left = pages.count().get() - done;
        let rest = PageRange::new(pages.start().plus(done), PageCount::new(left.min(most)));
        let answer = match content {
            Content::Bytes(bytes) => {
                let at = usize::try_from(done * PAGE_BYTES).unwrap_or(usize::MAX);
                let length = usize::try_from(rest.bytes()).unwrap_or(usize::MAX);
                let end = at.saturating_add(length);
                ops.copy(rest, bytes.get(at..end).unwrap_or(&[]))
            }
            Content::Zero => ops.zero(rest),
            Content::Poison => ops.poison(rest),
        };
        match step(ops, rest, answer, &mut report) {
            Step::On => {}
            Step::PageByPage => most = 1,
            Step::Stop(stopped) => {
                report.stopped = Some(stopped);
                break;
            }
        }
    }
    report
}

/// One rung: what `answer` to an install of `rest` means.
fn step(ops: &mut dyn PageOps, rest: PageRange, answer: Answer, report: &mut Installed) -> Step {
    let filled = u64::try_from(answer.done_bytes).unwrap_or(0) / PAGE_BYTES;
    let filled = filled.min(rest.count().get());
    if filled > 0 {
        report.fresh += filled;
        report.again += u32::from(filled < rest.count().get());
        return Step::On;
    }
    match answer.errno {
        // A success that did nothing would loop for ever: treated as the kernel's EAGAIN.
        None | Some(Errno::AGAIN) => {
            report.again += 1;
            if report.again > AGAIN_LIMIT {
                return Step::Stop(Stopped::Changing);
            }
            ops.drain();
            Step::On
        }
        Some(Errno::EXIST) => {
            ops.wake(PageRange::new(rest.start(), PageCount::new(1)));
            report.present += 1;
            Step::On
        }
        Some(Errno::NOMEM) => {
            report.no_memory += 1;
            if report.no_memory > NO_MEMORY_LIMIT {
                return Step::Stop(Stopped::NoMemory);
            }
            Step::On
        }
        Some(Errno::NOENT) if rest.count().get() > 1 => {
            report.split += 1;
            Step::PageByPage
        }
        Some(Errno::NOENT) => Step::Stop(Stopped::Unmapped),
        Some(Errno::SRCH) => Step::Stop(Stopped::Gone),
        Some(errno) => Step::Stop(Stopped::Refused(errno)),
    }
}

#[cfg(test)]
mod tests;
