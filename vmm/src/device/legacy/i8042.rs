#![forbid(unsafe_code)]
//! The keyboard controller, of which only the reset command exists.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

use crate::device::bus::{DeviceEvent, PioDevice};

/// One port of the keyboard controller: it never has data, is always ready for a command, and knows
/// one: pulse the reset line (`0xfe`). Between its two ports is one that is not its own.
///
/// It has no state to save.
#[derive(Debug)]
pub struct I8042 {
    controller: I8042Device<ResetLine>,
    register: u8,
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
    /// At [`I8042_DATA_PORTS`](crate::arch::x86_64::ports::I8042_DATA_PORTS).
    #[must_use]
    pub fn data() -> Self {
        Self::register(0)
    }

    /// At [`I8042_COMMAND_PORTS`](crate::arch::x86_64::ports::I8042_COMMAND_PORTS).
    #[must_use]
    pub fn command() -> Self {
        Self::register(4)
    }

    fn register(register: u8) -> Self {
        Self {
            controller: I8042Device::new(ResetLine::default()),
            register,
        }
    }
}

impl PioDevice for I8042 {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        for byte in data {
            *byte = self.controller.read(self.register);
        }
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> DeviceEvent {
        for &byte in data {
            let Ok(()) = self.controller.write(self.register, byte);
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
        assert_eq!(I8042::data().write(0, &[0xfe]), DeviceEvent::None);
        let mut device = I8042::command();
        assert_eq!(device.write(0, &[0xd1]), DeviceEvent::None);
        assert_eq!(device.write(0, &[0xfe]), DeviceEvent::Reset);
        assert_eq!(device.write(0, &[0xff]), DeviceEvent::None);
        let mut data = [0xff];
        device.read(0, &mut data);
        assert_eq!(data, [0], "status says ready and empty");
    }
}
