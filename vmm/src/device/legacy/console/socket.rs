#![forbid(unsafe_code)]
//! A listening Unix socket that owns its path.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::error::ConsoleError;

/// How often and how long to wait for another process that is making a socket in the directory.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_WAIT: Duration = Duration::from_millis(10);

/// A listener; its path goes when it is dropped, if it is still the same socket.
#[derive(Debug)]
pub(super) struct Socket {
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
    pub(super) fn listen(path: &Path) -> Result<Self, ConsoleError> {
        let failed = |source| ConsoleError::Socket {
            path: path.to_owned(),
            source,
        };
        let _lock = lock_directory(path).map_err(failed)?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(ConsoleError::NotASocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) if is_alive(path).map_err(failed)? => {
                return Err(ConsoleError::SocketInUse {
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

    /// The next client, non-blocking; `None` when there is none.
    pub(super) fn accept(&self) -> Option<OwnedFd> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(stream.into())
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
