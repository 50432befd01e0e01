#![forbid(unsafe_code)]
//! One pager process for all clones of a supervisor, and for the clients of other VMMs.
//!
//! ```text
//! supervisor                              pager-worker: a shard (thread, ring) per CPU     clone
//!   Start, Image + [RAM file, index] --->                                  maps, registers its memory
//!   <------------------------- Ready                                                        |
//!   <------------------------------------------------------- Memory + [userfaultfd] --------+
//!   keeps a descriptor                                                       goes on at once;
//!   Attach + [userfaultfd, pidfd] ------> proves, serves                 what touches a missing
//!   <---------- Attached | Refused                                       page sleeps until then
//!   <--- Poisoned, Gone, Metrics
//! ```
//! A clone has no way to reach the pager but its own userfaultfd. A pager that dies leaves its
//! clients asleep at their next missing page, nothing is lost with it: the supervisor starts
//! another and attaches everybody again.

pub mod descriptor;
pub mod hub;
mod outlet;
pub mod peer;
pub mod process;
pub mod protocol;
mod registry;
pub mod serve;
pub mod worker;
