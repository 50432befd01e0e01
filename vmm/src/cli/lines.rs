#![forbid(unsafe_code)]
//! Lines for a reader that may stall: they wait in a bounded queue, and what does not fit is dropped
//! and counted, so that whoever prints them goes on with its other work.

use std::io::Write;
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};

/// Most lines that wait for the reader.
const QUEUED_LINES: usize = 4096;
/// How long the reader may take for what is queued at the end.
const DRAIN: Duration = Duration::from_secs(2);
/// Bytes that are written at once while there are more lines.
const BATCH_BYTES: usize = 64 << 10;

/// Prints lines on a thread of its own.
#[derive(Debug)]
pub struct LineWriter {
    lines: Sender<String>,
    /// The thread's end of the queue, to see what is left in it.
    queue: Receiver<String>,
    /// Closed when the thread ends.
    ended: Receiver<()>,
    dropped: u64,
}

/// What came of the lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Printed {
    /// Lines that nobody took in time.
    pub dropped: u64,
    /// Whether the reader still takes nothing: another write to it would wait.
    pub stalled: bool,
}

impl LineWriter {
    /// Starts the thread; it writes to `out`, which may block.
    ///
    /// Fails when no thread can be made.
    pub fn new(out: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (lines, queue) = bounded(QUEUED_LINES);
        let (alive, ended) = bounded(0);
        let inbox = queue.clone();
        thread::Builder::new()
            .name("lines".to_owned())
            .spawn(move || {
                // Nobody reads any more when this fails: the clones go on without.
                let _ = write_all(out, &inbox);
                drop(alive);
            })?;
        Ok(Self {
            lines,
            queue,
            ended,
            dropped: 0,
        })
    }

    /// Prints a line, sooner or later or never. Does not wait.
    pub fn print(&mut self, line: String) {
        if self.ended.try_recv() == Err(crossbeam::channel::TryRecvError::Disconnected) {
            return;
        }
        if let Err(TrySendError::Full(_)) = self.lines.try_send(line) {
            self.dropped += 1;
        }
    }

    /// Waits for the reader a moment and says what became of all lines.
    pub fn finish(self) -> Printed {
        drop(self.lines);
        let stalled = self.ended.recv_timeout(DRAIN) == Err(RecvTimeoutError::Timeout);
        let left = if stalled { self.queue.len() as u64 } else { 0 };
        Printed {
            dropped: self.dropped + left,
            stalled,
        }
    }
}

fn write_all(mut out: impl Write, inbox: &Receiver<String>) -> std::io::Result<()> {
    let mut batch = String::new();
    while let Ok(line) = inbox.recv() {
        batch.clear();
        batch.push_str(&line);
        batch.push('\n');
        while batch.len() < BATCH_BYTES
            && let Ok(line) = inbox.try_recv()
        {
            batch.push_str(&line);
            batch.push('\n');
        }
        out.write_all(batch.as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, pipe};

    #[test]
    fn a_reader_gets_every_line_in_order() {
        let (reader, writer) = pipe().unwrap();
        let reader = thread::spawn(move || BufReader::new(reader).lines().count());
        let mut lines = LineWriter::new(writer).unwrap();
        for number in 0..QUEUED_LINES {
            lines.print(format!("line {number}"));
        }
        let printed = lines.finish();
        assert_eq!((printed.dropped, printed.stalled), (0, false));
        assert_eq!(reader.join().unwrap(), QUEUED_LINES);
    }

    #[test]
    fn a_stalled_reader_holds_nobody_up_and_what_it_missed_is_counted() {
        let (reader, writer) = pipe().unwrap();
        let mut lines = LineWriter::new(writer).unwrap();
        let total = 3 * QUEUED_LINES as u64;
        for number in 0..total {
            lines.print(format!("{number:100}"));
        }
        let printed = lines.finish();
        assert!(printed.stalled);
        assert!(
            (QUEUED_LINES as u64..total).contains(&printed.dropped),
            "{printed:?}"
        );
        drop(reader);
    }

    #[test]
    fn a_reader_that_goes_away_is_no_loss() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut lines = LineWriter::new(writer).unwrap();
        lines.print("x".to_owned());
        assert_eq!(lines.ended.recv(), Err(crossbeam::channel::RecvError));
        for _ in 0..2 * QUEUED_LINES {
            lines.print("x".to_owned());
        }
        assert_eq!(
            lines.finish(),
            Printed {
                dropped: 0,
                stalled: false
            }
        );
    }
}
