#![forbid(unsafe_code)]
//! Working sets: which pages clones of a template touch, how often, which they write, in about
//! which order. Learned from demand faults alone, never from what was installed ahead. Pure.
//!
//! ```text
//!  clone that records -> Trace -> WorkingSet::merge -> file `working-set` of the template
//!                                      |
//!                                      +-> Plan: what a root gets, what each clone gets ahead
//! ```
//! Clones of one template agree on the *set* of pages and hardly on their sequence, so a set is
//! what is kept; the order is no more than a hint of what to bring first.

mod format;
mod merge;
mod near;
mod plan;
mod probe;
mod run;
mod set;
mod types;
mod within;

pub use format::WorkingSetError;
pub use merge::{MAX_TOUCHES, MergeRules, Merged};
pub use plan::{HUGE_RANGE_PAGES, Plan, PlanRules, PlannedRun};
pub use probe::PROBE_SHARE;
pub use set::{BackendSet, HIT, KnownPage, MAX_PAGES, WorkingSet};
pub use types::{Seen, Sight, Touch, Trace};

#[cfg(test)]
mod tests;
