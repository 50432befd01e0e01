#![forbid(unsafe_code)]
//! The root process of a template: memory that its clones share, and the forks that they are.
//!
//! ```text
//! supervisor                       root (one thread, no ring, no VM)          clone
//!   Start ------------------------>  maps and fills memory
//!   <---- Ready -------------------
//!   Fork, control socket --------->  clone(2), CLONE_PARENT ----------------> registers its holes
//!   <---- Forked, pidfd -----------                                           makes its VM
//!   <------------------------------------------------- Memory, uffd --------- (if a pager process
//!                                                                              is to serve them)
//! ```
//! A clone is a child of the supervisor, not of the root: it outlives the root, and its end is the
//! supervisor's to see. Both end with the supervisor.

pub mod faults;
pub mod process;
pub mod protocol;
pub mod worker;
