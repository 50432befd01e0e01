#![forbid(unsafe_code)]
//! A seqpacket socket between two processes of this program: each message whole, with a version and
//! a bound, descriptors beside it.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::closing::close_elsewhere;

/// Version of the messages; both ends are the same program, so another one is refused.
const VERSION: u32 = 7;
/// The longest message in bytes.
pub const MAX_MESSAGE_BYTES: usize = 128 << 10;
/// The most descriptors beside a message.
const MAX_DESCRIPTORS: usize = 4;

/// Why a message could not be sent or believed.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A system call failed.
    #[error("cannot {action} the control socket")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A message that is too long to send or came cut off.
    #[error("control message of {bytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// More descriptors than a message may have, or than this process has room for.
    #[error(
        "control message came without all its descriptors, of which {MAX_DESCRIPTORS} are the limit"
    )]
    Descriptors,
    /// A message that is none of ours.
    #[error("control message is damaged: {reason}")]
    Damaged {
        /// What is wrong with it.
        reason: String,
    },
}

/// What there was to receive, without waiting for it.
#[derive(Debug)]
pub enum Received<T> {
    /// A message and its descriptors.
    Message(T, Vec<OwnedFd>),
    /// Nothing yet.
    Nothing,
    /// The other end is closed.
    Closed,
}

thread_local! {
    /// Where a message is received. Kept: room for the longest one is mapped, and faulted in, once.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One end of a control socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends of a new socket.
    pub fn pair() -> Result<(Self, OwnedFd), ControlError> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(socket_error("make"))?;
        Ok((Self(ours), theirs))
    }

    /// An end that another process gave us.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Whether there is something to receive, or the other end is closed.
    pub fn has_message(&self) -> bool {
        self.has_message_within(Duration::ZERO)
    }

    /// The same, waiting for it.
    pub fn has_message_within(&self, time: Duration) -> bool {
        let time = Timespec::try_from(time).unwrap_or_default();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&time)), Ok(1..))
    }

    /// Whether the other end is closed, though messages of it may be left to receive.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::empty())];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
    }

    /// Sends a message, with descriptors beside it. Blocks while the other end has too much unread.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        self.send_bytes(&encode(message)?, descriptors, SendFlags::empty())
            .map(|_| ())
    }

    /// The same without waiting; `false`, and nothing is sent, while the other end has too much unread.
    pub fn send_now<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<bool, ControlError> {
        self.send_bytes(&encode(message)?, descriptors, SendFlags::DONTWAIT)
    }

    /// Sends bytes as they are; `false` when that had to wait and was not to.
    pub(crate) fn send_bytes(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<bool, ControlError> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(ControlError::TooLong { bytes: bytes.len() });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(ControlError::Damaged {
                reason: format!("{} descriptors do not fit beside it", descriptors.len()),
            });
        }
        let sent = rustix::io::retry_on_intr(|| {
            let slices = &[IoSlice::new(bytes)];
            rustix::net::sendmsg(&self.0, slices, &mut ancillary, flags | SendFlags::NOSIGNAL)
        });
        match sent {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) if flags.contains(SendFlags::DONTWAIT) => Ok(false),
            Err(errno) => Err(socket_error("write to")(errno)),
        }
    }

    /// Receives the next message and its descriptors; `None` when the other end is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        match self.receive_bytes(RecvFlags::empty())? {
            Received::Message(bytes, descriptors) => Ok(Some(decode_with(&bytes, descriptors)?)),
            Received::Nothing | Received::Closed => Ok(None),
        }
    }

    /// The same without waiting.
    pub fn receive_now<T: DeserializeOwned>(&self) -> Result<Received<T>, ControlError> {
        Ok(match self.receive_bytes(RecvFlags::DONTWAIT)? {
            Received::Message(bytes, descriptors) => {
                let (message, descriptors) = decode_with(&bytes, descriptors)?;
                Received::Message(message, descriptors)
            }
            Received::Nothing => Received::Nothing,
            Received::Closed => Received::Closed,
        })
    }

    /// Receives bytes as they are.
    pub(crate) fn receive_bytes(
        &self,
        flags: RecvFlags,
    ) -> Result<Received<Vec<u8>>, ControlError> {
        BUFFER.with_borrow_mut(|buffer| self.receive_into(buffer, flags))
    }

    fn receive_into(
        &self,
        buffer: &mut Vec<u8>,
        flags: RecvFlags,
    ) -> Result<Received<Vec<u8>>, ControlError> {
        buffer.resize(MAX_MESSAGE_BYTES, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let slices = &mut [IoSliceMut::new(buffer)];
            match rustix::net::recvmsg(&self.0, slices, &mut ancillary, flags) {
                Err(Errno::INTR) => (),
                Err(Errno::CONNRESET) => return Ok(Received::Closed),
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                other => break other.map_err(socket_error("read from"))?,
            }
        };
        // Whatever is wrong below, none that came stays open.
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            close_elsewhere(descriptors);
            return Ok(Received::Closed);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            close_elsewhere(descriptors);
            return Err(ControlError::TooLong {
                bytes: received.bytes,
            });
        }
        // Alignment leaves room for one more than there may be.
        let is_cut = received.flags.contains(ReturnFlags::CTRUNC);
        if is_cut || descriptors.len() > MAX_DESCRIPTORS {
            close_elsewhere(descriptors);
            return Err(ControlError::Descriptors);
        }
        let bytes = buffer.get(..received.bytes).unwrap_or_default();
        Ok(Received::Message(bytes.to_vec(), descriptors))
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ControlError> {
    let bytes = VERSION.to_le_bytes().to_vec();
    postcard::to_extend(message, bytes).map_err(|error| ControlError::Damaged {
        reason: error.to_string(),
    })
}

/// A message with what came beside it.
fn decode_with<T: DeserializeOwned>(
    bytes: &[u8],
    descriptors: Vec<OwnedFd>,
) -> Result<(T, Vec<OwnedFd>), ControlError> {
    match decode(bytes) {
        Ok(message) => Ok((message, descriptors)),
        Err(error) => {
            close_elsewhere(descriptors);
            Err(error)
        }
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ControlError> {
    let damaged = |reason: String| ControlError::Damaged { reason };
    let Some((version, body)) = bytes.split_first_chunk() else {
        return Err(damaged(format!("{} bytes are no message", bytes.len())));
    };
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(damaged(format!(
            "version {version}, this end speaks {VERSION}"
        )));
    }
    postcard::from_bytes(body).map_err(|error| damaged(error.to_string()))
}

fn socket_error(action: &'static str) -> impl FnOnce(Errno) -> ControlError {
    move |errno| ControlError::Socket {
        action,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clone::control::{Ending, FromWorker, ToWorker};
    use proptest::prelude::*;

    #[test]
    fn a_message_over_the_bound_is_refused_by_the_sender() {
        let (ours, _theirs) = Channel::pair().unwrap();
        let ending = Ending::Failed {
            code: 1,
            message: "x".repeat(MAX_MESSAGE_BYTES),
        };
        let error = ours
            .send(&FromWorker::Ended(ending), &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("exceeds the limit of 131072"), "{error}");
    }

    #[test]
    fn another_version_is_refused() {
        let other = VERSION + 1;
        let mut bytes = other.to_le_bytes().to_vec();
        bytes.push(1);
        let error = decode::<ToWorker>(&bytes).unwrap_err().to_string();
        assert!(
            error.contains(&format!("version {other}, this end speaks {VERSION}")),
            "{error}"
        );
    }

    #[test]
    fn nothing_is_waited_for_that_must_not_be() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        assert!(matches!(
            theirs.receive_now::<ToWorker>(),
            Ok(Received::Nothing)
        ));
        let mut sent = 0;
        while ours.send_now(&ToWorker::Stop, &[]).unwrap() {
            sent += 1;
        }
        for _ in 0..sent {
            assert!(matches!(
                theirs.receive_now::<ToWorker>(),
                Ok(Received::Message(ToWorker::Stop, _))
            ));
        }
        drop(ours);
        assert!(matches!(
            theirs.receive_now::<ToWorker>(),
            Ok(Received::Closed)
        ));
    }

    #[test]
    fn more_descriptors_than_a_message_may_have_are_refused_and_closed() {
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let fd = std::fs::File::open("/dev/null").unwrap();
        let many = [fd.as_fd(); MAX_DESCRIPTORS + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        let bytes = encode(&ToWorker::Stop).unwrap();
        let slices = &[IoSlice::new(&bytes)];
        rustix::net::sendmsg(&ours.0, slices, &mut ancillary, SendFlags::empty()).unwrap();
        let before = open();
        let error = theirs.receive_now::<ToWorker>().unwrap_err();
        assert!(matches!(error, ControlError::Descriptors), "{error}");
        // A test of its own process: nobody else opens any, and another thread closes these.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while open() != before {
            assert!(std::time::Instant::now() < deadline, "{} are open", open());
            std::thread::yield_now();
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode::<FromWorker>(&bytes);
            let _ = decode::<ToWorker>(&bytes);
        }
    }
}
