#![forbid(unsafe_code)]
//! The device: packets of the guest to its connections, and of these to the guest; its context ID, and the
//! news that it has another one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::backend::VsockPort;
use super::request::{HEAD_BYTES, HOST_CID, Head, MAX_DATA_BYTES};
use super::state::VsockState;
use super::table::Table;
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::inbound::{Inbound, Want};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;
use crate::spec::{FIRST_CID, LAST_CID};

/// The queue of room for packets that come.
const RECEIVE: usize = 0;
/// The queue of packets that go.
const TRANSMIT: usize = 1;
/// The queue of room for news of the device.
const EVENT: usize = 2;
/// The only news: connections are gone, and the context ID may be another one.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

static TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_VSOCK.to_le_bytes()[0] as u16,
    kind: "virtio-vsock",
    version: 1,
    // Communication controller: other, as QEMU has it.
    pci_class: 0x07_8000,
    queues: &[128, 128, 16],
};

/// What the guest is to hear of the device itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    None,
    /// That connections are gone.
    Reset,
    /// It was told, and has not said that it has read it. New connections wait: it would end them with the old.
    Told,
}

/// A vsock device.
#[derive(Debug)]
pub struct Vsock {
    port: VsockPort,
    cid: u32,
    generation: u8,
    config: [u8; 8],
    table: Table,
    news: News,
    /// The guest has set it up.
    is_set_up: bool,
    /// The guest is one that was saved elsewhere.
    is_moved: bool,
    /// Data of the packet at hand.
    data: Vec<u8>,
}

impl Vsock {
    /// A device with a context ID. It takes what it is connected to from its port when the machine begins.
    pub fn new(cid: u32, port: VsockPort) -> Self {
        Self {
            port,
            cid,
            generation: 0,
            config: u64::from(cid).to_le_bytes(),
            table: Table::default(),
            news: News::None,
            is_set_up: false,
            is_moved: false,
            data: Vec::new(),
        }
    }

    fn forget(&mut self) {
        self.table.clear();
        self.news = News::None;
    }

    /// Puts the next packet into a request; how many bytes that are.
    fn receive(&mut self, request: &Chain, ram: &GuestRam) -> u32 {
        let Some(room) = request.writable_bytes().checked_sub(HEAD_BYTES as u64) else {
            // It has no room for a head; the guest gets it back.
            return 0;
        };
        let room = usize::try_from(room).map_or(MAX_DATA_BYTES, |room| room.min(MAX_DATA_BYTES));
        let mut data = std::mem::take(&mut self.data);
        let head = self.table.say(room, &mut data);
        let written = head.and_then(|head| {
            let head = Head {
                source_cid: HOST_CID,
                target_cid: self.cid.into(),
                ..head
            };
            request.write(ram, 0, &head.to_bytes()).ok()?;
            request.write(ram, HEAD_BYTES as u64, &data).ok()?;
            u32::try_from(HEAD_BYTES + data.len()).ok()
        });
        self.data = data;
        // Memory that the guest has not: it gets what it finds there.
        written.unwrap_or(0)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        let mut data = std::mem::take(&mut self.data);
        if queue == TRANSMIT
            && let Some(head) = Head::read(request, ram, &mut data)
            // Whoever else that is for, or from, is not here.
            && head.source_cid == u64::from(self.cid)
            && head.target_cid == HOST_CID
        {
            self.table.receive(&head, &data);
        }
        self.data = data;
        0
    }

    fn is_ready(&self, queue: usize) -> bool {
        queue != TRANSMIT || self.table.is_ready()
    }

    fn generation(&self) -> u8 {
        self.generation
    }

    fn activate(&mut self, _features: u64) -> Result<(), VirtioStateError> {
        self.is_set_up = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.is_set_up = false;
        self.is_moved = false;
        self.forget();
    }

    fn begin(&mut self) -> Result<bool, VirtioStateError> {
        let old = self.cid;
        if let Some(connection) = self.port.take() {
            self.table.bind(connection.host).map_err(|error| {
                VirtioStateError::new(format!("its socket cannot be watched: {error}"))
            })?;
            self.cid = connection.cid.unwrap_or(old);
        }
        if std::mem::take(&mut self.is_moved) {
            self.forget();
            if self.is_set_up {
                self.news = News::Reset;
            }
        }
        if self.cid == old {
            return Ok(false);
        }
        self.config = u64::from(self.cid).to_le_bytes();
        self.generation = self.generation.wrapping_add(1);
        Ok(self.is_set_up)
    }

    fn inbound(&mut self) -> Option<&mut dyn Inbound> {
        Some(self)
    }

    fn save(&self) -> Vec<u8> {
        let state = VsockState {
            cid: self.cid,
            generation: self.generation,
            last_port: self.table.last_port(),
        };
        // Three integers into memory: there is no way to fail.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let (state, rest): (VsockState, _) = postcard::take_from_bytes(state)
            .map_err(|error| VirtioStateError::new(error.to_string()))?;
        if !rest.is_empty() {
            return Err(VirtioStateError::new(format!(
                "{} bytes too many",
                rest.len()
            )));
        }
        if !(FIRST_CID..=LAST_CID).contains(&state.cid) {
            let cid = state.cid;
            return Err(VirtioStateError::new(format!(
                "the context id {cid} is no guest's"
            )));
        }
        // What the guest saw last; what has changed since is shown when the machine begins.
        self.cid = state.cid;
        self.config = u64::from(state.cid).to_le_bytes();
        self.generation = state.generation;
        self.table.go_on_behind(state.last_port);
        self.is_moved = true;
        Ok(())
    }
}

impl Inbound for Vsock {
    fn queues(&self) -> u64 {
        1 << RECEIVE | 1 << EVENT
    }

    fn source(&self) -> Option<Arc<OwnedFd>> {
        self.table.events()
    }

    fn look(&mut self) {
        self.table.look();
    }

    fn is_behind(&self) -> bool {
        self.table.is_behind()
    }

    fn wants(&mut self, queue: usize) -> Want {
        match (queue, self.news) {
            (EVENT, News::Reset) => Want::Room,
            (EVENT, News::Told) => Want::Return,
            (RECEIVE, News::None | News::Reset) if self.table.has_news() => Want::Room,
            _ => Want::Nothing,
        }
    }

    fn fill(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        if queue == RECEIVE {
            return self.receive(request, ram);
        }
        let has_room = request.writable_bytes() >= TRANSPORT_RESET.len() as u64;
        if has_room && request.write(ram, 0, &TRANSPORT_RESET).is_ok() {
            self.news = News::Told;
            return 4;
        }
        0
    }

    fn returned(&mut self, _queue: usize) {
        self.news = News::None;
    }
}
