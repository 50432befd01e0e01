#![forbid(unsafe_code)]
//! What the legacy devices save. Plain integers; not the run-time types.

use serde::{Deserialize, Serialize};

/// Kind of a [`SerialState`] record.
pub const SERIAL_KIND: &str = "serial";
/// Version of [`SerialState`].
pub const SERIAL_VERSION: u32 = 1;

/// Registers and receive FIFO of a 16550, version 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes received and not yet read by the guest, oldest first.
    pub receive_fifo: Vec<u8>,
}
