#![forbid(unsafe_code)]
//! A whole machine: made ([`build`]), held by its callers ([`lifecycle`]), driven by one thread
//! ([`driver`]) whose policy is [`request`], and saved ([`state`]).
//!
//! It takes RAM and a description and knows neither templates nor clones.

mod build;
mod connections;
mod devices;
mod driver;
mod error;
mod lifecycle;
mod pci;
mod records;
mod request;
mod stages;
pub mod state;
mod timer;

pub use crate::vcpu::run::Failure;
pub use build::{HostCheck, prepare_for_forks};
pub use connections::{Connections, open_taps, scratch_folder};
pub use error::MachineError;
pub use lifecycle::{Machine, MachineHandle, Outcome, Paused, Running};
pub use request::{Phase, Refusal, Request, Verdict, decide};
pub use stages::Stages;
pub use state::MachineState;
