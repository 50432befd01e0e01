//! The pager: serves the pages of a template's memory to clones, on fault.
//!
//! ```text
//!  vCPU touches a page          pager thread                                template file
//!  ------------------>  fault message -> residency -> zero?  ZEROPAGE
//!        sleeps                              |
//!                                            +-> data: queue -> source ---> READ (io_uring)
//!        woken   <----  COPY  <- verify <- buffer <-------------------------'
//!                       POISON <- error, checksum, deadline
//! ```
//! The pager speaks pages of an image, never guest physical addresses. Three things stay apart:
//! where bytes come from ([`source`]), how a page is put in place (`install`, the only errno
//! ladder), and who is waiting (`queue`, `serve`). A clone's memory has no way to write the
//! template: its file is open read-only, and nothing hands it out.
//!
//! Nothing that the pager thread does touches served memory: it would wait for itself.

mod ahead;
mod budget;
mod client;
mod counts;
mod error;
mod fault;
mod handle;
mod health;
pub mod image;
mod install;
mod memory;
pub mod metrics;
mod options;
mod own_memory;
mod page;
mod poller;
mod port;
mod prefetch;
mod probe;
mod promotion;
mod queue;
mod range_faults;
mod record;
mod region;
mod registration;
mod registry;
mod residency;
mod retry;
mod root_memory;
mod serve;
mod shard;
mod shared;
pub mod source;
mod spin;
mod stale;
mod sys;
mod token;
pub mod working_set;

pub use ahead::Ahead;
pub use budget::Budget;
pub use client::{
    Attached, ClientEvent, ClientId, ClientRegion, ClientSpec, ImageId, ImageRun,
    MAX_FORGOTTEN_PAGES, MAX_REGIONS, SpecError, check_regions,
};
pub use counts::Counts;
pub use error::PagerError;
pub use handle::{Idle, Pager, Serving};
pub use health::{Health, PoisonMethod, PoisonReason, PoisonedPage};
pub use image::{Image, ImageError};
pub use memory::CloneMemory;
pub use options::{IoMode, PagerOptions, Verify};
pub use page::{ByteOffset, PAGE_BYTES, PageCount, PageIndex, PageRange};
pub use port::IoPath;
pub use probe::{HostFacts, Refusal, UffdAccess, UffdFacts, UffdFeatures, probe};
pub use range_faults::{FaultCounts, RangeFaults};
pub use registration::Registration;
pub use root_memory::{Filled, Root, RootMemory, RootPlan, RootRange};
pub use shared::{Decorate, Listener, SharedOptions, SharedPager};
