#![forbid(unsafe_code)]
//! The host's side of a port: a Unix socket to which one program at a time connects, a file, or nothing.
//!
//! The socket and its program are watched for edges: that there is something to accept, to read, or room to
//! write is remembered until there is none.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::epoll::EventFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use thiserror::Error;

use crate::device::socket::{Socket, SocketError};
use crate::spec::PortTarget;

/// Why a port has no other end.
#[derive(Debug, Error)]
pub enum PortError {
    /// Its socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Its file cannot be written.
    #[error("cannot append to {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Where a port leads.
#[derive(Debug, Default)]
pub enum PortEnd {
    /// To nobody, ever: the guest sees that the host does not have it open.
    #[default]
    Nobody,
    /// Nowhere: it is open, and what the guest writes is gone.
    Null,
    /// To a file.
    File(File),
    /// To whoever connects.
    Socket(Socket),
}

impl PortEnd {
    /// Opens what a port is to lead to.
    pub fn open(target: &PortTarget) -> Result<Self, PortError> {
        match target {
            PortTarget::Null => Ok(Self::Null),
            PortTarget::Socket(path) => Ok(Self::Socket(Socket::listen(path)?)),
            PortTarget::File(path) => Self::append(path),
        }
    }

    fn append(path: &Path) -> Result<Self, PortError> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            // A FIFO without a reader is refused rather than waited for.
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path);
        file.map(Self::File).map_err(|source| PortError::File {
            path: path.to_owned(),
            source,
        })
    }
}

/// What became of data that the guest sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// So many bytes are with the host.
    Taken(usize),
    /// The host has no room now.
    Full,
    /// There is nobody to take it.
    Lost,
}

/// A program of the host.
#[derive(Debug)]
struct Program {
    stream: UnixStream,
    can_read: bool,
    can_write: bool,
    /// All that it has sent was read.
    is_at_end: bool,
    /// It neither sends nor receives.
    has_hung_up: bool,
}

/// The host's side of a port.
#[derive(Debug, Default)]
pub(super) struct HostSide {
    end: PortEnd,
    program: Option<Program>,
    /// Somebody may want to connect.
    may_accept: bool,
    failures: u64,
}

impl HostSide {
    pub(super) fn new(end: PortEnd) -> Self {
        Self {
            may_accept: matches!(end, PortEnd::Socket(_)),
            end,
            program: None,
            failures: 0,
        }
    }

    /// What to watch for programs that want to connect.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.end {
            PortEnd::Socket(socket) => Some(socket.as_fd()),
            PortEnd::Nobody | PortEnd::Null | PortEnd::File(_) => None,
        }
    }

    /// Whether the host has the port open.
    pub(super) fn is_open(&self) -> bool {
        match &self.end {
            PortEnd::Nobody => false,
            PortEnd::Null | PortEnd::File(_) => true,
            PortEnd::Socket(_) => self.program.is_some(),
        }
    }

    /// Whether it has no room for data, and is expected to have some again.
    pub(super) fn is_full(&self) -> bool {
        let program = self.program.as_ref();
        program.is_some_and(|program| !program.can_write && !program.has_hung_up)
    }

    /// Gives data to the host, as much as it takes at once.
    pub(super) fn send(&mut self, data: &[u8]) -> Sent {
        let written = match (&mut self.end, &mut self.program) {
            (PortEnd::Null, _) => return Sent::Taken(data.len()),
            (PortEnd::File(file), _) => file.write(data),
            (PortEnd::Socket(_), Some(program)) if !program.has_hung_up => {
                return program.send(data);
            }
            (PortEnd::Socket(_) | PortEnd::Nobody, _) => return Sent::Lost,
        };
        match written {
            Ok(length @ 1..) => return Sent::Taken(length),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Sent::Taken(0),
            Ok(0) => (),
            Err(error) => {
                self.failures += 1;
                // A guest can make each of its requests fail.
                if self.failures.is_power_of_two() {
                    let count = self.failures;
                    tracing::warn!(count, "what a guest wrote to a port is lost: {error}");
                }
            }
        }
        Sent::Lost
    }

    /// Whether the host has sent something.
    pub(super) fn has_data(&mut self) -> bool {
        self.program.as_mut().is_some_and(Program::has_data)
    }

    /// Takes what the host has sent, as much as there is room for; how much.
    pub(super) fn receive(&mut self, room: &mut [u8]) -> usize {
        let program = self.program.as_mut();
        // What is wrong is found when it is asked for the next time.
        program.map_or(0, |program| program.stream.read(room).unwrap_or(0))
    }

    /// Somebody wants to connect.
    pub(super) fn knock(&mut self) {
        self.may_accept = true;
    }

    /// Takes in what has happened to the program that is connected.
    pub(super) fn notice(&mut self, flags: EventFlags) {
        let Some(program) = &mut self.program else {
            return;
        };
        let end = EventFlags::HUP | EventFlags::ERR;
        program.can_read |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | end);
        program.can_write |= flags.intersects(EventFlags::OUT | end);
        program.has_hung_up |= flags.intersects(end);
    }

    /// Forgets a program that is gone, once all that it sent was read, or where nobody wants it.
    pub(super) fn let_go(&mut self, is_wanted: bool) {
        if let Some(program) = &mut self.program
            && program.has_hung_up
            && !(is_wanted && program.has_data())
        {
            self.program = None;
        }
    }

    /// Lets the next program in, if one waits; [`Self::let_go`] comes first.
    pub(super) fn accept(&mut self, watch: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>) {
        let PortEnd::Socket(socket) = &self.end else {
            return;
        };
        if self.program.is_some() || !self.may_accept {
            return;
        }
        let Ok(stream) = socket.accept() else {
            // There is nobody, or no descriptor: whoever comes next is the next occasion.
            self.may_accept = false;
            return;
        };
        if let Err(error) = watch(stream.as_fd()) {
            tracing::warn!("a program that connected to a port is sent away: {error}");
            return;
        }
        self.program = Some(Program {
            stream,
            can_read: true,
            can_write: true,
            is_at_end: false,
            has_hung_up: false,
        });
    }
}

impl Program {
    fn send(&mut self, data: &[u8]) -> Sent {
        match self.stream.write(data) {
            Ok(length @ 1..) => Sent::Taken(length),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Sent::Taken(0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.can_write = false;
                Sent::Full
            }
            Ok(0) | Err(_) => {
                self.has_hung_up = true;
                Sent::Lost
            }
        }
    }

    fn has_data(&mut self) -> bool {
        if !self.can_read || self.is_at_end {
            return false;
        }
        match rustix::net::recv(&self.stream, &mut [0; 1][..], RecvFlags::PEEK) {
            Ok((1.., _)) => true,
            Err(Errno::AGAIN | Errno::INTR) => {
                self.can_read = false;
                false
            }
            Ok(_) | Err(_) => {
                self.is_at_end = true;
                false
            }
        }
    }
}

/// What a device is connected to on this host: where each port leads, by its number. One that is not here
/// leads to nobody.
#[derive(Debug, Default)]
pub struct ConsoleConnection {
    /// The ends.
    pub ends: Vec<(u8, PortEnd)>,
}

/// Where a device takes its connection when its machine begins.
#[derive(Debug, Clone, Default)]
pub struct ConsolePort(Arc<Mutex<Option<ConsoleConnection>>>);

impl ConsolePort {
    /// Puts a connection there.
    pub fn put(&self, connection: ConsoleConnection) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
    }

    pub(super) fn take(&self) -> Option<ConsoleConnection> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        place.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for line in ["one\n", "two\n"] {
            let mut host = HostSide::new(PortEnd::open(&PortTarget::File(path.clone())).unwrap());
            assert!(host.is_open() && !host.has_data() && !host.is_full());
            assert_eq!(host.send(line.as_bytes()), Sent::Taken(4));
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        let error = PortEnd::open(&PortTarget::File(dir.path().to_owned())).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot append to "),
            "{error}"
        );
    }

    #[test]
    fn a_program_is_let_go_when_all_that_it_sent_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let target = PortTarget::Socket(path.clone());
        let mut host = HostSide::new(PortEnd::open(&target).unwrap());
        assert!(!host.is_open());
        assert_eq!(host.send(b"x"), Sent::Lost);
        let mut program = UnixStream::connect(&path).unwrap();
        host.accept(|_| Ok(()));
        program.write_all(b"last").unwrap();
        drop(program);
        host.notice(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP);
        host.let_go(true);
        assert!(host.is_open() && host.has_data());
        let mut room = [0; 8];
        assert_eq!(host.receive(&mut room), 4);
        host.let_go(true);
        assert!(!host.is_open());
        // One that nobody will read goes at once.
        let mut program = UnixStream::connect(&path).unwrap();
        host.accept(|_| Ok(()));
        program.write_all(b"x").unwrap();
        drop(program);
        host.notice(EventFlags::HUP);
        host.let_go(false);
        assert!(!host.is_open());
    }
}
