#![forbid(unsafe_code)]
//! How connections leave for the host: a Unix socket on which programs of the host reach the guest, and,
//! beside it, one for each port that the guest may reach.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::device::socket::{Socket, SocketError};
use crate::spec::MAX_VSOCK_PATH_BYTES;

/// The longest greeting, its end included: a word, a blank and a port.
const MAX_GREETING_BYTES: usize = 32;

/// The host's side of a device.
#[derive(Debug)]
pub struct HostSide {
    socket: Socket,
    path: PathBuf,
}

impl HostSide {
    /// Listens at `path`, which goes with this.
    pub fn listen(path: &Path) -> Result<Self, SocketError> {
        if path.as_os_str().len() > MAX_VSOCK_PATH_BYTES {
            return Err(SocketError::TooLong {
                path: path.to_owned(),
                most: MAX_VSOCK_PATH_BYTES,
            });
        }
        Ok(Self {
            socket: Socket::listen(path)?,
            path: path.to_owned(),
        })
    }

    /// The next program that wants to reach the guest.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept()
    }

    /// Reaches the program that listens for the guest at a port; at once, or not.
    pub(super) fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path.as_bytes())?)?;
        Ok(socket.into())
    }
}

impl AsFd for HostSide {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a program of the host says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Not all of it is there.
    Incomplete,
    /// It wants to reach this port of the guest.
    Port(u32),
    /// It says something else, or is gone.
    Wrong,
}

impl Greeting {
    /// Takes the first line from a stream, and nothing behind it: `CONNECT PORT`.
    pub(super) fn take(stream: &UnixStream) -> Self {
        let mut bytes = [0; MAX_GREETING_BYTES];
        let length = match rustix::net::recv(stream, &mut bytes[..], RecvFlags::PEEK) {
            Ok((length @ 1.., _)) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Self::Incomplete,
            Ok(_) | Err(_) => return Self::Wrong,
        };
        let seen = bytes.get(..length).unwrap_or_default();
        let Some(end) = seen.iter().position(|&byte| byte == b'\n') else {
            return if length < MAX_GREETING_BYTES {
                Self::Incomplete
            } else {
                Self::Wrong
            };
        };
        let mut line = [0; MAX_GREETING_BYTES];
        let line = line.get_mut(..=end).unwrap_or_default();
        match rustix::net::recv(stream, &mut *line, RecvFlags::empty()) {
            Ok((taken, _)) if taken == end + 1 => parse(line).map_or(Self::Wrong, Self::Port),
            _ => Self::Wrong,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let word = words.next()?;
    let port = words.next()?.parse().ok()?;
    (word.eq_ignore_ascii_case("connect") && words.next().is_none()).then_some(port)
}

/// What a device is connected to on this host, and what it is called there.
#[derive(Debug, Default)]
pub struct VsockConnection {
    /// Its context ID; `None` for the one that the machine was made with.
    pub cid: Option<u32>,
    /// The host's side; none is a device that reaches nobody.
    pub host: Option<HostSide>,
}

/// Where a device takes its connection when its machine begins.
#[derive(Debug, Clone, Default)]
pub struct VsockPort(Arc<Mutex<Option<VsockConnection>>>);

impl VsockPort {
    /// Puts a connection there.
    pub fn put(&self, connection: VsockConnection) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
    }

    pub(super) fn take(&self) -> Option<VsockConnection> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        place.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn greeting(bytes: &[u8]) -> (Greeting, UnixStream, UnixStream) {
        let (mut program, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        program.write_all(bytes).unwrap();
        (Greeting::take(&ours), program, ours)
    }

    #[test]
    fn a_greeting_is_one_line_and_what_is_behind_it_stays() {
        let (greeting, _program, mut ours) = greeting(b"connect  52\r\nrest");
        assert_eq!(greeting, Greeting::Port(52));
        let mut rest = [0; 9];
        let length = ours.read(&mut rest).unwrap();
        assert_eq!(&rest[..length], b"rest");
    }

    #[test]
    fn other_greetings_are_refused() {
        for (text, expected) in [
            (&b""[..], Greeting::Incomplete),
            (b"CONNECT 4", Greeting::Incomplete),
            (b"CONNECT 4294967295\n", Greeting::Port(u32::MAX)),
            (b"CONNECT 4294967296\n", Greeting::Wrong),
            (b"CONNECT -1\n", Greeting::Wrong),
            (b"CONNECT\n", Greeting::Wrong),
            (b"CONNECT 1 2\n", Greeting::Wrong),
            (b"GET / HTTP/1.1\n", Greeting::Wrong),
            (b"CONNECT \xff\n", Greeting::Wrong),
            (&[b' '; 32], Greeting::Wrong),
            (&[b' '; 31], Greeting::Incomplete),
        ] {
            assert_eq!(greeting(text).0, expected, "{text:?}");
        }
        let (program, ours) = UnixStream::pair().unwrap();
        drop(program);
        assert_eq!(Greeting::take(&ours), Greeting::Wrong);
    }

    #[test]
    fn a_path_leaves_room_for_ports() {
        let path = PathBuf::from("/".repeat(MAX_VSOCK_PATH_BYTES + 1));
        let error = HostSide::listen(&path).unwrap_err();
        assert!(matches!(error, SocketError::TooLong { .. }), "{error}");
    }
}
