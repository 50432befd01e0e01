#![forbid(unsafe_code)]
//! The conversation with a backend: one request at a time over a Unix socket, each sequence of requests with a
//! time limit.
//!
//! The crate's frontend waits for an answer as long as it takes. So a sequence has a watcher beside it, which
//! shuts the socket down when the time is over: whoever waits then hears that the peer is gone.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, bounded};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures};

use super::error::VhostUserError;

/// Longest time that a backend has for a sequence of requests: one vCPU waits for it, or the whole machine.
pub(super) const LIMIT: Duration = Duration::from_secs(2);
/// The same for giving rings back: requests that are under way are done first, on a disk that may be slow.
pub(super) const RETURN_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for room in the line of those who want to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// A request that failed, by its name.
pub(super) type Fault = (&'static str, vhost::Error);

/// Names a request that failed.
pub(super) fn named<T>(request: &'static str, answer: vhost::Result<T>) -> Result<T, Fault> {
    answer.map_err(|source| (request, source))
}

/// A connection to a backend that has said what it can do.
pub(super) struct Session {
    frontend: Frontend,
    /// The same socket, to end it and to see its end.
    socket: UnixStream,
    path: PathBuf,
    /// Virtio features that it has.
    pub(super) features: u64,
    /// Protocol features in use.
    pub(super) protocol: VhostUserProtocolFeatures,
    is_over: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("path", &self.path)
            .field("is_over", &self.is_over)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Connects to the socket of a backend of a device with this many queues.
    pub(super) fn connect(path: &Path, queues: u64) -> Result<Self, VhostUserError> {
        let socket = connect(path).map_err(|source| VhostUserError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let frontend = Frontend::from_stream(socket.try_clone()?, queues);
        Ok(Self {
            frontend,
            socket,
            path: path.to_owned(),
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            is_over: false,
        })
    }

    /// The backend's socket.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The end of the connection that becomes readable when it ends.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether nothing more can be asked.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Ends the conversation: the backend lets go of guest memory when it sees that.
    pub(super) fn end(&mut self) {
        self.is_over = true;
        // It may be gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// What is wrong with the backend, in words.
    pub(super) fn wrong(&self, reason: impl Into<String>) -> VhostUserError {
        VhostUserError::Wrong {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// Asks something, with all requests of it together within [`LIMIT`].
    pub(super) fn ask<T>(
        &mut self,
        act: impl FnOnce(&mut Frontend) -> Result<T, Fault>,
    ) -> Result<T, VhostUserError> {
        self.ask_within(LIMIT, act)
    }

    /// Asks something, with all requests of it together within a limit. What fails ends the conversation:
    /// nobody knows what would come next.
    pub(super) fn ask_within<T>(
        &mut self,
        limit: Duration,
        act: impl FnOnce(&mut Frontend) -> Result<T, Fault>,
    ) -> Result<T, VhostUserError> {
        if self.is_over {
            return Err(VhostUserError::Gone {
                path: self.path.clone(),
            });
        }
        let is_late = AtomicBool::new(false);
        let (socket, frontend) = (&self.socket, &mut self.frontend);
        let (done, wait) = bounded::<()>(0);
        let answer = thread::scope(|scope| {
            let watch = || {
                if wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                    is_late.store(true, Ordering::SeqCst);
                    let _ = socket.shutdown(Shutdown::Both);
                }
            };
            let builder = thread::Builder::new().name("vhost-user-limit".to_owned());
            let watcher = builder.spawn_scoped(scope, watch)?;
            let answer = act(frontend);
            drop(done);
            // It has nothing that could fail.
            let _ = watcher.join();
            io::Result::Ok(answer)
        })?;
        answer.map_err(|(request, source)| {
            self.end();
            let path = self.path.clone();
            if is_late.load(Ordering::SeqCst) {
                VhostUserError::Silent {
                    path,
                    request,
                    limit_ms: limit.as_millis(),
                }
            } else {
                VhostUserError::Request {
                    path,
                    request,
                    source,
                }
            }
        })
    }

    /// Looks at the socket between two requests, when a backend has nothing to say.
    pub(super) fn look(&mut self) -> Result<(), VhostUserError> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let seen = rustix::net::recv(&self.socket, &mut [0_u8; 1], flags);
        match seen {
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Ok((_, 1..)) => {
                self.end();
                Err(self.wrong("says what it was not asked: it is given up"))
            }
            Ok((_, 0)) | Err(_) => {
                self.end();
                Err(VhostUserError::Gone {
                    path: self.path.clone(),
                })
            }
        }
    }
}

/// Connects within [`LIMIT`]. A backend that serves somebody else and has a line of those who wait is no
/// reason to wait for ever.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                thread::sleep(CONNECT_PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
