#![forbid(unsafe_code)]
//! COM1, and perhaps monitors, on one end: bytes between whoever is there and the machine of the moment.
//! The end outlives the machine, which a reset replaces.
//!
//! What a guest prints while nobody reads stays in the machine's console, which bounds it.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, read, write};

use super::client::Client;
use super::mux::{Escape, HELP, Line, TERMINATED, Typed};
use super::{Listener, SocketPath};

/// Most bytes on their way in one direction, and some more that one read brings.
const PUMP_BYTES: usize = 4096;
/// Most users that wait to be connected: monitors, and one machine at a time.
const PORTS: usize = 32;
/// How long whoever reads has for what waits at the end.
const FLUSH: Duration = Duration::from_millis(500);

/// What there is beside the machine.
#[derive(Default)]
pub struct Extras {
    /// Whether Ctrl-A is an escape.
    pub has_escapes: bool,
    /// Whether a monitor, not COM1, has the terminal first.
    pub monitor_first: bool,
    /// Gets a copy of everything that is shown.
    pub log: Option<File>,
    /// A person wants the end.
    pub on_quit: Option<Box<dyn Fn() + Send>>,
}

impl fmt::Debug for Extras {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extras")
            .field("has_escapes", &self.has_escapes)
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

enum Arrival {
    Machine(UnixStream),
    /// A monitor; whether it is for people, who want to see what they type.
    Monitor(UnixStream, bool),
    /// The end of everything.
    Finish(Sender<()>),
}

/// The way to a relay's thread.
#[derive(Debug)]
pub struct Relay {
    ports: Sender<Arrival>,
    wake: OwnedFd,
    /// The thread ends with the process, which drops nothing.
    _path: Option<SocketPath>,
}

impl Relay {
    /// Starts the thread.
    pub fn start(
        mut listener: Option<Listener>,
        client: Option<Client>,
        extras: Extras,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (ports, arriving) = bounded(PORTS);
        let path = listener.as_mut().and_then(Listener::take_path);
        let state = State {
            listener,
            client,
            machine: None,
            monitors: Vec::new(),
            focus: usize::from(extras.monitor_first),
            escape: extras.has_escapes.then(Escape::default),
            log: extras.log,
            on_quit: extras.on_quit,
            arriving,
            wake: wake.try_clone()?,
            to_machine: Vec::new(),
            to_client: Vec::new(),
        };
        // It ends with the process: the end is there as long as the machine may be.
        thread::Builder::new()
            .name("serial".to_owned())
            .spawn(move || state.run())?;
        Ok(Self {
            ports,
            wake,
            _path: path,
        })
    }

    /// A new machine's end of COM1; the one before it is let go of.
    pub fn port(&self) -> io::Result<OwnedFd> {
        self.pair(Arrival::Machine)
    }

    /// A monitor's end; `for_people` or for programs.
    pub fn monitor(&self, for_people: bool) -> io::Result<OwnedFd> {
        self.pair(|stream| Arrival::Monitor(stream, for_people))
    }

    fn pair(&self, arrival: impl FnOnce(UnixStream) -> Arrival) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.send(arrival(ours))?;
        Ok(theirs.into())
    }

    fn send(&self, arrival: Arrival) -> io::Result<()> {
        self.ports
            .send(arrival)
            .map_err(|_| io::Error::other("the thread of the serial port is gone"))?;
        write(&self.wake, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    /// Lets what the last machine has printed go out, for a moment, and gives a terminal back.
    pub fn finish(&self) {
        let (done, finished) = bounded(1);
        if self.send(Arrival::Finish(done)).is_ok() {
            let _ = finished.recv_timeout(FLUSH * 2);
        }
    }
}

/// A monitor behind Ctrl-A c.
struct MonitorEnd {
    stream: UnixStream,
    line: Option<Line>,
    to_monitor: Vec<u8>,
    was_shown: bool,
}

struct State {
    listener: Option<Listener>,
    client: Option<Client>,
    machine: Option<UnixStream>,
    monitors: Vec<MonitorEnd>,
    /// Who gets what is typed: 0 is the machine, `n` the monitor before position `n`.
    focus: usize,
    escape: Option<Escape>,
    log: Option<File>,
    on_quit: Option<Box<dyn Fn() + Send>>,
    arriving: Receiver<Arrival>,
    wake: OwnedFd,
    to_machine: Vec<u8>,
    to_client: Vec<u8>,
}

/// What is ready.
#[derive(Debug, Default, Clone, Copy)]
struct Ready {
    woken: bool,
    listener: bool,
    input: Option<PollFlags>,
    machine: bool,
    monitor: bool,
}

impl State {
    fn run(mut self) {
        loop {
            let ready = self.wait();
            if ready.woken
                && let Some(done) = self.arrive()
            {
                self.flush();
                // A terminal is given back.
                self.client = None;
                let _ = done.send(());
                return;
            }
            if ready.listener
                && let Some(fd) = self.listener.as_ref().and_then(Listener::accept)
            {
                self.client = Client::socket(fd).ok();
                self.to_client.clear();
            }
            if let Some(flags) = ready.input {
                self.read_client(flags);
            }
            if ready.machine {
                self.read_machine();
            }
            if ready.monitor {
                self.read_monitor();
            }
            self.push_on();
        }
    }

    /// Takes who is new; who asks for the end.
    fn arrive(&mut self) -> Option<Sender<()>> {
        let mut count = [0; 8];
        let _ = read(&self.wake, &mut count);
        while let Ok(arrival) = self.arriving.try_recv() {
            match arrival {
                Arrival::Machine(machine) => {
                    // What the one before has printed last.
                    while self.machine.is_some() && self.read_machine() {}
                    self.machine = Some(machine);
                    self.to_machine.clear();
                }
                Arrival::Monitor(stream, for_people) => self.monitors.push(MonitorEnd {
                    stream,
                    line: for_people.then(Line::default),
                    to_monitor: Vec::new(),
                    was_shown: false,
                }),
                Arrival::Finish(done) => return Some(done),
            }
        }
        None
    }

    fn focused(&mut self) -> Option<&mut MonitorEnd> {
        let at = self.focus.checked_sub(1)?;
        self.monitors.get_mut(at)
    }

    /// Shows bytes to whoever is there.
    fn show(&mut self, bytes: &[u8]) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.write_all(bytes)
        {
            tracing::warn!("the log of a character device ends: {error}");
            self.log = None;
        }
        if self.client.is_some() {
            self.to_client.extend(bytes);
        }
    }

    fn read_client(&mut self, flags: PollFlags) {
        let Some(client) = &mut self.client else {
            return;
        };
        if flags.contains(PollFlags::HUP) && client.is_socket() && !self.to_machine.is_empty() {
            // It is gone, whatever of it still waits.
            self.client = None;
            return;
        }
        match client.read(PUMP_BYTES) {
            Ok(bytes) => bytes.into_iter().for_each(|byte| self.typed(byte)),
            Err(_) if client.outlives_input() => (),
            Err(_) => {
                self.client = None;
                if self.listener.is_none() {
                    tracing::info!("the serial port's connection has ended");
                }
            }
        }
    }

    fn typed(&mut self, byte: u8) {
        let typed = match &mut self.escape {
            Some(escape) => escape.take(byte),
            None => Typed::Byte(byte),
        };
        match typed {
            Typed::Byte(byte) => self.pass_on(byte),
            Typed::Help => self.show(HELP),
            Typed::Quit => {
                self.show(TERMINATED);
                if let Some(quit) = &self.on_quit {
                    quit();
                }
            }
            Typed::Next => self.next(),
            Typed::Nothing => (),
        }
    }

    fn pass_on(&mut self, byte: u8) {
        let Some(monitor) = self.focused() else {
            self.to_machine.push(byte);
            return;
        };
        let Some(line) = &mut monitor.line else {
            monitor.to_monitor.push(byte);
            return;
        };
        let mut shown = Vec::new();
        if let Some(whole) = line.take(byte, &mut shown) {
            monitor.to_monitor.extend(whole);
        }
        self.show(&shown);
    }

    /// The next one gets the terminal.
    fn next(&mut self) {
        if self.focus > 0 {
            self.show(b"\r\n");
        }
        self.focus = (self.focus + 1) % (self.monitors.len() + 1);
        if let Some(monitor) = self.focused()
            && let Some(line) = &monitor.line
            && monitor.was_shown
        {
            let prompt = [b"(qemu) ", line.text()].concat();
            self.show(&prompt);
        }
    }

    /// Whether there was anything.
    fn read_machine(&mut self) -> bool {
        let Some(machine) = &self.machine else {
            return false;
        };
        match receive(machine) {
            Ok(bytes) => {
                self.show(&bytes);
                !bytes.is_empty()
            }
            Err(_) => {
                self.machine = None;
                false
            }
        }
    }

    fn read_monitor(&mut self) {
        let Some(monitor) = self.focused() else {
            return;
        };
        match receive(&monitor.stream) {
            Ok(bytes) => {
                monitor.was_shown |= !bytes.is_empty();
                self.show(&bytes);
            }
            Err(_) => {
                // It has ended.
                self.monitors.remove(self.focus - 1);
                self.focus = 0;
            }
        }
    }

    /// Passes on at once what was just read; where that does not go, poll says when it does.
    fn push_on(&mut self) {
        if let Some(client) = &self.client
            && push(client.output(), &mut self.to_client).is_err()
        {
            self.client = None;
        }
        if let Some(machine) = &self.machine
            && push(machine, &mut self.to_machine).is_err()
        {
            self.machine = None;
        }
        for monitor in &mut self.monitors {
            // One that has ended is seen when it is read.
            let _ = push(&monitor.stream, &mut monitor.to_monitor);
        }
    }

    /// What the machine has printed last goes out, as far as it is taken.
    fn flush(&mut self) {
        let end = std::time::Instant::now() + FLUSH;
        loop {
            let more = self.read_machine();
            self.push_on();
            let Some(client) = &self.client else {
                return;
            };
            if self.to_client.is_empty() {
                if more {
                    continue;
                }
                return;
            }
            let left = end.saturating_duration_since(std::time::Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::from_borrowed_fd(client.output(), PollFlags::OUT)];
            if !matches!(poll(&mut fds, Some(&left)), Ok(1..)) {
                return;
            }
        }
    }

    /// Waits until something is ready.
    fn wait(&self) -> Ready {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let mut place = [None; 4];
        if self.client.is_none()
            && let Some(listener) = &self.listener
        {
            place[0] = Some(fds.len());
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let monitor = self
            .focus
            .checked_sub(1)
            .and_then(|at| self.monitors.get(at));
        if let Some(client) = &self.client {
            let waiting = monitor.map_or(&self.to_machine, |monitor| &monitor.to_monitor);
            let has_room = waiting.len() < PUMP_BYTES;
            // Not only for its end: of a pipe that would be told again and again.
            if let Some(input) = client.input().filter(|_| has_room || client.is_socket()) {
                place[1] = Some(fds.len());
                fds.push(PollFd::from_borrowed_fd(input, interest(has_room, false)));
            }
            if !self.to_client.is_empty() {
                fds.push(PollFd::from_borrowed_fd(client.output(), PollFlags::OUT));
            }
        }
        let is_read = self.client.is_some() && self.to_client.len() < PUMP_BYTES;
        let is_logged = self.client.is_none() && self.log.is_some();
        let wanted = interest(is_read || is_logged, !self.to_machine.is_empty());
        if let Some(machine) = self.machine.as_ref().filter(|_| !wanted.is_empty()) {
            place[2] = Some(fds.len());
            fds.push(PollFd::new(machine, wanted));
        }
        for (at, monitor) in self.monitors.iter().enumerate() {
            let is_focused = at + 1 == self.focus;
            let wanted = interest(is_focused && is_read, !monitor.to_monitor.is_empty());
            if wanted.is_empty() {
                continue;
            }
            if is_focused {
                place[3] = Some(fds.len());
            }
            fds.push(PollFd::new(&monitor.stream, wanted));
        }
        if poll(&mut fds, None).is_err() {
            return Ready::default();
        }
        let events = |place: Option<usize>| {
            let flags = place.map(|at: usize| fds[at].revents());
            flags.filter(|flags| !flags.is_empty())
        };
        Ready {
            woken: events(Some(0)).is_some(),
            listener: events(place[0]).is_some(),
            input: events(place[1]),
            machine: events(place[2]).is_some(),
            monitor: events(place[3]).is_some(),
        }
    }
}

fn interest(room: bool, waiting: bool) -> PollFlags {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, room);
    flags.set(PollFlags::OUT, waiting);
    flags
}

/// What is there now, perhaps nothing; an error when the other end is gone.
fn receive(from: impl AsFd) -> Result<Vec<u8>, Errno> {
    let mut buffer = [0; PUMP_BYTES];
    match read(from, &mut buffer) {
        Ok(0) => Err(Errno::PIPE),
        Ok(count) => Ok(buffer[..count].to_vec()),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Vec::new()),
        Err(errno) => Err(errno),
    }
}

/// Writes what goes at once; an error when the other end is gone.
fn push(to: impl AsFd, bytes: &mut Vec<u8>) -> Result<(), Errno> {
    if bytes.is_empty() {
        return Ok(());
    }
    match write(to, bytes) {
        Ok(count) => {
            bytes.drain(..count);
            Ok(())
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}
