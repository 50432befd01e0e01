#![forbid(unsafe_code)]
//! One pager for many clients of many images.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::budget::Budget;
use crate::client::{Attached, ClientEvent, ClientId, ClientSpec, ForgottenRun, ImageId};
use crate::counts::Counts;
use crate::error::PagerError;
use crate::image::Image;
use crate::options::{IoMode, Verify};
use crate::port::IoPath;
use crate::source::PageSource;
use crate::working_set::Trace;

/// Puts something around the source of each shard: to delay or fail reads in tests.
pub type Decorate = Arc<dyn Fn(Box<dyn PageSource>) -> Box<dyn PageSource> + Send + Sync>;

/// Who listens to what a shared pager tells.
pub type Listener = Arc<dyn Fn(ClientEvent) + Send + Sync>;

/// How a shared pager is to work.
#[derive(Clone)]
pub struct SharedOptions {
    /// How to read.
    pub io: IoMode,
    /// Whether to verify.
    pub verify: Verify,
    /// How long a fault may wait before its page is poisoned.
    pub fault_deadline: Duration,
    /// What each shard may use.
    pub budget: Budget,
    /// One shard for each: a thread, pinned to the CPU if one is given. At least one.
    pub shards: Vec<Option<usize>>,
    /// How long a shard looks for the next fault before it sleeps; see `PagerOptions::spin`.
    pub spin: Duration,
    /// Around the source of each shard.
    pub decorate: Option<Decorate>,
}

impl fmt::Debug for SharedOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedOptions")
            .field("io", &self.io)
            .field("verify", &self.verify)
            .field("fault_deadline", &self.fault_deadline)
            .field("budget", &self.budget)
            .field("shards", &self.shards)
            .field("spin", &self.spin)
            .finish_non_exhaustive()
    }
}

impl Default for SharedOptions {
    fn default() -> Self {
        Self {
            io: IoMode::default(),
            verify: Verify::default(),
            fault_deadline: Duration::from_secs(10),
            budget: Budget::shared(),
            shards: vec![None],
            spin: Duration::ZERO,
            decorate: None,
        }
    }
}

/// A pager whose clients live in any process: shards of one thread and one ring each. Dropping it
/// ends it at once; faults that are not answered then stay in the kernel, or wait for a wake-up
/// from the pager that the client is attached to next.
#[derive(Debug)]
pub struct SharedPager {
    io: IoPath,
}

impl SharedPager {
    /// Starts the shards; they wait for clients when this returns.
    pub fn start(options: &SharedOptions, _events: Listener) -> Result<Self, PagerError> {
        Err(PagerError::Failed {
            reason: format!("cannot serve {} shards", options.shards.len()),
        })
    }

    /// Gives it an image. `template` is the label of its metrics.
    pub fn add_image(&self, _image: Image, _template: &str) -> Result<ImageId, PagerError> {
        Err(self.ended())
    }

    /// Serves a client; it is served when this returns. Everything in `spec` is proven first.
    pub fn attach(&self, id: ClientId, _spec: ClientSpec) -> Result<Attached, PagerError> {
        let reason = crate::client::SpecError::Unknown;
        Err(PagerError::Client { client: id, reason })
    }

    /// Makes pages of a client absent again: the next touch brings the template's bytes. In force
    /// when it returns. Call it while nothing touches the pages, and discard them then.
    pub fn forget(&self, id: ClientId, _runs: &[ForgottenRun]) -> Result<(), PagerError> {
        let reason = crate::client::SpecError::Unknown;
        Err(PagerError::Client { client: id, reason })
    }

    /// Serves a client no longer; one that is unknown is none. Faults that it raises later sleep.
    pub fn detach(&self, _id: ClientId) {}

    /// What a recorded client touched so far; `None` for one that is not recorded or unknown.
    pub fn trace(&self, _id: ClientId) -> Option<Trace> {
        None
    }

    /// What all shards did so far.
    pub fn counts(&self) -> Counts {
        Counts::default()
    }

    /// How many clients are served.
    pub fn clients(&self) -> usize {
        0
    }

    /// Which way messages and bytes take.
    pub fn io(&self) -> IoPath {
        self.io
    }

    fn ended(&self) -> PagerError {
        PagerError::Failed {
            reason: format!("no shard serves by {}", self.io),
        }
    }
}
