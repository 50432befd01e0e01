#![forbid(unsafe_code)]
//! Descriptors that somebody sent and nobody wants. Closing the last one of a file can take as long as
//! whoever made it likes: a socket lingers (SO_LINGER, socket(7)), a file system of user space answers when
//! it answers. So whoever must not wait has them closed elsewhere.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

/// Most threads that close at a time.
const MAX_THREADS: usize = 256;
/// Most descriptors that wait for such a thread. Who sends what is not wanted is ended or refused, so that
/// there are so many only if hundreds conspire; then closing waits again.
const MAX_PARKED: usize = 1024;

static THREADS: AtomicUsize = AtomicUsize::new(0);
static PARKED: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

/// One thread that closes.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let more = |threads| (threads < MAX_THREADS).then_some(threads + 1);
        let taken = THREADS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.ok().map(|_| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Closes `descriptors` without the caller waiting for it. Not in a process that forks by clone(2).
pub fn close_elsewhere(descriptors: Vec<OwnedFd>) {
    if descriptors.is_empty() {
        return;
    }
    let Some(place) = Place::take() else {
        return park(descriptors);
    };
    let thread = thread::Builder::new().name("close".to_owned());
    let closing = thread.spawn(move || {
        let _place = place;
        drop(descriptors);
        loop {
            let next = parked().pop();
            match next {
                Some(descriptor) => drop(descriptor),
                None => break,
            }
        }
    });
    if let Err(error) = closing {
        tracing::debug!(%error, "descriptors that nobody wants were closed in passing");
    }
}

fn parked() -> MutexGuard<'static, Vec<OwnedFd>> {
    PARKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps descriptors for whichever thread is done next.
fn park(descriptors: Vec<OwnedFd>) {
    let mut parked = parked();
    let room = MAX_PARKED.saturating_sub(parked.len());
    let mut descriptors = descriptors.into_iter();
    parked.extend(descriptors.by_ref().take(room));
    // Not with the lock, which those who close take.
    drop(parked);
    drop(descriptors);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;

    /// A connection whose other end reads nothing: closing it waits for as long as it lingers.
    #[test]
    fn a_socket_that_lingers_holds_nobody_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_unread, _) = listener.accept().unwrap();
        rustix::net::sockopt::set_socket_linger(socket.as_fd(), Some(Duration::from_secs(3600)))
            .unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 1 << 16]).is_ok() {}
        close_elsewhere(vec![socket.into()]);
        assert!(THREADS.load(Ordering::Relaxed) >= 1, "it is being closed");
    }
}
