#![forbid(unsafe_code)]
//! A clone that records what it touches: when its run is over, what it wrote, and how its trace
//! gets to the supervisor, in pieces that fit a message.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pando_pager::working_set::{MAX_TOUCHES, Seen, Sight, Touch, Trace};
use pando_pager::{PageCount, PageIndex, PageRange, Pager, Serving};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};

use super::brought::Brought;
use super::sight::{MAX_SEEN, Sights, look};
use crate::machine::MachineHandle;
use crate::memory::guest::GuestRam;
use crate::observe::metrics::Judged;
use crate::template::Template;

/// How often is looked whether the guest has become quiet.
const LOOK_PERIOD: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// Most touches, or runs of pages, of one piece: 26 bytes each at most, as postcard writes them.
const MAX_PIECE_TOUCHES: usize = 4096;
/// Most touches of a clone that is recorded in passing: 256 MiB of guest memory.
pub const MAX_LESSON_TOUCHES: usize = 1 << 16;
/// How long a clone is recorded in passing.
pub const LESSON_WINDOW: Duration = Duration::from_secs(10);

/// What of a clone is recorded, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// A run that has no other purpose: nothing is brought ahead, and the machine ends with it.
    Run(Recording),
    /// The beginning of a clone's life, for so long at most; the clone goes on.
    Beginning(Duration),
}

impl Record {
    /// The most touches that are kept.
    pub fn max_touches(self) -> usize {
        match self {
            Self::Run(_) => MAX_TOUCHES,
            Self::Beginning(_) => MAX_LESSON_TOUCHES,
        }
    }
}

/// When a run that is recorded ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    /// No page was asked for, for so long.
    pub idle: Duration,
    /// The guest has run for so long.
    pub limit: Duration,
}

/// A part of a trace, in a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracePiece {
    /// Backend, page, whether it was written, and microseconds since the start, in order.
    touches: Vec<(u32, u64, bool, u64)>,
    /// Backend, first page, pages, and what was seen of them.
    seen: Vec<(u32, u64, u64, SeenAs)>,
    /// Whether all touches were recorded.
    is_complete: bool,
    /// Whether this is the end.
    is_last: bool,
}

/// [`Sight`] in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum SeenAs {
    Written,
    Unwritten,
    Unknown,
}

impl From<Sight> for SeenAs {
    fn from(sight: Sight) -> Self {
        match sight {
            Sight::Written => Self::Written,
            Sight::Unwritten => Self::Unwritten,
            Sight::Unknown => Self::Unknown,
        }
    }
}

impl From<SeenAs> for Sight {
    fn from(seen: SeenAs) -> Self {
        match seen {
            SeenAs::Written => Self::Written,
            SeenAs::Unwritten => Self::Unwritten,
            SeenAs::Unknown => Self::Unknown,
        }
    }
}

/// A clone that is recorded.
#[derive(Debug)]
pub struct Recorded<'a> {
    record: Record,
    /// What it is a clone of.
    template: &'a Template,
    brought: Brought,
    is_told: AtomicBool,
}

/// What a recorded clone tells of itself.
#[derive(Debug)]
pub struct Lesson {
    /// What it touched, in pieces that fit a message.
    pub pieces: Vec<TracePiece>,
    /// What bringing pages ahead was good for.
    pub judged: Judged,
}

impl<'a> Recorded<'a> {
    /// A clone of `template`.
    pub fn new(record: Record, template: &'a Template, brought: Brought) -> Self {
        Self {
            record,
            template,
            brought,
            is_told: AtomicBool::new(false),
        }
    }

    /// When its run ends and the machine with it, if that is so.
    pub fn run(&self) -> Option<Recording> {
        match self.record {
            Record::Run(recording) => Some(recording),
            Record::Beginning(_) => None,
        }
    }

    /// Whether a clone that has run for so long has been recorded for long enough.
    pub fn is_due(&self, age: Duration) -> bool {
        matches!(self.record, Record::Beginning(window) if age >= window)
    }

    /// What it touched, once: when its time is over or its machine has ended, while its pager
    /// still serves.
    pub fn tell(&self, pager: Option<&Pager<Serving>>, ram: &GuestRam) -> Option<Lesson> {
        if self.is_told.swap(true, Ordering::Relaxed) {
            return None;
        }
        let mut trace = pager.and_then(Pager::<Serving>::trace).unwrap_or(Trace {
            is_complete: true,
            ..Trace::default()
        });
        let files = self.template.ram_files();
        let most = self.record.max_touches();
        match look(ram, files, &self.brought.unasked, most) {
            Ok(Sights { seen, is_complete }) => {
                trace.seen = seen;
                trace.is_complete &= is_complete;
            }
            // Without it the touches still say something of pages that were not brought.
            Err(error) if self.brought.unasked.is_empty() => {
                tracing::debug!(%error, "cannot see what was written");
            }
            Err(error) => {
                tracing::debug!(%error, "cannot see what was written: nothing is learned");
                return None;
            }
        }
        mark_written(&mut trace);
        Some(Lesson {
            judged: self.brought.judge(&trace),
            pieces: pieces(&trace),
        })
    }
}

/// Stops the machine when it has become quiet or its time is over; returns when it ends, which
/// closes the other end of `ended`.
pub fn watch(
    recording: Recording,
    pager: &Pager<Serving>,
    handle: &MachineHandle,
    ended: &UnixStream,
) {
    let began = Instant::now();
    let (mut faults, mut since) = (pager.counts().faults, began);
    loop {
        let mut fds = [PollFd::new(ended, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&LOOK_PERIOD));
        if !fds[0].revents().is_empty() {
            return;
        }
        let now = pager.counts().faults;
        if now != faults {
            (faults, since) = (now, Instant::now());
        }
        let Recording { idle, limit } = recording;
        if since.elapsed() >= idle || began.elapsed() >= limit {
            handle.stop("its run was recorded");
            return;
        }
    }
}

/// Marks the touches of pages that were read first and written later, which no fault tells.
fn mark_written(trace: &mut Trace) {
    let is_written = |seen: &&Seen| seen.sight == Sight::Written;
    // In ascending order and apart, as `look` finds them.
    let written: Vec<Seen> = trace.seen.iter().filter(is_written).copied().collect();
    for touch in &mut trace.touches {
        let key = (touch.image, touch.page);
        let next = written.partition_point(|seen| (seen.image, seen.pages.start()) <= key);
        let run = next.checked_sub(1).and_then(|at| written.get(at));
        touch.write |=
            run.is_some_and(|seen| seen.image == touch.image && seen.pages.contains(touch.page));
    }
}

/// A trace as it is sent.
fn pieces(trace: &Trace) -> Vec<TracePiece> {
    let piece = |touches: &[Touch], seen: &[Seen]| TracePiece {
        touches: touches
            .iter()
            .map(|touch| {
                let at_us = u64::try_from(touch.at.as_micros()).unwrap_or(u64::MAX);
                (touch.image, touch.page.get(), touch.write, at_us)
            })
            .collect(),
        seen: seen
            .iter()
            .map(|seen| {
                let (start, count) = (seen.pages.start().get(), seen.pages.count().get());
                (seen.image, start, count, seen.sight.into())
            })
            .collect(),
        is_complete: trace.is_complete,
        is_last: false,
    };
    let touches = trace.touches.chunks(MAX_PIECE_TOUCHES);
    let seen = trace.seen.chunks(MAX_PIECE_TOUCHES);
    let mut pieces: Vec<TracePiece> = touches
        .map(|touches| piece(touches, &[]))
        .chain(seen.map(|seen| piece(&[], seen)))
        .collect();
    if pieces.is_empty() {
        pieces.push(piece(&[], &[]));
    }
    if let Some(last) = pieces.last_mut() {
        last.is_last = true;
    }
    pieces
}

/// A trace as it arrives.
#[derive(Debug, Default)]
pub struct Arriving {
    trace: Trace,
    is_whole: bool,
}

impl Arriving {
    /// Takes the next piece. What comes behind the end, or beyond the most touches that a trace is
    /// read to, is dropped: a worker is not trusted to stop.
    pub fn add(&mut self, piece: TracePiece) {
        if self.is_whole {
            return;
        }
        let room = MAX_TOUCHES - self.trace.touches.len().min(MAX_TOUCHES);
        let fits = piece.touches.len() <= room;
        let touches = piece.touches.into_iter().take(room);
        self.trace
            .touches
            .extend(touches.map(|(image, page, write, at_us)| Touch {
                image,
                page: PageIndex::new(page),
                write,
                at: Duration::from_micros(at_us),
            }));
        let room = MAX_SEEN - self.trace.seen.len().min(MAX_SEEN);
        let fits = fits && piece.seen.len() <= room;
        let seen = piece.seen.into_iter().take(room);
        self.trace
            .seen
            .extend(seen.map(|(image, start, count, sight)| Seen {
                image,
                pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
                sight: sight.into(),
            }));
        self.trace.is_complete = piece.is_complete && fits;
        self.is_whole = piece.is_last || !fits;
    }

    /// Whether nothing more is to come.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The trace of clone number `client`, if all of it has come.
    pub fn finish(self, client: u64) -> Option<Trace> {
        self.is_whole.then_some(Trace {
            client,
            ..self.trace
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::control::{Channel, FromWorker};

    fn trace(touches: u64) -> Trace {
        Trace {
            client: 3,
            touches: (0..touches)
                .map(|page| Touch {
                    image: u32::MAX,
                    page: PageIndex::new(u64::MAX - page),
                    write: page % 2 == 0,
                    at: Duration::from_micros(u64::MAX - page),
                })
                .collect(),
            seen: (0..touches / 3)
                .map(|page| Seen {
                    image: u32::MAX,
                    pages: PageRange::new(PageIndex::new(page << 40), PageCount::new(1 << 40)),
                    sight: [Sight::Written, Sight::Unwritten, Sight::Unknown]
                        [usize::try_from(page % 3).unwrap()],
                })
                .collect(),
            is_complete: true,
        }
    }

    #[test]
    fn a_trace_of_any_length_arrives_in_pieces_that_fit_a_message() {
        for touches in [0, 1, 4096, 4097, 20_000] {
            let (ours, theirs) = Channel::pair().unwrap();
            let theirs = Channel::new(theirs);
            let mut arriving = Arriving::default();
            for piece in pieces(&trace(touches)) {
                assert!(!arriving.is_whole);
                ours.send(&FromWorker::Touched(piece), &[]).unwrap();
                match theirs.receive::<FromWorker>().unwrap().unwrap().0 {
                    FromWorker::Touched(piece) => arriving.add(piece),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(arriving.finish(3), Some(trace(touches)));
        }
    }

    #[test]
    fn half_a_trace_is_none_and_one_without_end_is_cut() {
        let mut arriving = Arriving::default();
        arriving.add(pieces(&trace(5000)).remove(0));
        assert_eq!(arriving.finish(3), None);

        let mut arriving = Arriving::default();
        let piece = pieces(&trace(5000)).remove(0);
        for _ in 0..MAX_TOUCHES / MAX_PIECE_TOUCHES + 2 {
            arriving.add(piece.clone());
        }
        let trace = arriving.finish(3).unwrap();
        assert_eq!(
            (trace.touches.len(), trace.is_complete),
            (MAX_TOUCHES, false)
        );
    }

    #[test]
    fn pages_that_were_read_first_and_written_later_are_marked() {
        let mut trace = trace(0);
        let touch = |image, page| Touch {
            image,
            page: PageIndex::new(page),
            write: false,
            at: Duration::ZERO,
        };
        trace.touches = [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0)]
            .map(|(image, page)| touch(image, page))
            .to_vec();
        let seen = |start, count, sight| Seen {
            image: 0,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
            sight,
        };
        trace.seen = vec![
            seen(1, 1, Sight::Written),
            seen(3, 1, Sight::Written),
            seen(0, 9, Sight::Unwritten),
        ];
        mark_written(&mut trace);
        let written: Vec<bool> = trace.touches.iter().map(|touch| touch.write).collect();
        assert_eq!(written, [false, true, true, false, false]);
    }
}
