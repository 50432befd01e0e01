#![forbid(unsafe_code)]
//! What a supervisor and its workers say to each other: typed messages on a seqpacket socket, each
//! with a version and a bound, descriptors beside the first.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Engine;
use super::give_back::policy::Policy;
use super::learn::Learn;
use super::record::{Judgement, Record, TracePiece};
use crate::observe::memory::ram::MemoryPlace;
use crate::observe::relay::Delta;

/// Version of the messages; both ends are the same program, so another one is refused.
const VERSION: u32 = 5;
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
    /// A message that is none of ours.
    #[error("control message is damaged: {reason}")]
    Damaged {
        /// What is wrong with it.
        reason: String,
    },
}

/// From the supervisor to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first message: what to run. Descriptors that [`Serial`] names come with it.
    Start(WorkerConfig),
    /// Stop the machine and end.
    Stop,
}

/// What a worker is to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// The clone's number.
    pub clone: u64,
    /// The template's directory.
    #[serde(with = "path_bytes")]
    pub template: PathBuf,
    /// Where memory comes from.
    pub engine: Engine,
    /// Where COM1 goes.
    pub serial: Serial,
    /// How the pager works.
    pub pager: PagerConfig,
    /// Whether the worker must compare the host with the template, because nobody did.
    pub host_check_is_due: bool,
    /// The process that must be the worker's parent, lest it outlive it unseen.
    pub supervisor_pid: u32,
    /// How much it logs, as `observe::log::start` takes it.
    pub verbosity: u8,
    /// What of it is to be recorded, if anything.
    pub record: Option<Record>,
}

/// How a clone's pager works.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PagerConfig {
    /// How template pages are read.
    pub io: Io,
    /// Whether each chunk's checksum is compared when it is first read.
    pub verify: bool,
    /// How long a fault may take before its page is given up.
    pub fault_deadline: Duration,
    /// Whether pages that the template's working set knows are in place before the guest runs.
    pub working_set: bool,
    /// Whether a clone of one vCPU is kept on one CPU with its pager while pages come in.
    pub keep_together: bool,
    /// Which clones teach the template what they touch.
    pub learn: Learn,
    /// When an idle clone gives memory that it did not write back to the host.
    pub give_back: Option<Policy>,
}

impl Default for PagerConfig {
    fn default() -> Self {
        Self {
            io: Io::Auto,
            verify: true,
            fault_deadline: Duration::from_secs(10),
            working_set: true,
            keep_together: true,
            learn: Learn::Off,
            give_back: None,
        }
    }
}

/// How template pages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Io {
    /// io_uring, or pread where the kernel refuses it.
    Auto,
    /// io_uring, or an error.
    Uring,
    /// pread in a few threads.
    Pread,
}

/// Where a clone's COM1 goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Serial {
    /// Nowhere.
    Null,
    /// A Unix socket that the worker listens on.
    Unix(#[serde(with = "path_bytes")] PathBuf),
    /// One descriptor beside the message: a connected socket.
    Passed,
    /// Two descriptors beside the message: the supervisor's standard input and output.
    Terminal,
}

/// Paths as they are: serde knows them as text, which a path need not be.
pub(crate) mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Vec::deserialize(from).map(|bytes| OsString::from_vec(bytes).into())
    }
}

/// From a worker to its supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// A fork has made its machine and waits for [`ToWorker::Start`].
    Warm,
    /// The guest runs; how long each stage took, in order.
    Started {
        /// When the worker's own code began, on the monotonic clock.
        began: Duration,
        /// Name and duration of each stage.
        stages: Vec<(String, Duration)>,
        /// How template pages are read (`pando_pager::IoPath`), or `none` without a pager.
        io: String,
        /// Where each backend's memory lies in the worker.
        places: Vec<MemoryPlace>,
    },
    /// What was recorded since the last time.
    Metrics(Delta),
    /// A part of what a recorded clone touched; all parts come before the last message.
    Touched(TracePiece),
    /// What bringing pages ahead of a recorded clone was good for.
    Judged(Judgement),
    /// It gave memory back since the last time it said so.
    GaveBack {
        /// How much.
        bytes: u64,
        /// How often its guest was paused for that.
        pauses: u64,
    },
    /// The last message: how the machine ended.
    Ended(Ending),
}

/// The monotonic clock, which all processes of a host share.
pub fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Neither field is ever negative: the clock starts at zero when the host does.
    let nanoseconds = u32::try_from(now.tv_nsec).unwrap_or_default();
    Duration::new(now.tv_sec.unsigned_abs(), nanoseconds)
}

/// How a clone ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// It was told to stop.
    Stopped,
    /// It failed, with the exit code of the process and the chain of causes.
    Failed {
        /// Exit code.
        code: u8,
        /// What happened.
        message: String,
    },
}

impl Ending {
    /// Exit code of the process that ended so.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Reset | Self::Stopped => 0,
            Self::Failed { code, .. } => *code,
        }
    }

    /// One or two words for a table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::Stopped => "stopped",
            Self::Failed { .. } => "failed",
        }
    }
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

    /// Sends a message, with descriptors beside it. Blocks while the other end has too much unread.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        bytes = postcard::to_extend(message, bytes).map_err(|error| ControlError::Damaged {
            reason: error.to_string(),
        })?;
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
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(
                &self.0,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )
        })
        .map(|_| ())
        .map_err(socket_error("write to"))
    }

    /// Receives the next message and its descriptors; `None` when the other end is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let slices = &mut [IoSliceMut::new(&mut buffer)];
            match rustix::net::recvmsg(&self.0, slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => (),
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                other => break other.map_err(socket_error("read from"))?,
            }
        };
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(ControlError::TooLong {
                bytes: received.bytes,
            });
        }
        decode(&buffer[..received.bytes]).map(|message| Some((message, descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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

fn socket_error(action: &'static str) -> impl FnOnce(rustix::io::Errno) -> ControlError {
    move |errno| ControlError::Socket {
        action,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::ffi::OsStringExt;

    fn config() -> WorkerConfig {
        WorkerConfig {
            clone: 7,
            template: std::ffi::OsString::from_vec(b"t\xff".to_vec()).into(),
            engine: Engine::Copy,
            serial: Serial::Passed,
            pager: PagerConfig::default(),
            host_check_is_due: true,
            supervisor_pid: 1,
            verbosity: 2,
            record: Some(Record::Beginning(Duration::from_secs(1))),
        }
    }

    #[test]
    fn messages_and_descriptors_arrive_whole_and_in_order() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let (mut end, passed) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.send(&ToWorker::Start(config()), &[passed.as_fd()])
            .unwrap();
        ours.send(&ToWorker::Stop, &[]).unwrap();
        let (message, mut descriptors) = theirs.receive::<ToWorker>().unwrap().unwrap();
        assert_eq!(message, ToWorker::Start(config()));
        let mut received = std::os::unix::net::UnixStream::from(descriptors.remove(0));
        received.write_all(b"x").unwrap();
        end.read_exact(&mut [0]).unwrap();
        assert_eq!(
            theirs.receive::<ToWorker>().unwrap().unwrap().0,
            ToWorker::Stop
        );
        drop(ours);
        assert!(theirs.receive::<ToWorker>().unwrap().is_none());
    }

    #[test]
    fn every_ending_arrives() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let failed = Ending::Failed {
            code: 5,
            message: "why".into(),
        };
        for ending in [Ending::PowerOff, Ending::Reset, Ending::Stopped, failed] {
            ours.send(&FromWorker::Ended(ending.clone()), &[]).unwrap();
            let (message, _) = theirs.receive::<FromWorker>().unwrap().unwrap();
            assert_eq!(message, FromWorker::Ended(ending));
        }
    }

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
        let mut bytes = 7_u32.to_le_bytes().to_vec();
        bytes.push(1);
        let error = decode::<ToWorker>(&bytes).unwrap_err().to_string();
        assert!(
            error.contains(&format!("version 7, this end speaks {VERSION}")),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode::<FromWorker>(&bytes);
            let _ = decode::<ToWorker>(&bytes);
        }
    }
}
