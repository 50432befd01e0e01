#![forbid(unsafe_code)]
//! What a supervisor and its workers say to each other: typed messages on a seqpacket socket, each
//! with a version and a bound, descriptors beside the first.

use std::path::PathBuf;
use std::time::Duration;

use pando_pager::{IoMode, Verify};
use serde::{Deserialize, Serialize};

use super::Engine;
pub use super::channel::{Channel, ControlError, MAX_MESSAGE_BYTES, Received};
use super::consoles::ConsoleOrders;
use super::give_back::policy::Policy;
use super::learn::Learn;
use super::marks::DocumentPlan;
use super::nets::NetPlan;
use super::record::{Record, TracePiece};
use super::vsock::VsockOrders;
use crate::observe::memory::ram::MemoryPlace;
use crate::observe::metrics::Judged;
use crate::observe::relay::Delta;
use crate::root::faults::RawRangeFaults;

/// Most bytes of a delta of metrics in one message, which has a few of its own.
pub const MAX_DELTA_BYTES: usize = MAX_MESSAGE_BYTES - 64;

/// From the supervisor to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first message: what to run. Descriptors that [`Serial`] names come with it.
    Start(Box<WorkerConfig>),
    /// Stop the machine and end.
    Stop,
    /// The answer to [`FromWorker::Forget`].
    Forgotten {
        /// Which order this answers: one that was given up may be answered late.
        order: u64,
        /// Whether the pager process brings the pages again; else they must stay.
        is_done: bool,
    },
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
    /// Where its vsock device is reached, if it has one.
    pub vsock: VsockOrders,
    /// Where the ports of its consoles are reached, if it has some.
    pub consoles: ConsoleOrders,
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
    /// Where the cables of its network devices end.
    pub nets: Vec<NetPlan>,
    /// What else its document has, if it has one.
    pub documents: Vec<DocumentPlan>,
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
    /// Where it runs.
    pub place: PagerPlace,
    /// Whether memory that a balloon or the like discards goes back to the host and reads as zero.
    pub discard_to_zero: bool,
    /// How much of its memory each clone's guest is asked to give away.
    pub inflate_bytes: Option<u64>,
}

/// Where the pager of a clone runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PagerPlace {
    /// As a thread of the clone's process.
    #[default]
    Own,
    /// In one process for all clones of a supervisor.
    Shared,
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
            place: PagerPlace::Own,
            discard_to_zero: false,
            inflate_bytes: None,
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

impl From<Io> for IoMode {
    fn from(io: Io) -> Self {
        match io {
            Io::Auto => Self::Auto,
            Io::Uring => Self::Uring,
            Io::Pread => Self::Pread,
        }
    }
}

impl PagerConfig {
    /// Whether chunks are compared, as a pager takes it.
    pub fn verify(&self) -> Verify {
        if self.verify {
            Verify::OnRead
        } else {
            Verify::Off
        }
    }
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

/// What a worker says of how pages are read that the pager process reads.
pub const IO_SHARED: &str = "shared";

/// Memory that a pager elsewhere is to serve, as a clone says; not proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientMemory {
    /// What lies where.
    pub regions: Vec<RawRegion>,
    /// The CPU that its one vCPU is kept on while pages come in.
    pub cpu: Option<u32>,
    /// Whether pages are to be installed so that the kernel knows which were written.
    pub track_writes: bool,
    /// Whether a map of discarded pages comes with it.
    pub discards: bool,
}

/// A run of pages of an image in the address space of a client, as the client says; not proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRegion {
    /// Which image, counted from 0.
    pub image: u32,
    /// Address of the first page.
    pub address: u64,
    /// Which page of the image lies there.
    pub first_page: u64,
    /// How many pages lie there, one after the other.
    pub pages: u64,
}

/// Pages of an image; not proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRun {
    /// Which image.
    pub image: u32,
    /// The first page.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
}

/// Every stage of a start that a worker may say: they are labels of metrics.
pub const STAGES: [&str; 12] = [
    "orders",
    "template",
    "memory",
    "devices",
    "vm",
    "slots+irqchip",
    "load",
    "vcpus",
    "state",
    "threads",
    "identity",
    "resume",
];

/// From a worker to its supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// Where its memory is, for the pager process to serve; its userfaultfd comes beside this. At
    /// most once, before anything can have touched the memory.
    Memory(ClientMemory),
    /// A fork has made its machine and waits for [`ToWorker::Start`].
    Warm,
    /// The guest runs; how long each stage took, in order. At most once.
    Started {
        /// When the worker's own code began, on the monotonic clock.
        began: Duration,
        /// Name and duration of each stage, each of [`STAGES`] at most once.
        stages: Vec<(String, Duration)>,
        /// How template pages are read (`pando_pager::IoPath`), [`IO_SHARED`] where the pager process
        /// knows, or `none` without a pager.
        io: String,
        /// Where each backend's memory lies in the worker.
        places: Vec<MemoryPlace>,
    },
    /// What was recorded since the last time.
    Metrics(Delta),
    /// Faults of a fork in holes of its root since the last time, by its own pager; not proven.
    HoleFaults(Vec<RawRangeFaults>),
    /// A part of what a recorded clone touched; all parts come before the last message.
    Touched(TracePiece),
    /// What bringing pages ahead of a recorded clone was good for.
    Judged(Judged),
    /// Have the pager process bring these pages again when they are touched the next time. The guest
    /// stands until [`ToWorker::Forgotten`] comes.
    Forget {
        /// Its number, which the answer has too.
        order: u64,
        /// Which pages.
        runs: Vec<RawRun>,
    },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::MacAddress;
    use crate::template::limits_entry::{LimitsEntry, RateEntry};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::ffi::OsStringExt;

    fn config() -> WorkerConfig {
        WorkerConfig {
            clone: 7,
            template: std::ffi::OsString::from_vec(b"t\xff".to_vec()).into(),
            engine: Engine::Copy,
            serial: Serial::Passed,
            vsock: VsockOrders::default(),
            consoles: ConsoleOrders::default(),
            pager: PagerConfig::default(),
            host_check_is_due: true,
            supervisor_pid: 1,
            verbosity: 2,
            record: Some(Record::Beginning(Duration::from_secs(1))),
            nets: vec![NetPlan {
                id: "net0".into(),
                tap: "pando7".into(),
                netns: None,
                mac: Some(MacAddress::DEFAULT),
                limits: Some(LimitsEntry {
                    bytes: None,
                    requests: Some(RateEntry {
                        per_second: 7,
                        burst: 1,
                    }),
                }),
                plug: false,
            }],
            documents: vec![DocumentPlan {
                name: "opt/key".into(),
                path: "k".into(),
            }],
        }
    }

    #[test]
    fn messages_and_descriptors_arrive_whole_and_in_order() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let (mut end, passed) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.send(&ToWorker::Start(Box::new(config())), &[passed.as_fd()])
            .unwrap();
        ours.send(&ToWorker::Stop, &[]).unwrap();
        let (message, mut descriptors) = theirs.receive::<ToWorker>().unwrap().unwrap();
        assert_eq!(message, ToWorker::Start(Box::new(config())));
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
}
