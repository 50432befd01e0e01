#![forbid(unsafe_code)]
//! One port: what it is, what the guest knows of it, and what it is still to hear.
//!
//! Nothing is queued for the guest: what it is owed are bits, and whether the host has the port open is
//! compared with what the guest was told. However often it asks, or the host comes and goes, there is at most
//! one message of a kind.

use super::backend::HostSide;
use super::request::Said;
use super::state::SavedPort;
use crate::device::virtio::device::VirtioStateError;
use crate::spec::PortParts;

/// What the guest has asked for and not heard yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Owed {
    add: bool,
    console: bool,
    name: bool,
}

/// A port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) number: u8,
    name: String,
    pub(super) is_console: bool,
    pub(super) host: HostSide,
    /// How much of the guest's request at hand is with the host.
    pub(super) sent_bytes: u64,
    owed: Owed,
    /// The guest has it and wants to hear what it is.
    is_ready: bool,
    is_open_in_guest: bool,
    /// Whether the guest was told last that the host has it open.
    is_told_open: bool,
}

impl Port {
    pub(super) fn new(parts: &PortParts) -> Self {
        Self {
            number: parts.number.unwrap_or_default(),
            name: parts.name.clone().unwrap_or_default(),
            is_console: parts.is_console,
            host: HostSide::default(),
            sent_bytes: 0,
            owed: Owed::default(),
            is_ready: false,
            is_open_in_guest: false,
            is_told_open: false,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A driver begins anew. Whoever is connected on the host stays.
    pub(super) fn reset(&mut self) {
        self.sent_bytes = 0;
        self.owed = Owed::default();
        self.is_ready = false;
        self.is_open_in_guest = false;
        self.is_told_open = false;
    }

    /// The guest wants to hear of ports.
    pub(super) fn introduce(&mut self) {
        self.owed.add = true;
    }

    /// The guest wants to hear what it is.
    pub(super) fn describe(&mut self) {
        self.is_ready = true;
        self.is_told_open = false;
        self.owed.console = self.is_console;
        self.owed.name = !self.name.is_empty();
    }

    /// A program of the guest has it open, or no more.
    pub(super) fn open_in_guest(&mut self, is_open: bool) {
        self.is_open_in_guest = is_open;
    }

    /// What the guest is to hear next.
    pub(super) fn next(&self) -> Option<Said> {
        let is_open = self.host.is_open();
        match self.owed {
            Owed { add: true, .. } => Some(Said::Add),
            Owed { console: true, .. } => Some(Said::Console),
            Owed { name: true, .. } => Some(Said::Name),
            _ => (self.is_ready && is_open != self.is_told_open).then_some(Said::Open(is_open)),
        }
    }

    /// The guest has heard it.
    pub(super) fn said(&mut self, said: Said) {
        match said {
            Said::Add => self.owed.add = false,
            Said::Console => self.owed.console = false,
            Said::Name => self.owed.name = false,
            Said::Open(is_open) => self.is_told_open = is_open,
        }
    }

    /// Whether what the host sends has somebody in the guest to read it. A guest that does not know of
    /// several ports has one, and does not say when it is open.
    fn is_wanted(&self, knows_ports: bool) -> bool {
        if knows_ports {
            self.is_open_in_guest
        } else {
            self.number == 0
        }
    }

    /// Whether the host has sent something that the guest may have now.
    pub(super) fn has_data(&mut self, knows_ports: bool) -> bool {
        self.is_wanted(knows_ports) && (self.is_told_open || !knows_ports) && self.host.has_data()
    }

    /// Lets a program of the host go that is gone; whether another one may come. It may not before the guest
    /// has heard that the last one went, lest that one's reader becomes the other's.
    pub(super) fn let_go(&mut self, knows_ports: bool) -> bool {
        let is_wanted = self.is_wanted(knows_ports);
        self.host.let_go(is_wanted);
        !self.host.is_open() && !self.is_told_open
    }

    pub(super) fn save(&self) -> SavedPort {
        SavedPort {
            number: self.number,
            name: self.name.clone(),
            is_console: self.is_console,
            is_ready: self.is_ready,
            is_open_in_guest: self.is_open_in_guest,
            is_told_open: self.is_told_open,
            owed: u8::from(self.owed.add)
                | u8::from(self.owed.console) << 1
                | u8::from(self.owed.name) << 2,
        }
    }

    /// Goes on as it was saved; who is connected is seen when the machine begins.
    pub(super) fn restore(&mut self, state: &SavedPort) -> Result<(), VirtioStateError> {
        let (kind, saved_kind) = (kind(self.is_console), kind(state.is_console));
        if (self.number, &self.name, kind) != (state.number, &state.name, saved_kind) {
            return Err(VirtioStateError::new(format!(
                "its port {} is the {kind} {:?}, the saved one is number {}, the {saved_kind} {:?}",
                self.number, self.name, state.number, state.name
            )));
        }
        if state.owed >= 8 {
            return Err(VirtioStateError::new(format!(
                "port {} owes messages of no kind: {:#x}",
                self.number, state.owed
            )));
        }
        let owes = |bit: u8| state.owed >> bit & 1 != 0;
        self.owed = Owed {
            add: owes(0),
            console: owes(1),
            name: owes(2),
        };
        self.is_ready = state.is_ready;
        self.is_open_in_guest = state.is_open_in_guest;
        self.is_told_open = state.is_told_open;
        Ok(())
    }
}

fn kind(is_console: bool) -> &'static str {
    if is_console { "console" } else { "serial port" }
}
