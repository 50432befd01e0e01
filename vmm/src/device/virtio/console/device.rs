#![forbid(unsafe_code)]
//! The device: bytes of the guest's programs to the host, and of the host to these, by port.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{Timespec, epoll};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::backend::{ConsoleConnection, ConsolePort, HostSide, PortEnd, Sent};
use super::port::Port;
use super::request::{Heard, MESSAGE_BYTES, Said};
use super::state::ConsoleState;
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::inbound::{Inbound, Want};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;
use crate::spec::{ConsoleParts, MAX_CONSOLE_PORTS};

/// The queue of room for control messages.
const CONTROL_RECEIVE: usize = 2;
/// The queue of control messages of the guest.
const CONTROL_TRANSMIT: usize = 3;
/// Most ports.
const MAX_PORTS: usize = MAX_CONSOLE_PORTS as usize;
/// Several ports, and control messages about them.
const MULTIPORT: u64 = 1 << 1;
/// How much is copied at once between guest memory and the host.
const PIECE_BYTES: usize = 64 << 10;
/// Most sockets and programs that are looked at at once: all that there can be.
const EVENTS_AT_ONCE: usize = 2 * MAX_PORTS;
/// Length of the registers: columns, rows, number of ports, emergency write.
const CONFIG_BYTES: usize = 12;
/// Where the number of ports is.
const PORTS_AT: usize = 4;

/// Sizes of the queues of most ports: a pair for each, and one for control.
const QUEUES: &[u16; 2 * MAX_PORTS + 2] = &[64; 2 * MAX_PORTS + 2];
/// By the number of ports, less one.
static TYPES: [DeviceType; MAX_PORTS] = types();

const fn types() -> [DeviceType; MAX_PORTS] {
    let mut types = [DeviceType {
        number: VIRTIO_ID_CONSOLE.to_le_bytes()[0] as u16,
        kind: "virtio-console",
        version: 1,
        // Communication controller: other, as QEMU has it.
        pci_class: 0x07_8000,
        queues: QUEUES,
    }; MAX_PORTS];
    let mut ports = 1;
    while ports < MAX_PORTS {
        types[ports - 1].queues = QUEUES.split_at(2 * ports + 2).0;
        ports += 1;
    }
    types
}

/// A console device.
#[derive(Debug)]
pub struct Console {
    connection: ConsolePort,
    device_type: &'static DeviceType,
    config: [u8; CONFIG_BYTES],
    /// In the order of their numbers.
    ports: Vec<Port>,
    /// Tells of sockets and programs.
    events: Option<Arc<OwnedFd>>,
    /// The guest takes control messages. One that does not has port 0.
    knows_ports: bool,
    /// The guest has heard or said something by which there may be more to do on the host's side.
    is_behind: bool,
    /// The bytes at hand.
    data: Vec<u8>,
}

impl Console {
    /// A device with ports, which have their numbers. It takes what they lead to from its place when the
    /// machine begins.
    pub fn new(parts: &ConsoleParts, connection: ConsolePort) -> Self {
        let mut ports: Vec<Port> = parts.ports.iter().map(Port::new).collect();
        ports.sort_by_key(|port| port.number);
        let last = ports.last().map_or(0, |port| port.number);
        let mut config = [0; CONFIG_BYTES];
        config[PORTS_AT] = last + 1;
        let [.., most] = &TYPES;
        Self {
            connection,
            device_type: TYPES.get(usize::from(last)).unwrap_or(most),
            config,
            ports,
            events: None,
            knows_ports: false,
            is_behind: false,
            data: Vec::new(),
        }
    }

    /// The port of a queue, if there is one.
    fn port_of(&mut self, queue: usize) -> Option<&mut Port> {
        let number = match queue {
            0 | 1 => 0,
            CONTROL_RECEIVE | CONTROL_TRANSMIT => return None,
            _ => queue / 2 - 1,
        };
        self.port(number)
    }

    fn port(&mut self, number: usize) -> Option<&mut Port> {
        let mut ports = self.ports.iter_mut();
        ports.find(|port| usize::from(port.number) == number)
    }

    /// Connects ports to the host.
    fn bind(&mut self, connection: ConsoleConnection) -> io::Result<()> {
        let mut ends = connection.ends;
        self.events = None;
        for port in &mut self.ports {
            let at = ends.iter().position(|(number, _)| *number == port.number);
            let end = at.map_or(PortEnd::Nobody, |at| ends.swap_remove(at).1);
            port.host = HostSide::new(end);
            port.sent_bytes = 0;
        }
        let mut events = None;
        for port in &self.ports {
            let Some(listener) = port.host.listener() else {
                continue;
            };
            let events = match &events {
                Some(events) => events,
                None => events.insert(epoll::create(epoll::CreateFlags::CLOEXEC)?),
            };
            watch(events, listener, listener_of(port.number))?;
        }
        self.events = events.map(Arc::new);
        Ok(())
    }

    /// Takes a control message.
    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::DeviceReady => self.ports.iter_mut().for_each(Port::introduce),
            Heard::PortReady(number) => {
                if let Some(port) = usize::try_from(number).ok().and_then(|n| self.port(n)) {
                    port.describe();
                }
            }
            Heard::PortOpen(number, is_open) => {
                if let Some(port) = usize::try_from(number).ok().and_then(|n| self.port(n)) {
                    port.open_in_guest(is_open);
                }
            }
        }
        self.is_behind = true;
    }

    /// Puts the next control message into a request; how many bytes that are.
    fn tell(&mut self, request: &Chain, ram: &GuestRam) -> u32 {
        let mut ports = self.ports.iter_mut();
        let next = ports.find_map(|port| port.next().map(|said| (port, said)));
        let Some((port, said)) = next else {
            return 0;
        };
        if request.writable_bytes() < MESSAGE_BYTES as u64 {
            // It has no room for a message; the guest gets it back.
            return 0;
        }
        let mut message = said.to_bytes(port.number).to_vec();
        if said == Said::Name {
            message.extend(port.name().bytes());
        }
        let room = usize::try_from(request.writable_bytes()).unwrap_or(usize::MAX);
        message.truncate(room);
        if request.write(ram, 0, &message).is_err() {
            // Memory that the guest has not.
            return 0;
        }
        port.said(said);
        self.is_behind = true;
        u32::try_from(message.len()).unwrap_or_default()
    }

    /// Gives the host what the guest writes to a port, from where it stopped; whether that is all of the
    /// request. What nobody takes is lost.
    fn send(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> bool {
        let mut data = std::mem::take(&mut self.data);
        let is_done = self
            .port_of(queue)
            .is_none_or(|port| send(port, request, ram, &mut data));
        self.data = data;
        is_done
    }

    /// Gives the guest what the host writes to a port; how many bytes that are.
    fn receive(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        let room = usize::try_from(request.writable_bytes()).unwrap_or(usize::MAX);
        let mut data = std::mem::take(&mut self.data);
        data.resize(room.min(PIECE_BYTES), 0);
        let length = match self.port_of(queue) {
            Some(port) if !data.is_empty() => port.host.receive(&mut data),
            _ => 0,
        };
        let bytes = data.get(..length).unwrap_or_default();
        // Memory that the guest has not: it gets what it finds there.
        let is_written = request.write(ram, 0, bytes).is_ok();
        self.data = data;
        let length = if is_written { length } else { 0 };
        u32::try_from(length).unwrap_or_default()
    }
}

/// As [`Console::send`], with a place for bytes.
fn send(port: &mut Port, request: &Chain, ram: &GuestRam, data: &mut Vec<u8>) -> bool {
    loop {
        let left = request.readable_bytes().saturating_sub(port.sent_bytes);
        let length = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        data.resize(length, 0);
        if length == 0 || request.read(ram, port.sent_bytes, data).is_err() {
            // It is all there, or in memory that the guest has not.
            break;
        }
        match port.host.send(data) {
            Sent::Taken(length) => port.sent_bytes += length as u64,
            // A guest's console must not wait for the host: Linux holds a lock meanwhile.
            Sent::Full if !port.is_console => return false,
            Sent::Full | Sent::Lost => break,
        }
    }
    port.sent_bytes = 0;
    true
}

/// What a port's socket is called where events are told.
fn listener_of(number: u8) -> u64 {
    u64::from(number) * 2
}

/// What the program at a port is called there.
fn program_of(number: u8) -> u64 {
    listener_of(number) + 1
}

fn watch(events: &OwnedFd, descriptor: BorrowedFd<'_>, name: u64) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP;
    let data = epoll::EventData::new_u64(name);
    Ok(epoll::add(
        events,
        descriptor,
        data,
        flags | epoll::EventFlags::ET,
    )?)
}

impl VirtioDevice for Console {
    fn device_type(&self) -> &'static DeviceType {
        self.device_type
    }

    fn features(&self) -> u64 {
        MULTIPORT
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        // What it cannot do now is asked for again by `attempt`.
        self.attempt(queue, request, ram).unwrap_or(0)
    }

    fn attempt(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> Option<u32> {
        if queue == CONTROL_TRANSMIT {
            if let Some(heard) = Heard::read(request, ram) {
                self.hear(heard);
            }
            return Some(0);
        }
        self.send(queue, request, ram).then_some(0)
    }

    fn is_ready(&self, queue: usize) -> bool {
        let is_full = |port: &Port| {
            let transmit = match port.number {
                0 => 1,
                number => 2 * usize::from(number) + 3,
            };
            queue == transmit && !port.is_console && port.host.is_full()
        };
        !self.ports.iter().any(is_full)
    }

    fn activate(&mut self, features: u64) -> Result<(), VirtioStateError> {
        self.knows_ports = features & MULTIPORT != 0;
        Ok(())
    }

    fn reset(&mut self) {
        self.knows_ports = false;
        self.ports.iter_mut().for_each(Port::reset);
    }

    fn begin(&mut self) -> Result<bool, VirtioStateError> {
        if let Some(connection) = self.connection.take() {
            self.bind(connection).map_err(|error| {
                VirtioStateError::new(format!("its sockets cannot be watched: {error}"))
            })?;
        }
        Ok(false)
    }

    fn inbound(&mut self) -> Option<&mut dyn Inbound> {
        Some(self)
    }

    fn save(&self) -> Vec<u8> {
        let state = ConsoleState {
            ports: self.ports.iter().map(Port::save).collect(),
        };
        // Numbers and texts into memory: there is no way to fail.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let (state, rest): (ConsoleState, _) = postcard::take_from_bytes(state)
            .map_err(|error| VirtioStateError::new(error.to_string()))?;
        if !rest.is_empty() {
            return Err(VirtioStateError::new(format!(
                "{} bytes too many",
                rest.len()
            )));
        }
        if state.ports.len() != self.ports.len() {
            return Err(VirtioStateError::new(format!(
                "it has {} ports, the saved one has {}",
                self.ports.len(),
                state.ports.len()
            )));
        }
        let mut ports = self.ports.iter_mut().zip(&state.ports);
        ports.try_for_each(|(port, saved)| port.restore(saved))
    }
}

impl Inbound for Console {
    fn queues(&self) -> u64 {
        let first = |port: &Port| match port.number {
            0 => 0,
            number => 2 * u32::from(number) + 2,
        };
        let ports = self.ports.iter().map(first);
        ports.fold(1 << CONTROL_RECEIVE, |queues, queue| queues | 1 << queue)
    }

    fn source(&self) -> Option<Arc<OwnedFd>> {
        self.events.clone()
    }

    fn look(&mut self) {
        self.is_behind = false;
        let Some(events) = self.events.clone() else {
            return;
        };
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(EVENTS_AT_ONCE);
        let at_once = Timespec::default();
        let room = rustix::buffer::spare_capacity(&mut ready);
        if let Err(error) = epoll::wait(&*events, room, Some(&at_once)) {
            tracing::debug!("sockets of ports cannot be looked at: {error}");
        }
        for event in &ready {
            let (name, flags) = (event.data.u64(), event.flags);
            for port in &mut self.ports {
                if name == listener_of(port.number) {
                    port.host.knock();
                } else if name == program_of(port.number) {
                    port.host.notice(flags);
                }
            }
        }
        for port in &mut self.ports {
            if port.let_go(self.knows_ports) {
                let name = program_of(port.number);
                port.host.accept(|stream| watch(&events, stream, name));
            }
        }
    }

    fn is_behind(&self) -> bool {
        self.is_behind
    }

    fn wants(&mut self, queue: usize) -> Want {
        let knows_ports = self.knows_ports;
        let has_something = if queue == CONTROL_RECEIVE {
            knows_ports && self.ports.iter().any(|port| port.next().is_some())
        } else {
            let Some(port) = self.port_of(queue) else {
                return Want::Nothing;
            };
            let had_data = port.has_data(knows_ports);
            // Its program may be gone, and the guest is to hear of it behind the last of its data.
            let was_open = port.host.is_open();
            port.let_go(knows_ports);
            let is_gone = was_open && !port.host.is_open();
            self.is_behind |= is_gone;
            had_data && !is_gone
        };
        if has_something {
            Want::Room
        } else {
            Want::Nothing
        }
    }

    fn fill(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        if queue == CONTROL_RECEIVE {
            return self.tell(request, ram);
        }
        self.receive(queue, request, ram)
    }
}
