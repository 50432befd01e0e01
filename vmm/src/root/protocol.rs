#![forbid(unsafe_code)]
//! What a supervisor and a root process say to each other, over `clone::control::Channel`.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clone::control::{PagerConfig, path_bytes};

/// From the supervisor to a root.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToRoot {
    /// The first message: what to be a root of.
    Start(RootConfig),
    /// Make a clone; its end of the control socket comes beside this, and behind that the directory
    /// of the cgroup in which it is to begin, if it is to have one.
    Fork {
        /// What the supervisor calls the new process.
        id: u64,
        /// Whether its orders are on their way, and not for later.
        is_wanted: bool,
    },
    /// All that clones asked pagers for so far; to be answered with [`FromRoot::Filled`].
    HoleFaults(Vec<RangeFaults>),
}

/// Pages of one range that clones asked their pagers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeFaults {
    /// Which backend, in the template's order.
    pub backend: u32,
    /// Which range of 2 MiB of it, from 0.
    pub unit: u64,
    /// How many, of all clones together.
    pub faults: u64,
}

/// What a root is to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RootConfig {
    /// The template's directory.
    #[serde(with = "path_bytes")]
    pub template: PathBuf,
    /// Most bytes of guest memory that it fills.
    pub budget_bytes: u64,
    /// How its clones' pagers work, where they need one.
    pub pager: PagerConfig,
    /// Whether each clone must compare the host with the template, because nobody did.
    pub host_check_is_due: bool,
    /// The process that must be its parent, lest it outlive it unseen.
    pub supervisor_pid: u32,
    /// How much it logs, as `observe::log::start` takes it.
    pub verbosity: u8,
}

/// From a root to its supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromRoot {
    /// It can fork.
    Ready {
        /// Pages of each backend, in the template's order.
        backend_pages: Vec<u64>,
        /// Bytes of guest memory that it holds for all its clones.
        filled_bytes: u64,
        /// Bytes of ranges with data that it does not hold.
        hole_bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// It is on its way to be ready.
    Filling {
        /// Bytes of guest memory that it holds.
        filled_bytes: u64,
    },
    /// What it was told of holes is done.
    Filled {
        /// Bytes of guest memory that it holds for all clones to come.
        filled_bytes: u64,
        /// Bytes of ranges with data that it does not hold.
        hole_bytes: u64,
        /// Holes that it filled for that.
        promoted_ranges: u64,
    },
    /// A process was made; its pidfd comes beside this.
    Forked {
        /// As it was called in the order.
        id: u64,
        /// Its process number.
        pid: u32,
    },
    /// A process could not be made.
    NotForked {
        /// As it was called in the order.
        id: u64,
        /// Why.
        message: String,
    },
    /// The last message: it cannot be a root.
    Failed {
        /// Exit code of the program for it.
        code: u8,
        /// The chain of causes.
        message: String,
    },
}
