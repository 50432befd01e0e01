#![forbid(unsafe_code)]
//! The keyboard controller, of which only the reset command exists.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

use crate::device::bus::{DeviceEvent, PioDevice};

/// Keyboard controller at [`I8042_PORTS`](crate::arch::x86_64::ports::I8042_PORTS): it never has
/// data, is always ready for a command, and knows one: pulse the reset line (`0xfe`).
///
/// It has no state to save.
#[derive(Debug)]
pub struct I8042 {
    controller: I8042Device<ResetLine>,
}

/// Remembers that the controller pulled the reset line.
#[derive(Debug, Clone, Default)]
struct ResetLine(Arc<AtomicBool>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl I8042 {
    /// A controller.
    #[must_use]
    pub fn new() -> Self {
        Self {
            controller: I8042Device::new(ResetLine::default()),
        }
    }
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl PioDevice for I8042 {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |r| self.controller.read(r));
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        for (register, &byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                let Ok(()) = self.controller.write(register, byte);
            }
        }
        if self.controller.reset_evt().0.swap(false, Ordering::Relaxed) {
            DeviceEvent::Reset
        } else {
            DeviceEvent::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_at_the_command_port_resets() {
        let mut device = I8042::new();
        assert_eq!(device.write(0, &[0xfe]), DeviceEvent::None);
        assert_eq!(device.write(4, &[0xd1]), DeviceEvent::None);
        assert_eq!(device.write(4, &[0xfe]), DeviceEvent::Reset);
        assert_eq!(device.write(4, &[0xff]), DeviceEvent::None);
    }

    #[test]
    fn wide_accesses_reach_the_ports_that_they_cover() {
        let mut device = I8042::new();
        let mut data = [0xff; 4];
        device.read(1, &mut data);
        assert_eq!(data, [0; 4], "status says ready and empty");
        assert_eq!(device.write(1, &[0, 0, 0, 0xfe]), DeviceEvent::Reset);
    }
}
