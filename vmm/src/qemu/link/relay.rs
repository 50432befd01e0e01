#![forbid(unsafe_code)]
//! COM1 on a socket: bytes between whoever is connected and the machine of the moment. The socket
//! outlives the machine, which a reset replaces.
//!
//! What a guest prints while nobody reads stays in the machine's console, which bounds it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, read, write};

use super::{Listener, SocketPath};

/// Most bytes on their way in one direction.
const PUMP_BYTES: usize = 4096;
/// Most machines that wait to be connected; there is one at a time.
const PORTS: usize = 4;

/// The way to a relay's thread.
#[derive(Debug)]
pub struct Relay {
    ports: Sender<UnixStream>,
    wake: OwnedFd,
    /// The thread ends with the process, which drops nothing.
    _path: Option<SocketPath>,
}

impl Relay {
    /// Starts the thread.
    pub fn start(mut listener: Option<Listener>, client: Option<OwnedFd>) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (ports, arriving) = bounded(PORTS);
        let path = listener.as_mut().and_then(Listener::take_path);
        let mut state = State {
            listener,
            client: None,
            machine: None,
            arriving,
            wake: wake.try_clone()?,
            to_machine: Vec::new(),
            to_client: Vec::new(),
        };
        if let Some(client) = client {
            state.set_client(client);
        }
        // It ends with the process: the socket is there as long as the machine may be.
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
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.ports
            .send(ours)
            .map_err(|_| io::Error::other("the thread of the serial port is gone"))?;
        write(&self.wake, &1_u64.to_ne_bytes())?;
        Ok(theirs.into())
    }
}

struct State {
    listener: Option<Listener>,
    client: Option<OwnedFd>,
    machine: Option<UnixStream>,
    arriving: Receiver<UnixStream>,
    wake: OwnedFd,
    to_machine: Vec<u8>,
    to_client: Vec<u8>,
}

impl State {
    fn set_client(&mut self, client: OwnedFd) {
        let flags = rustix::fs::fcntl_getfl(&client).unwrap_or(rustix::fs::OFlags::empty());
        let _ = rustix::fs::fcntl_setfl(&client, flags | rustix::fs::OFlags::NONBLOCK);
        self.client = Some(client);
        self.to_client.clear();
    }

    fn run(mut self) {
        loop {
            let (woken, listener, client, machine) = self.wait();
            if woken {
                let mut count = [0; 8];
                let _ = read(&self.wake, &mut count);
                while let Ok(machine) = self.arriving.try_recv() {
                    self.machine = Some(machine);
                    self.to_machine.clear();
                }
            }
            if listener && let Some(client) = self.listener.as_ref().and_then(Listener::accept) {
                self.set_client(client);
            }
            if client.contains(PollFlags::HUP) && !self.to_machine.is_empty() {
                // It is gone, whatever of it still waits.
                self.client = None;
            }
            if !client.is_empty()
                && let Some(fd) = &self.client
                && !pump_both(fd.as_fd(), &mut self.to_machine, &mut self.to_client)
            {
                self.client = None;
                if self.listener.is_none() {
                    tracing::info!("the serial port's connection has ended");
                }
            }
            if machine
                && let Some(fd) = &self.machine
                && !pump_both(fd.as_fd(), &mut self.to_client, &mut self.to_machine)
            {
                self.machine = None;
            }
            self.push_on();
        }
    }

    /// Passes on at once what was just read; where that does not go, poll says when it does.
    fn push_on(&mut self) {
        for (fd, bytes) in [
            (self.client.as_ref().map(AsFd::as_fd), &mut self.to_client),
            (self.machine.as_ref().map(AsFd::as_fd), &mut self.to_machine),
        ] {
            if let Some(fd) = fd
                && !bytes.is_empty()
                && let Ok(count) = write(fd, bytes)
            {
                bytes.drain(..count);
            }
        }
    }

    /// What is ready: new machine, new client, client, machine.
    fn wait(&self) -> (bool, bool, PollFlags, bool) {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let mut place = [None; 3];
        if self.client.is_none()
            && let Some(listener) = &self.listener
        {
            place[0] = Some(fds.len());
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        if let Some(client) = &self.client {
            place[1] = Some(fds.len());
            fds.push(PollFd::new(
                client,
                interest(self.to_machine.is_empty(), !self.to_client.is_empty()),
            ));
        }
        let room = self.client.is_some() && self.to_client.is_empty();
        let wanted = interest(room, !self.to_machine.is_empty());
        // Not only for its end: that would be told again and again.
        if let Some(machine) = self.machine.as_ref().filter(|_| !wanted.is_empty()) {
            place[2] = Some(fds.len());
            fds.push(PollFd::new(machine, wanted));
        }
        if poll(&mut fds, None).is_err() {
            return (false, false, PollFlags::empty(), false);
        }
        let events =
            |place: Option<usize>| place.map_or(PollFlags::empty(), |at: usize| fds[at].revents());
        (
            !events(Some(0)).is_empty(),
            !events(place[0]).is_empty(),
            events(place[1]),
            !events(place[2]).is_empty(),
        )
    }
}

fn interest(room: bool, waiting: bool) -> PollFlags {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, room);
    flags.set(PollFlags::OUT, waiting);
    flags
}

/// Reads into `from` if it is empty and writes `to`; `false` when the other end is gone.
fn pump_both(fd: BorrowedFd<'_>, from: &mut Vec<u8>, to: &mut Vec<u8>) -> bool {
    if from.is_empty() {
        let mut buffer = [0; PUMP_BYTES];
        match read(fd, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => from.extend(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => (),
            Err(_) => return false,
        }
    }
    if !to.is_empty() {
        match write(fd, to) {
            Ok(count) => {
                to.drain(..count);
            }
            Err(Errno::AGAIN | Errno::INTR) => (),
            Err(_) => return false,
        }
    }
    true
}
