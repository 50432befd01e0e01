#![forbid(unsafe_code)]
//! The host's end of a guest's COM1: wait for a text, read lines, send commands.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

/// How much of the console's past is kept for messages, in bytes.
const KEPT_BYTES: usize = 16 << 10;

/// How long a line may be before it is taken without its end, in bytes.
const MAX_LINE_BYTES: usize = 16 << 10;

/// Why a console gave nothing.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The text did not come in time.
    #[error(
        "the guest did not print {wanted} within {seconds:.1} s; its console ended with:\n{tail}"
    )]
    Timeout {
        /// What was waited for.
        wanted: String,
        /// How long.
        seconds: f64,
        /// The last lines of the console.
        tail: String,
    },
    /// The guest ended.
    #[error("the guest ended before it printed {wanted}; its console ended with:\n{tail}")]
    Closed {
        /// What was waited for.
        wanted: String,
        /// The last lines of the console.
        tail: String,
    },
    /// Somebody asked to stop waiting.
    #[error("interrupted while waiting for {wanted}")]
    Interrupted {
        /// What was waited for.
        wanted: String,
    },
    /// The socket failed.
    #[error("cannot use the guest's console")]
    Io(#[source] io::Error),
}

/// One end of a socket whose other end is a guest's COM1.
#[derive(Debug)]
pub struct GuestConsole {
    stream: UnixStream,
    /// Received and not yet asked for.
    pending: Vec<u8>,
    /// The last that was received, for messages.
    kept: Vec<u8>,
    /// Set by a signal handler; waiting ends then.
    cancel: Option<Arc<AtomicBool>>,
}

impl GuestConsole {
    /// A console and the descriptor to give to the machine.
    pub fn pair() -> Result<(Self, OwnedFd), ConsoleError> {
        let (ours, theirs) = UnixStream::pair().map_err(ConsoleError::Io)?;
        Ok((Self::new(ours), theirs.into()))
    }

    /// A console on a socket that is connected already.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            pending: Vec::new(),
            kept: Vec::new(),
            cancel: None,
        }
    }

    /// Waiting ends early when a signal comes whose handler sets `cancel`.
    pub fn cancel_on(&mut self, cancel: Arc<AtomicBool>) {
        self.cancel = Some(cancel);
    }

    /// Sends bytes to the guest.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), ConsoleError> {
        self.stream.write_all(bytes).map_err(ConsoleError::Io)
    }

    /// Reads until the console has shown `text`; what lies behind it stays for later.
    /// `on_line` sees every whole line that passes.
    pub fn wait_for(
        &mut self,
        text: &str,
        timeout: Duration,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<(), ConsoleError> {
        let wanted = format!("'{text}'");
        let start = Instant::now();
        let mut shown = 0;
        loop {
            shown += show_lines(&self.pending[shown..], on_line);
            if let Some(at) = find(&self.pending, text.as_bytes()) {
                self.pending.drain(..at + text.len());
                return Ok(());
            }
            // Keep no more than could still be the beginning of the text.
            let spent = self.pending.len().saturating_sub(text.len()).min(shown);
            self.pending.drain(..spent);
            shown -= spent;
            self.receive(&wanted, start, timeout)?;
        }
    }

    /// Reads for as long as this, whatever the guest prints.
    pub fn drain_for(
        &mut self,
        time: Duration,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<(), ConsoleError> {
        let start = Instant::now();
        loop {
            let shown = show_lines(&self.pending, on_line);
            self.pending.drain(..shown);
            match self.receive("anything", start, time) {
                Ok(()) => (),
                Err(ConsoleError::Timeout { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next whole line, without its end.
    pub fn line(&mut self, timeout: Duration) -> Result<String, ConsoleError> {
        let start = Instant::now();
        loop {
            if let Some(line) = self.take_line() {
                return Ok(line);
            }
            self.receive("a line", start, timeout)?;
        }
    }

    /// A whole line if one was received already. A line that is too long to wait for its end comes
    /// in pieces.
    pub fn take_line(&mut self) -> Option<String> {
        let end = self.pending.iter().position(|&byte| byte == b'\n');
        let end = end.or_else(|| {
            let too_long = self.pending.len() >= MAX_LINE_BYTES;
            too_long.then(|| self.pending.len() - 1)
        })?;
        let line: Vec<u8> = self.pending.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Takes what is there without waiting; `false` at the end of the stream.
    pub fn poll(&mut self) -> Result<bool, ConsoleError> {
        self.stream
            .set_nonblocking(true)
            .map_err(ConsoleError::Io)?;
        let more = self.read_some();
        self.stream
            .set_nonblocking(false)
            .map_err(ConsoleError::Io)?;
        match more {
            Ok(count) => Ok(count > 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(ConsoleError::Io(error)),
        }
    }

    /// The last lines that the guest printed.
    pub fn tail(&self) -> String {
        let text = String::from_utf8_lossy(&self.kept);
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let last = &lines[lines.len().saturating_sub(12)..];
        if last.is_empty() {
            "  (nothing)".to_owned()
        } else {
            format!("  {}", last.join("\n  "))
        }
    }

    fn receive(
        &mut self,
        wanted: &str,
        start: Instant,
        timeout: Duration,
    ) -> Result<(), ConsoleError> {
        let timed_out = |console: &Self| ConsoleError::Timeout {
            wanted: wanted.to_owned(),
            seconds: timeout.as_secs_f64(),
            tail: console.tail(),
        };
        if self
            .cancel
            .as_ref()
            .is_some_and(|cancel| cancel.load(Ordering::Relaxed))
        {
            return Err(ConsoleError::Interrupted {
                wanted: wanted.to_owned(),
            });
        }
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(timed_out(self));
        }
        self.stream
            .set_read_timeout(Some(left))
            .map_err(ConsoleError::Io)?;
        match self.read_some() {
            Ok(0) => Err(ConsoleError::Closed {
                wanted: wanted.to_owned(),
                tail: self.tail(),
            }),
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(timed_out(self)),
                // A read with a timeout is not restarted behind a signal handler (signal(7)).
                ErrorKind::Interrupted => Ok(()),
                ErrorKind::ConnectionReset => Err(ConsoleError::Closed {
                    wanted: wanted.to_owned(),
                    tail: self.tail(),
                }),
                _ => Err(ConsoleError::Io(error)),
            },
        }
    }

    fn read_some(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        let count = self.stream.read(&mut buffer)?;
        self.pending.extend(&buffer[..count]);
        self.kept.extend(&buffer[..count]);
        let surplus = self.kept.len().saturating_sub(KEPT_BYTES);
        self.kept.drain(..surplus);
        Ok(count)
    }
}

impl AsFd for GuestConsole {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Shows the whole lines of `bytes`; how many bytes they were.
fn show_lines(bytes: &[u8], on_line: &mut dyn FnMut(&str)) -> usize {
    let Some(last) = bytes.iter().rposition(|&byte| byte == b'\n') else {
        return 0;
    };
    for line in bytes[..=last].split(|&byte| byte == b'\n') {
        let text = String::from_utf8_lossy(line);
        let text = text.trim();
        if !text.is_empty() {
            on_line(text);
        }
    }
    last + 1
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(20);

    fn pair() -> (GuestConsole, UnixStream) {
        let (console, guest) = GuestConsole::pair().unwrap();
        (console, guest.into())
    }

    #[test]
    fn a_text_is_found_across_pieces_and_the_rest_stays() {
        let (mut console, mut guest) = pair();
        let mut lines = Vec::new();
        guest.write_all(b"booting\r\nrea").unwrap();
        let writer = std::thread::spawn(move || {
            guest.write_all(b"dy now\nnext\n").unwrap();
            guest
        });
        console
            .wait_for("ready", LONG, &mut |line| lines.push(line.to_owned()))
            .unwrap();
        assert_eq!(console.line(LONG).unwrap(), " now");
        assert_eq!(console.line(LONG).unwrap(), "next");
        assert_eq!(lines[0], "booting");
        drop(writer.join().unwrap());
    }

    #[test]
    fn a_timeout_shows_the_end_of_the_console() {
        let (mut console, mut guest) = pair();
        guest.write_all(b"Kernel panic - not syncing\n").unwrap();
        let error = console
            .wait_for("ready", SOON, &mut |_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("did not print 'ready' within 0.1 s"),
            "{error}"
        );
        assert!(error.contains("Kernel panic"), "{error}");
    }

    #[test]
    fn draining_shows_everything_until_the_time_is_over() {
        let (mut console, mut guest) = pair();
        guest.write_all(b"one\0\ntwo\n").unwrap();
        let mut lines = Vec::new();
        console
            .drain_for(SOON, &mut |line| lines.push(line.to_owned()))
            .unwrap();
        assert_eq!(lines, ["one\0", "two"]);
        drop(guest);
        let error = console.drain_for(LONG, &mut |_| ()).unwrap_err();
        assert!(matches!(error, ConsoleError::Closed { .. }), "{error}");
    }

    #[test]
    fn waiting_ends_when_it_is_cancelled() {
        let (mut console, _guest) = pair();
        let cancel = Arc::new(AtomicBool::new(true));
        console.cancel_on(Arc::clone(&cancel));
        let error = console.line(LONG).unwrap_err();
        assert!(matches!(error, ConsoleError::Interrupted { .. }), "{error}");
    }

    #[test]
    fn a_guest_that_ends_is_told_from_one_that_is_slow() {
        let (mut console, guest) = pair();
        drop(guest);
        let error = console.line(LONG).unwrap_err();
        assert!(matches!(error, ConsoleError::Closed { .. }), "{error}");
    }

    #[test]
    fn poll_takes_what_is_there_and_sees_the_end() {
        let (mut console, mut guest) = pair();
        assert!(console.poll().unwrap());
        guest.write_all(b"one\ntw").unwrap();
        assert!(console.poll().unwrap());
        assert_eq!(console.take_line().as_deref(), Some("one"));
        assert_eq!(console.take_line(), None);
        drop(guest);
        assert!(!console.poll().unwrap());
    }
}
