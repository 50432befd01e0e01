#![forbid(unsafe_code)]
//! What is told to one peer, from any thread, without ever waiting for it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::SendFlags;

use super::protocol::{ClientNews, FromPager, LastWords};
use crate::clone::control::{Channel, ControlError};
use crate::report::one_line;

/// Most messages that wait for a peer which does not read. No order of a peer is taken while one
/// waits, and each of its clients has two messages at most that nobody ordered (poisoned, gone): a
/// peer that exceeds this is dropped.
const UNSENT_LIMIT: usize = 1 << 16;

/// Which form messages to a peer have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A supervisor of the same program.
    Program,
    /// Another VMM: JSON, news of clients alone.
    Json,
}

/// The way to one peer.
#[derive(Debug)]
pub struct Outlet {
    channel: Channel,
    form: Form,
    state: Mutex<State>,
    /// Tells the loop that something waits.
    wake: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct State {
    /// At most [`UNSENT_LIMIT`].
    unsent: VecDeque<FromPager>,
    is_broken: bool,
}

impl Outlet {
    /// To the other end of `channel`; `wake` is an eventfd that the loop watches.
    pub fn new(channel: Channel, form: Form, wake: Arc<OwnedFd>) -> Self {
        Self {
            channel,
            form,
            state: Mutex::default(),
            wake,
        }
    }

    /// For receiving.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, at once or when the peer reads again.
    pub fn tell(&self, message: FromPager) {
        let mut state = self.state();
        if state.is_broken || (state.unsent.is_empty() && self.send(&message, &mut state)) {
            return;
        }
        if state.unsent.len() < UNSENT_LIMIT {
            state.unsent.push_back(message);
        } else {
            tracing::warn!(UNSENT_LIMIT, "a peer that reads nothing is dropped");
            state.is_broken = true;
        }
        // Fails only when the counter is full: then the loop has been told.
        let _told = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Tells news of a client.
    pub fn tell_client(&self, news: ClientNews) {
        self.tell(FromPager::Client(news));
    }

    /// Sends what waits, as far as the peer takes it.
    pub fn flush(&self) {
        let mut state = self.state();
        while let Some(message) = state.unsent.pop_front() {
            if !self.send(&message, &mut state) {
                state.unsent.push_front(message);
                return;
            }
        }
    }

    /// Tells another VMM why no more of it is taken, if it reads.
    pub fn last_words(&self, why: String) {
        let mut state = self.state();
        if state.unsent.is_empty()
            && self.form == Form::Json
            && let Ok(bytes) = serde_json::to_vec(&LastWords::Closing { why })
        {
            let _ = self.channel.send_bytes(&bytes, &[], SendFlags::DONTWAIT);
        }
        state.is_broken = true;
    }

    /// Whether nothing waits for the peer to read.
    pub fn is_clear(&self) -> bool {
        self.state().unsent.is_empty()
    }

    /// Whether the peer is not to be had any more.
    pub fn is_broken(&self) -> bool {
        self.state().is_broken
    }

    /// Whether it is sent, or will never have to be.
    fn send(&self, message: &FromPager, state: &mut State) -> bool {
        let sent = match (self.form, message) {
            (Form::Program, message) => self.channel.send_now(message, &[]),
            (Form::Json, FromPager::Client(news)) => self.send_json(news),
            (Form::Json, _) => return true,
        };
        sent.unwrap_or_else(|error| {
            tracing::debug!("{}", one_line(&error));
            state.is_broken = true;
            state.unsent.clear();
            true
        })
    }

    fn send_json(&self, news: &ClientNews) -> Result<bool, ControlError> {
        let bytes = serde_json::to_vec(news).map_err(|error| ControlError::Damaged {
            reason: error.to_string(),
        })?;
        self.channel.send_bytes(&bytes, &[], SendFlags::DONTWAIT)
    }
}

impl AsFd for Outlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::control::Received;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn a_peer_that_does_not_read_holds_nobody_up_and_misses_nothing() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let outlet = Outlet::new(ours, Form::Program, Arc::clone(&wake));
        for client in 0..5000 {
            outlet.tell_client(ClientNews::Gone { client });
        }
        assert!(!outlet.is_clear());
        rustix::io::read(&wake, &mut [0; 8]).unwrap();
        let mut client = 0;
        while client < 5000 {
            match theirs.receive_now::<FromPager>().unwrap() {
                Received::Message(message, _) => {
                    assert_eq!(message, FromPager::Client(ClientNews::Gone { client }));
                    client += 1;
                }
                _ => outlet.flush(),
            }
        }
        assert!(outlet.is_clear());
        for client in 0..2 * UNSENT_LIMIT as u64 {
            outlet.tell_client(ClientNews::Gone { client });
        }
        assert!(outlet.is_broken());
    }
}
