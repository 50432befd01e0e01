#![forbid(unsafe_code)]
//! Clients of a shared pager: who they are, what they ask for, what is told of them.

mod check;
mod spec;

pub use check::{SpecError, check_regions};
pub use spec::{
    ClientId, ClientRegion, ClientSpec, ImageId, ImageRun, MAX_FORGOTTEN_PAGES, MAX_REGIONS,
};

use crate::ahead::Ahead;
use crate::health::PoisonedPage;
use crate::port::IoPath;
use crate::working_set::Trace;

/// A client that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Who.
    pub client: ClientId,
    /// Which shard serves it.
    pub shard: usize,
    /// Which way messages and bytes take there.
    pub io: IoPath,
}

/// What a shared pager tells, on the thread of the shard it concerns. Whoever listens must neither
/// touch served memory nor wait for anything: it delays every fault of the shard.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientEvent {
    /// A page cannot be had. Told *before* whoever waits for it is woken. Where the kernel has no
    /// UFFDIO_POISON nobody is woken: end the client.
    Poisoned {
        /// Whose page.
        client: ClientId,
        /// Which, and why.
        page: PoisonedPage,
    },
    /// The client's process or memory is gone; it is forgotten, and its id free.
    Gone {
        /// Who.
        client: ClientId,
    },
    /// What a recorded client touched, told once, when it is detached or gone. The images of the
    /// touches are numbers of [`ImageId`].
    Touched {
        /// Who.
        client: ClientId,
        /// Its touches in order.
        trace: Trace,
    },
    /// Everything of the plan that the client was attached with was tried.
    AheadDone {
        /// Who.
        client: ClientId,
        /// What came of it.
        ahead: Ahead,
    },
    /// A shard ended by itself. Its clients sleep at their next fault until they are attached
    /// elsewhere: nothing missing was made zero.
    ShardFailed {
        /// Which shard.
        shard: usize,
        /// Why.
        reason: String,
    },
}
