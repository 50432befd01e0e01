#![forbid(unsafe_code)]
//! The QEMU Monitor Protocol: bytes, messages, commands, and the thread of a monitor.

pub mod arguments;
pub mod commands;
mod device_types;
pub mod devices;
pub mod json;
pub mod message;
pub mod migration;
pub mod objects;
pub mod parameters;
pub mod port;
pub mod schema;
pub mod server;
pub mod types;
