#![forbid(unsafe_code)]
//! Devices in another process (vhost-user): the guest sets one up here, and the process works on its rings
//! in guest memory, which it maps.
//!
//! [`session`] is the conversation with the process, [`device`] what the guest sees. The process is not
//! trusted to answer, nor to tell the truth: every wait has a limit, and a process that breaks the protocol,
//! or goes away, leaves a device that is broken until the guest resets it. What it does to guest memory
//! nobody can check: it was given all of it.

pub mod device;
pub mod error;
mod handshake;
mod rings;
mod session;
pub mod state;
