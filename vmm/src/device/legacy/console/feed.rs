#![forbid(unsafe_code)]
//! The console's thread: input to the UART, queued output to the other end, clients coming and
//! going.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::endpoint::Source;
use super::error::ConsoleError;
use super::escape::Escape;
use super::output::ConsoleOutput;
use super::terminal::{Kind, RawTerminal, kind};
use crate::device::legacy::serial::Serial;
use crate::device::socket::Socket;

/// Most that is read at once; no more is read before the guest has taken it.
const READ_BYTES: usize = 256;
/// How soon to offer input again to a UART that took none without being full (it is in loopback
/// mode): no event tells when it leaves that.
const RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// What a second client of a socket is told.
const REFUSAL: &[u8] = b"another client is connected to this serial console\r\n";

/// Everything the thread has.
pub(super) struct Feed {
    output: ConsoleOutput,
    serial: Arc<Mutex<Serial>>,
    on_quit: Box<dyn Fn() + Send>,
    socket: Option<Socket>,
    input: Input,
    /// Read and not yet taken by the UART.
    waiting: Vec<u8>,
    escape: Option<Escape>,
    /// Given back when the thread ends.
    _raw: Option<RawTerminal>,
}

/// The other end, as far as input goes.
#[derive(Debug)]
enum Input {
    /// There is none now.
    Absent,
    /// It may have more.
    Open(Arc<OwnedFd>),
    /// A client that will send no more but still reads.
    HalfClosed(Arc<OwnedFd>),
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed")
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}

/// What is ready.
#[derive(Debug, Default, Clone, Copy)]
struct Ready {
    wake: bool,
    input: bool,
    client: bool,
}

impl Feed {
    pub(super) fn new(
        source: Source,
        output: ConsoleOutput,
        serial: Arc<Mutex<Serial>>,
        on_quit: Box<dyn Fn() + Send>,
    ) -> Result<Self, ConsoleError> {
        let mut feed = Self {
            output,
            serial,
            on_quit,
            socket: None,
            input: Input::Absent,
            waiting: Vec::new(),
            escape: None,
            _raw: None,
        };
        match source {
            Source::Nothing | Source::None => {}
            Source::Descriptor(fd) => feed.input = Input::Open(fd),
            Source::Clients(socket) => feed.socket = Some(socket),
            Source::Stdin(fd) => match kind(&fd) {
                Kind::Other => feed.input = Input::Open(fd),
                Kind::Foreground => {
                    feed._raw = Some(RawTerminal::new(&fd).map_err(ConsoleError::Stdio)?);
                    feed.escape = Some(Escape::default());
                    feed.input = Input::Open(fd);
                }
                // Reading would stop the process.
                Kind::Background => tracing::info!("in the background: serial input is off"),
            },
        }
        Ok(feed)
    }

    /// Gives the UART what one read finds, without waiting.
    pub(super) fn begin(&mut self) {
        let Input::Open(fd) = &self.input else {
            return;
        };
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        if matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..)) {
            self.read();
            self.offer();
        }
    }

    /// Runs until [`ConsoleOutput::stop`].
    pub(super) fn run(mut self) {
        loop {
            self.offer();
            let drain = self.output.flush_queue();
            let ready = match self.wait(drain.as_deref()) {
                Ok(ready) => ready,
                Err(Errno::INTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "the serial console is not fed any more");
                    return;
                }
            };
            if ready.wake && self.output.acknowledge() {
                return;
            }
            if ready.input {
                self.read();
            }
            if ready.client {
                self.accept();
            }
        }
    }

    /// Gives the UART what waits for it.
    fn offer(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        // Before the UART is looked at: it is emptied under its lock, so no wake-up gets lost.
        self.output.set_hungry(true);
        let taken = self
            .serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .enqueue(&self.waiting);
        self.waiting.drain(..taken);
        if self.waiting.is_empty() {
            self.output.set_hungry(false);
        }
    }

    /// Waits for something to do. Input is not looked at while earlier input waits.
    fn wait(&self, drain: Option<&OwnedFd>) -> Result<Ready, Errno> {
        let mut fds = vec![PollFd::new(self.output.wake_fd(), PollFlags::IN)];
        let mut input_at = None;
        let input = match &self.input {
            Input::Open(fd) => Some((fd, PollFlags::IN)),
            // Only its going away, which is always reported.
            Input::HalfClosed(fd) => Some((fd, PollFlags::empty())),
            Input::Absent => None,
        };
        if let Some((fd, events)) = input.filter(|_| self.waiting.is_empty()) {
            input_at = Some(fds.len());
            fds.push(PollFd::from_borrowed_fd(fd.as_fd(), events));
        }
        let mut socket_at = None;
        if let Some(socket) = &self.socket {
            socket_at = Some(fds.len());
            fds.push(PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN));
        }
        if let Some(fd) = drain {
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        let timeout = (!self.waiting.is_empty()).then_some(&RETRY);
        poll(&mut fds, timeout)?;
        let is_ready = |at: Option<usize>| at.is_some_and(|at| !fds[at].revents().is_empty());
        Ok(Ready {
            wake: is_ready(Some(0)),
            input: is_ready(input_at),
            client: is_ready(socket_at),
        })
    }

    fn read(&mut self) {
        let Input::Open(fd) = &self.input else {
            self.end_of_input(true);
            return;
        };
        let mut buffer = [0; READ_BYTES];
        match rustix::io::read(&**fd, &mut buffer) {
            Ok(0) => self.end_of_input(false),
            Ok(bytes) => self.take(&buffer[..bytes]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // EIO of a terminal that hung up, ECONNRESET of a client.
            Err(_) => self.end_of_input(true),
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        match &mut self.escape {
            None => self.waiting.extend_from_slice(bytes),
            Some(escape) => {
                let typed = escape.filter(bytes);
                self.waiting.extend(typed.bytes);
                if typed.quit {
                    (self.on_quit)();
                }
            }
        }
    }

    /// The other end sends no more; `gone` when it does not read either.
    fn end_of_input(&mut self, gone: bool) {
        let input = std::mem::replace(&mut self.input, Input::Absent);
        if self.socket.is_none() {
            return;
        }
        match input {
            Input::Open(fd) if !gone => self.input = Input::HalfClosed(fd),
            _ => self.output.disconnect(),
        }
    }

    /// Takes a client, or turns it away while there is one.
    fn accept(&mut self) {
        let Some(Ok(client)) = self.socket.as_ref().map(Socket::accept) else {
            return;
        };
        if let Input::Open(current) | Input::HalfClosed(current) = &self.input {
            if !has_hung_up(current) {
                let _ = rustix::io::write(&client, REFUSAL);
                return;
            }
            self.end_of_input(true);
        }
        let client = Arc::new(OwnedFd::from(client));
        self.input = Input::Open(Arc::clone(&client));
        self.output.connect(client);
    }
}

/// Whether a client has closed its end: it may not have been looked at for a while.
fn has_hung_up(client: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::empty())];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
}
