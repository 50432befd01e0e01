#![forbid(unsafe_code)]
//! The ACPI registers by which a guest powers off and resets the machine.

use crate::arch::x86_64::ports::{
    POWER_PORTS, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
};
use crate::device::bus::{DeviceEvent, PioDevice};

/// `SLP_EN` of the sleep control register (ACPI 6.5, 4.8.3.7): enter the state in `SLP_TYP`.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Lowest bit of `SLP_TYP`, which has three.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// Sleep control, sleep status and reset register of hardware-reduced ACPI, at
/// [`POWER_PORTS`].
///
/// It has no state to save: the sleep types below S5 do not exist.
#[derive(Debug, Default)]
pub struct Power;

impl Power {
    /// The registers.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl PioDevice for Power {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        for (port, byte) in (POWER_PORTS.start + offset..).zip(data) {
            if port == SLEEP_CONTROL_PORT || port == SLEEP_STATUS_PORT {
                *byte = 0;
            }
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> DeviceEvent {
        for (port, &byte) in (POWER_PORTS.start + offset..).zip(data) {
            let sleep_type = byte >> SLEEP_TYPE_SHIFT & 0b111;
            if port == SLEEP_CONTROL_PORT && byte & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5
            {
                return DeviceEvent::PowerOff;
            }
            if port == RESET_PORT && byte == RESET_VALUE {
                return DeviceEvent::Reset;
            }
        }
        DeviceEvent::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_needs_the_enable_bit_and_its_type() {
        let mut power = Power::new();
        assert_eq!(power.write(0, &[5 << 2]), DeviceEvent::None);
        assert_eq!(power.write(0, &[3 << 2 | 1 << 5]), DeviceEvent::None);
        assert_eq!(power.write(0, &[5 << 2 | 1 << 5]), DeviceEvent::PowerOff);
        assert_eq!(power.write(1, &[0x80]), DeviceEvent::None, "wake status");
    }

    #[test]
    fn reset_needs_its_value() {
        let mut power = Power::new();
        assert_eq!(power.write(2, &[0]), DeviceEvent::None);
        assert_eq!(power.write(2, &[1]), DeviceEvent::Reset);
        assert_eq!(power.write(0, &[0, 0, 1]), DeviceEvent::Reset);
    }

    #[test]
    fn status_says_that_nothing_sleeps() {
        let mut data = [0xff; 3];
        Power::new().read(0, &mut data);
        assert_eq!(data, [0, 0, 0xff]);
    }
}
