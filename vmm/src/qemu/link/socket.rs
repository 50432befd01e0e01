#![forbid(unsafe_code)]
//! Sockets, by path or on this host's loopback.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};

use crate::qemu::line::chardev::Address;

/// A socket that listens. Its path goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    path: Option<SocketPath>,
}

/// The path of a socket, with its device and inode: removed when this is dropped, if it is still the
/// same.
#[derive(Debug)]
pub struct SocketPath(PathBuf, u64, u64);

impl Drop for SocketPath {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.0)
            .is_ok_and(|facts| (facts.dev(), facts.ino()) == (self.1, self.2))
        {
            let _ = fs::remove_file(&self.0);
        }
    }
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. A socket that nobody listens on any more is replaced; one that is alive is refused,
    /// where QEMU takes its path away.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let socket = TcpListener::bind(address)?;
                socket.set_nonblocking(true)?;
                Ok(Self {
                    socket: Socket::Tcp(socket),
                    path: None,
                })
            }
            Address::Unix(path) => {
                remove_dead(path)?;
                let socket = UnixListener::bind(path)?;
                socket.set_nonblocking(true)?;
                let facts = fs::symlink_metadata(path)?;
                Ok(Self {
                    socket: Socket::Unix(socket),
                    path: Some(SocketPath(path.clone(), facts.dev(), facts.ino())),
                })
            }
        }
    }

    /// The next client, if there is one; reading from it blocks.
    pub fn accept(&self) -> Option<OwnedFd> {
        match &self.socket {
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept().ok()?;
                stream.set_nonblocking(false).ok()?;
                Some(stream.into())
            }
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept().ok()?;
                stream.set_nonblocking(false).ok()?;
                let _ = stream.set_nodelay(true);
                Some(stream.into())
            }
        }
    }

    /// The path, for one who outlives the thread that listens.
    pub fn take_path(&mut self) -> Option<SocketPath> {
        self.path.take()
    }

    /// Waits for a client.
    pub fn wait(&self) {
        let mut wanted = [PollFd::new(self, PollFlags::IN)];
        let _ = poll(&mut wanted, None);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// Connects.
pub(super) fn connect(address: &Address) -> io::Result<OwnedFd> {
    match address {
        Address::Unix(path) => Ok(UnixStream::connect(path)?.into()),
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            let _ = stream.set_nodelay(true);
            Ok(stream.into())
        }
    }
}

/// Removes a socket at `path` whose process is gone.
fn remove_dead(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(facts) if facts.file_type().is_socket() => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            _ => Ok(()),
        },
        // Whatever else is there, or not, bind says.
        _ => Ok(()),
    }
}
