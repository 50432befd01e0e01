#![forbid(unsafe_code)]
//! How a pager is to work.

use std::time::Duration;

use crate::budget::Budget;
use crate::range_faults::FaultCounts;

/// How a pager reads its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoMode {
    /// io_uring, or pread where that is refused.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// io_uring, but as on a kernel whose ring cannot wait for messages of a userfaultfd: it polls
    /// and read(2) takes them. Or an error.
    UringPoll,
    /// pread with a few threads.
    Pread,
}

/// Whether bytes are compared with the index before they are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Each chunk when it is read for the first time.
    #[default]
    OnRead,
    /// Never: the file is known to be good (fs-verity, or checked by the caller).
    Off,
}

/// How a pager is to work.
#[derive(Clone, Debug)]
pub struct PagerOptions {
    /// Value of the `template` label of its metrics.
    pub template: String,
    /// How to read.
    pub io: IoMode,
    /// Whether to verify.
    pub verify: Verify,
    /// How long a fault may wait before its page is poisoned.
    pub fault_deadline: Duration,
    /// What may be used.
    pub budget: Budget,
    /// The CPU to pin the pager thread to: best the one where the faults are raised.
    pub cpu: Option<usize>,
    /// How long at most the pager thread looks for the next fault before it sleeps; how long follows
    /// what its waits turn out to be. Worth it only with a CPU to spare for it: a sleeping thread is
    /// slow to wake on another CPU. Zero: sleep at once, always.
    pub spin: Duration,
    /// Record the clone's first touches, at most so many. Nothing is installed ahead of a walk then:
    /// what was would never be seen to be touched.
    pub record: Option<usize>,
    /// Install pages write-protected where the kernel can (UFFD_FEATURE_WP_ASYNC), so that it knows
    /// which were written: what a clone did not write can be given back (`Pager::forget`). A first
    /// write lifts the protection of its page without a message.
    pub track_writes: bool,
    /// How faults are counted.
    pub fault_counts: FaultCounts,
}

impl Default for PagerOptions {
    fn default() -> Self {
        Self {
            template: "unnamed".to_owned(),
            io: IoMode::default(),
            verify: Verify::default(),
            fault_deadline: Duration::from_secs(10),
            budget: Budget::default(),
            cpu: None,
            spin: Duration::ZERO,
            record: None,
            track_writes: false,
            fault_counts: FaultCounts::default(),
        }
    }
}
