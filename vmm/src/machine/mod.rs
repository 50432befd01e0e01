#![forbid(unsafe_code)]
//! A whole machine: made ([`build`]), held by its callers ([`lifecycle`]), driven by one thread
//! ([`driver`]) whose policy is [`request`], and saved ([`state`]).
//!
//! It takes RAM and a description and knows neither templates nor clones.

mod build;
mod connections;
mod devices;
mod document;
mod driver;
mod error;
mod generation;
mod hotplug;
mod lifecycle;
mod modules;
mod pci;
mod records;
mod request;
mod stages;
pub mod state;
mod timer;

pub use crate::device::virtio::device::MemoryFigures;
pub use crate::vcpu::run::Failure;
pub use build::{HostCheck, prepare_for_forks};
pub use connections::{
    Attachment, Connections, Disks, Marks, open_consoles, open_disks, open_taps, open_vsock,
    open_vsock_of, scratch_folder,
};
pub use document::{
    Document, Role, check_name as check_document_name, check_size as check_document_size,
};
pub use error::MachineError;
pub use generation::GenerationId;
pub use hotplug::{DeviceNews, Function};
pub use lifecycle::{Machine, MachineHandle, Outcome, Paused, Running};
pub use modules::{Module, PlugError};
pub use request::{Phase, Refusal, Request, Verdict, decide};
pub use stages::Stages;
pub use state::MachineState;
