#![forbid(unsafe_code)]
//! A listening Unix socket that owns its path.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;

/// How often and how long to wait for another process that is making a socket in the directory.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_WAIT: Duration = Duration::from_millis(10);

/// Why nobody can listen.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody listens on the socket.
    #[error(
        "socket path {} is in use: a process listens on it; choose another path or end that process",
        path.display()
    )]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// The path is taken by something that is not ours to replace.
    #[error("{} exists and is no socket: choose another path or remove it", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path is longer than what is made of it can be.
    #[error("socket path {} is longer than {most} bytes: choose a shorter one", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// The longest.
        most: usize,
    },
    /// The socket cannot be made.
    #[error("cannot listen on socket {}", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A listener; its path goes when it is dropped, if it is still the same socket.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`. A socket there on which nobody listens any more, left by a process that
    /// was killed, is replaced; one that is alive is refused, and so is anything else.
    ///
    /// The directory is locked meanwhile, so that of two processes that find the same dead socket
    /// one wins and the other is told that it is in use.
    pub fn listen(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen {
            path: path.to_owned(),
            source,
        };
        let _lock = lock_directory(path).map_err(failed)?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) if is_alive(path).map_err(failed)? => {
                return Err(SocketError::InUse {
                    path: path.to_owned(),
                });
            }
            Ok(_) => fs::remove_file(path).map_err(failed)?,
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// The next client, non-blocking; an error that says so when there is none.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn lock_directory(path: &Path) -> io::Result<File> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory)?;
    for _ in 0..LOCK_ATTEMPTS {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_WAIT),
            result => return result.map(|()| directory).map_err(io::Error::from),
        }
    }
    Err(io::Error::other(
        "its directory stays locked by another process",
    ))
}

/// Whether a process has the socket open. A datagram socket cannot connect to a stream socket: the
/// kernel says so only if there is one behind the path, and its owner does not notice.
fn is_alive(path: &Path) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) if error.raw_os_error() == Some(Errno::PROTOTYPE.raw_os_error()) => Ok(true),
        Err(error) => Err(error),
        Ok(()) => Ok(true),
    }
}
