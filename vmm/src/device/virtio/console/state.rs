#![forbid(unsafe_code)]
//! What a console device saves beside registers and queues. Plain integers; not the run-time types.
//! No data is among them: what the guest wrote is with the host or still in its queue.

use serde::{Deserialize, Serialize};

/// A console device, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Its ports, in the order of their numbers.
    pub ports: Vec<SavedPort>,
}

/// A port, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPort {
    /// Its number.
    pub number: u8,
    /// What it is called; nothing where it has no name.
    pub name: String,
    /// Whether it is a console.
    pub is_console: bool,
    /// Whether the guest said that it has it and wants to hear what it is.
    pub is_ready: bool,
    /// Whether a program of the guest has it open.
    pub is_open_in_guest: bool,
    /// Whether the guest was told last that the host has it open.
    pub is_told_open: bool,
    /// What the guest is to hear, and has given no room for: bits 0 to 2 for that there is such a port,
    /// that it is a console, and its name.
    pub owed: u8,
}
