#![forbid(unsafe_code)]
//! Control messages (virtio 1.2, 5.3.6.2): which port, what, and a value; behind one that says a name, the
//! name.

use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;

// Events, which the bindings do not have.
const DEVICE_READY: u8 = 0;
const DEVICE_ADD: u8 = 1;
const PORT_READY: u8 = 3;
const CONSOLE_PORT: u8 = 4;
const PORT_OPEN: u8 = 6;
const PORT_NAME: u8 = 7;

/// Length of a message without a name.
pub(super) const MESSAGE_BYTES: usize = 8;

/// What a message of the guest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// Its driver is complete and wants to hear of ports.
    DeviceReady,
    /// It has a port, and wants to hear what it is.
    PortReady(u32),
    /// A program has a port open, or no more.
    PortOpen(u32, bool),
}

impl Heard {
    /// Reads the message of a request; `None` where it is none that means something here. What is behind it is
    /// not looked at.
    pub(super) fn read(request: &Chain, ram: &GuestRam) -> Option<Self> {
        let mut bytes = [0; MESSAGE_BYTES];
        if request.readable_bytes() < MESSAGE_BYTES as u64 {
            return None;
        }
        request.read(ram, 0, &mut bytes).ok()?;
        let [a, b, c, d, event, 0, e, f] = bytes else {
            return None;
        };
        let (port, value) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        match (event, value) {
            (DEVICE_READY, 1) => Some(Self::DeviceReady),
            // Any other value says that it has no use for it.
            (PORT_READY, 1) => Some(Self::PortReady(port)),
            (PORT_OPEN, _) => Some(Self::PortOpen(port, value != 0)),
            _ => None,
        }
    }
}

/// What the guest is told of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    /// There is such a port.
    Add,
    /// It is a console.
    Console,
    /// What it is called.
    Name,
    /// Somebody on the host has it open, or no more.
    Open(bool),
}

impl Said {
    /// The message, but for a name behind it.
    pub(super) fn to_bytes(self, port: u8) -> [u8; MESSAGE_BYTES] {
        let (event, value) = match self {
            Self::Add => (DEVICE_ADD, 1),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name => (PORT_NAME, 1),
            Self::Open(is_open) => (PORT_OPEN, u8::from(is_open)),
        };
        [port, 0, 0, 0, event, 0, value, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_port_an_event_and_a_value() {
        assert_eq!(Said::Add.to_bytes(3), [3, 0, 0, 0, 1, 0, 1, 0]);
        assert_eq!(Said::Console.to_bytes(0), [0, 0, 0, 0, 4, 0, 1, 0]);
        assert_eq!(Said::Name.to_bytes(1), [1, 0, 0, 0, 7, 0, 1, 0]);
        assert_eq!(Said::Open(true).to_bytes(2), [2, 0, 0, 0, 6, 0, 1, 0]);
        assert_eq!(Said::Open(false).to_bytes(2), [2, 0, 0, 0, 6, 0, 0, 0]);
    }
}
