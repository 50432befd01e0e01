#![forbid(unsafe_code)]
//! A guest with a console device: control messages byte for byte, and room for what comes.

use std::path::Path;

use super::driver::{ADDRESS, EVENT_INDEX, VERSION_1};
use super::rings::Rings;
use crate::device::virtio::console::backend::{ConsoleConnection, ConsolePort, PortEnd};
use crate::device::virtio::console::device::Console;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::spec::{ConsoleParts, PortParts, PortTarget};

pub(super) const CONTROL_RX: usize = 2;
pub(super) const CONTROL_TX: usize = 3;
/// Port 0, a console; ports 1 and 2, of which 1 has a name.
pub(super) const QUEUES: usize = 8;
pub(super) const MULTIPORT: u64 = 1 << 1;
pub(super) const DEVICE_READY: u16 = 0;
pub(super) const DEVICE_ADD: u16 = 1;
pub(super) const PORT_READY: u16 = 3;
pub(super) const CONSOLE_PORT: u16 = 4;
pub(super) const PORT_OPEN: u16 = 6;
pub(super) const PORT_NAME: u16 = 7;
pub(super) const NAME: &str = "org.aspen.agent";

const BUFFERS: u64 = 0x4_0000;
const BUFFER_BYTES: u32 = 256;
/// Where what the guest sends is.
pub(super) const TX_BUFFER: u64 = 0x8_0000;

/// The queue that brings a port's data to the guest.
pub(super) fn rx(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

/// The queue of what the guest sends.
pub(super) fn tx(port: usize) -> usize {
    rx(port) + 1
}

pub(super) fn parts() -> ConsoleParts {
    let port = |number, name: Option<&str>| PortParts {
        number: Some(number),
        name: name.map(str::to_owned),
        is_console: number == 0,
        target: PortTarget::Null,
    };
    ConsoleParts {
        ports: vec![port(0, None), port(1, Some(NAME)), port(2, None)],
    }
}

/// A device whose ports lead to sockets `dir/0` to `dir/2`.
pub(super) fn device(dir: &Path) -> Box<Console> {
    let sockets = (0..3).map(|number: u8| {
        let target = PortTarget::Socket(dir.join(number.to_string()));
        (number, PortEnd::open(&target).unwrap())
    });
    with_ends(sockets.collect())
}

pub(super) fn with_ends(ends: Vec<(u8, PortEnd)>) -> Box<Console> {
    let place = ConsolePort::default();
    place.put(ConsoleConnection { ends });
    Box::new(Console::new(&parts(), place))
}

pub(super) struct Guest {
    pub(super) rings: Rings,
}

impl Guest {
    /// A guest whose driver is complete and has said so, with room for everything.
    pub(super) fn new(device: Box<Console>) -> Self {
        let mut guest = Self {
            rings: Rings::new(device, QUEUES),
        };
        guest.rings.driver.device.worker().resume();
        guest.set_up();
        guest.control(0, DEVICE_READY, 1);
        guest
    }

    pub(super) fn set_up(&mut self) {
        let features = VERSION_1 | MULTIPORT | EVENT_INDEX;
        assert_eq!(self.rings.set_up(features), 0xf);
        self.give_all_room();
    }

    /// A guest that has heard of all ports and has each of them open.
    pub(super) fn open(device: Box<Console>) -> Self {
        let mut guest = Self::new(device);
        for port in 0..3 {
            assert_eq!(guest.hear(), (port, DEVICE_ADD, 1, String::new()));
            guest.control(port, PORT_READY, 1);
            guest.control(port, PORT_OPEN, 1);
        }
        assert_eq!(guest.hear(), (0, CONSOLE_PORT, 1, String::new()));
        assert_eq!(guest.hear(), (1, PORT_NAME, 1, NAME.to_owned()));
        guest
    }

    /// Goes on in another device, whose guest was paused and saved.
    pub(super) fn moved(self, device: Box<Console>) -> Self {
        let mut state = self.rings.driver.device.save();
        state.id = "dev0".to_owned();
        let mut next = VirtioPci::new("dev0", 1, ADDRESS, device);
        next.restore(&state).unwrap();
        let rings = self.rings.continued(next);
        rings.driver.device.worker().resume();
        Self { rings }
    }

    pub(super) fn give_all_room(&mut self) {
        for queue in (0..QUEUES).step_by(2) {
            for buffer in 0..4 {
                self.give_room(queue, buffer);
            }
            self.rings.kick(queue);
        }
    }

    fn place(queue: usize, buffer: u16) -> u64 {
        BUFFERS + queue as u64 * 0x1000 + u64::from(buffer) * u64::from(BUFFER_BYTES)
    }

    fn give_room(&mut self, queue: usize, buffer: u16) {
        let piece = (Self::place(queue, buffer), BUFFER_BYTES, true);
        self.rings.offer(queue, &[piece]);
    }

    /// Sends a control message, and waits until it was taken.
    pub(super) fn control(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.send_to(CONTROL_TX, &message);
        self.rings.wait(CONTROL_TX);
    }

    /// Offers bytes in a queue.
    pub(super) fn send_to(&mut self, queue: usize, bytes: &[u8]) {
        let at = TX_BUFFER + queue as u64 * 0x1_0000;
        self.rings.driver.ram.write(at, bytes).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        self.rings.offer(queue, &[(at, length, false)]);
        self.rings.kick(queue);
    }

    /// Sends bytes to a port, and waits until they were taken.
    pub(super) fn send(&mut self, port: usize, bytes: &[u8]) {
        self.send_to(tx(port), bytes);
        self.rings.wait(tx(port));
    }

    /// What came in a queue, whose room is given again.
    fn take(&mut self, queue: usize, (head, length): (u16, u32)) -> Vec<u8> {
        let buffer = head % 4;
        let mut bytes = vec![0; length as usize];
        let at = Self::place(queue, buffer);
        self.rings.driver.ram.read(at, &mut bytes).unwrap();
        self.give_room(queue, buffer);
        self.rings.kick(queue);
        bytes
    }

    /// The next control message: port, event, value, and the name behind it.
    pub(super) fn hear(&mut self) -> (u32, u16, u16, String) {
        let used = self.rings.wait(CONTROL_RX);
        let bytes = self.take(CONTROL_RX, used);
        message(&bytes)
    }

    /// The next data of a port.
    pub(super) fn receive(&mut self, port: usize) -> Vec<u8> {
        let used = self.rings.wait(rx(port));
        self.take(rx(port), used)
    }

    /// Lets the device do all that it can do by itself.
    pub(super) fn settle(&self) {
        self.rings.driver.device.worker().pause();
        self.rings.driver.device.worker().resume();
    }

    /// Whether nothing came in a queue when the device has done all that it can do by itself.
    pub(super) fn is_silent(&mut self, queue: usize) -> bool {
        for _ in 0..3 {
            self.settle();
        }
        self.rings.next(queue).is_none()
    }
}

fn message(bytes: &[u8]) -> (u32, u16, u16, String) {
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let port = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    let name = String::from_utf8(bytes[8..].to_vec()).unwrap();
    (port, u16_at(4), u16_at(6), name)
}
