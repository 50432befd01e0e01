#![forbid(unsafe_code)]
//! A clone that records what it touches: when its run is over, what it wrote, and how its trace
//! gets to the supervisor, in pieces that fit a message.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pando_pager::working_set::{MAX_TOUCHES, Touch, Trace};
use pando_pager::{PageIndex, Pager, Serving};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};

use crate::machine::MachineHandle;
use crate::memory::guest::GuestRam;
use crate::template::Template;

/// How often is looked whether the guest has become quiet.
const LOOK_PERIOD: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// Size of a page in bytes.
const PAGE: usize = 4096;
/// Most touches of one piece: 26 bytes each at most, as postcard writes them.
const MAX_PIECE_TOUCHES: usize = 4096;

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
    /// Whether all touches were recorded.
    is_complete: bool,
    /// Whether this is the end.
    is_last: bool,
}

/// A clone whose run is recorded.
#[derive(Debug)]
pub struct Recorded<'a> {
    /// When its run ends.
    pub recording: Recording,
    /// What it is a clone of.
    pub template: &'a Template,
}

impl Recorded<'_> {
    /// Stops the machine when it has become quiet or its time is over; returns when it ends, which
    /// closes the other end of `ended`.
    pub fn watch(&self, pager: &Pager<Serving>, handle: &MachineHandle, ended: &UnixStream) {
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
            let Recording { idle, limit } = self.recording;
            if since.elapsed() >= idle || began.elapsed() >= limit {
                handle.stop("its run was recorded");
                return;
            }
        }
    }

    /// What it touched, to be sent, when its machine has ended while its pager still serves.
    pub fn pieces(&self, pager: &Pager<Serving>, ram: &GuestRam) -> Vec<TracePiece> {
        let Some(mut trace) = pager.trace() else {
            return Vec::new();
        };
        mark_written(&mut trace, ram, self.template.ram_files());
        pieces(&trace)
    }
}

/// Marks the pages that were read first and written later, which no fault tells: they differ from
/// the template by now. For a machine that runs no more and whose pages are all there.
fn mark_written(trace: &mut Trace, ram: &GuestRam, template: &[File]) {
    let (mut own, mut original) = ([0; PAGE], [0; PAGE]);
    for touch in trace.touches.iter_mut().filter(|touch| !touch.write) {
        let backend = usize::try_from(touch.image).unwrap_or(usize::MAX);
        let offset = touch.page.offset().get();
        let (Some(file), Some(address)) = (
            template.get(backend),
            ram.layout().guest_address(backend, offset),
        ) else {
            continue;
        };
        // What cannot be compared counts as read: it is a hint.
        touch.write = file.read_exact_at(&mut original, offset).is_ok()
            && ram.read(address, &mut own).is_ok()
            && own != original;
    }
}

/// A trace as it is sent.
fn pieces(trace: &Trace) -> Vec<TracePiece> {
    let piece = |touches: &[Touch]| TracePiece {
        touches: touches
            .iter()
            .map(|touch| {
                let at_us = u64::try_from(touch.at.as_micros()).unwrap_or(u64::MAX);
                (touch.image, touch.page.get(), touch.write, at_us)
            })
            .collect(),
        is_complete: trace.is_complete,
        is_last: false,
    };
    let mut pieces: Vec<TracePiece> = trace.touches.chunks(MAX_PIECE_TOUCHES).map(piece).collect();
    if pieces.is_empty() {
        pieces.push(piece(&[]));
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
        self.trace.is_complete = piece.is_complete && fits;
        self.is_whole = piece.is_last || !fits;
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
    use crate::memory::guest::RamBacking;
    use crate::memory::layout::RamLayout;

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
    fn what_differs_from_the_template_was_written() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 3 * 4096], 0).unwrap();
        let layout = RamLayout::new(&[4 * 4096]).unwrap();
        let ram = GuestRam::new(layout, vec![RamBacking::private(&file, 4 * 4096).unwrap()]);
        file.set_len(4 * 4096).unwrap();
        let ram = ram.unwrap();
        ram.write(4096 + 9, b"x").unwrap();
        ram.write(3 * 4096, b"y").unwrap();
        let touch = |image, page| Touch {
            image,
            page: PageIndex::new(page),
            write: false,
            at: Duration::ZERO,
        };
        let mut trace = Trace {
            touches: vec![
                touch(0, 0),
                touch(0, 1),
                touch(0, 3),
                touch(0, 4),
                touch(1, 0),
            ],
            ..Trace::default()
        };
        mark_written(&mut trace, &ram, &[file]);
        let written: Vec<bool> = trace.touches.iter().map(|touch| touch.write).collect();
        assert_eq!(written, [false, true, true, false, false]);
    }
}
