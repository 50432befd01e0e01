#![forbid(unsafe_code)]
//! The device: packets of the guest to its tap, and of the tap to the guest.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::backend::{NetPort, Tap};
use super::request::{Command, HEAD_BYTES, MAX_PACKET_BYTES, sent_packet, set_buffers};
use super::state::NetState;
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::inbound::{Inbound, Want};
use crate::device::virtio::limit::{Clock, HostClock, Limiter};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;
use crate::spec::{Limits, MacAddress};
use crate::sys::tap::Offload;

/// The queue of room for packets that come.
const RECEIVE: usize = 0;
/// The queue of packets that go.
const TRANSMIT: usize = 1;
/// Most packets that are thrown away when a driver begins: what a tap holds unless it was told otherwise.
const MAX_WAITING_PACKETS: usize = 1000;
/// Length of the registers: address and status.
const CONFIG_BYTES: usize = 8;
/// Every feature beside the common ones. They do not depend on the tap: a template's guest uses them
/// before it is known which tap a clone has.
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR;

static TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_NET.to_le_bytes()[0] as u16,
    kind: "virtio-net",
    version: 1,
    // Network: Ethernet.
    pci_class: 0x02_0000,
    queues: &[256, 256, 64],
};

/// A network device.
#[derive(Debug)]
pub struct Net {
    port: NetPort,
    tap: Option<Tap>,
    /// The tap is gone: it is not looked at until there is another one, or the guest begins anew.
    is_tap_gone: bool,
    /// The address that it was given with a connection.
    given_mac: Option<MacAddress>,
    given_limits: Option<Limits>,
    /// Its address unless the guest sets another one.
    own_mac: MacAddress,
    mac: MacAddress,
    status: u16,
    generation: u8,
    config: [u8; CONFIG_BYTES],
    /// Features that the guest takes, once it has set the device up.
    features: u64,
    /// The guest is one that was saved elsewhere.
    is_moved: bool,
    /// What goes, and what has come and is not delivered yet.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    incoming_bytes: usize,
    clock: Arc<dyn Clock>,
    /// How fast packets go, and how fast they come: each way has the whole limit.
    transmit_limit: Option<Limiter>,
    receive_limit: Option<Limiter>,
    failures: u64,
}

impl Net {
    /// A device with an address, connected to what is in its port, now or when the machine begins.
    pub fn new(mac: MacAddress, port: NetPort) -> Self {
        let mut net = Self {
            port,
            tap: None,
            is_tap_gone: false,
            given_mac: None,
            given_limits: None,
            own_mac: mac,
            mac,
            status: 0,
            generation: 0,
            config: [0; CONFIG_BYTES],
            features: 0,
            is_moved: false,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            incoming_bytes: 0,
            clock: Arc::new(HostClock::default()),
            transmit_limit: None,
            receive_limit: None,
            failures: 0,
        };
        net.take_connection();
        net.show();
        net
    }

    /// The same device with a limit each way, unless its connection has another. A reset of the device leaves
    /// the limit as it is.
    #[must_use]
    pub fn with_limits(mut self, limits: &Limits, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self.set_limits(&self.given_limits.unwrap_or(*limits));
        self
    }

    fn set_limits(&mut self, limits: &Limits) {
        self.transmit_limit = Limiter::new(limits, Arc::clone(&self.clock));
        self.receive_limit = Limiter::new(limits, Arc::clone(&self.clock));
    }

    fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 != 0
    }

    /// Connects what is in the port; whether something was.
    fn take_connection(&mut self) -> bool {
        let Some(connection) = self.port.take() else {
            return false;
        };
        self.tap = connection.tap;
        self.is_tap_gone = false;
        self.given_mac = connection.mac;
        self.given_limits = connection.limits;
        if let Some(limits) = connection.limits {
            self.set_limits(&limits);
        }
        if let Some(mac) = connection.mac {
            (self.own_mac, self.mac) = (mac, mac);
        }
        let link = low_bits(VIRTIO_NET_S_LINK_UP);
        self.status = if self.tap.is_some() {
            self.status | link
        } else {
            self.status & !link
        };
        true
    }

    /// Puts address and status into the registers; whether they changed.
    fn show(&mut self) -> bool {
        let mut config = [0; CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac.bytes());
        config[6..].copy_from_slice(&self.status.to_le_bytes());
        let is_new = config != self.config;
        if is_new {
            self.config = config;
            self.generation = self.generation.wrapping_add(1);
        }
        is_new
    }

    /// Tells the tap which packets the guest takes.
    fn set_offload(&self) -> Result<(), VirtioStateError> {
        let Some(tap) = &self.tap else {
            return Ok(());
        };
        // Each needs what it builds on, which a guest may have left out.
        let checksum = self.has(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = checksum && self.has(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = checksum && self.has(VIRTIO_NET_F_GUEST_TSO6);
        let offload = Offload {
            checksum,
            tso4,
            tso6,
            ecn: (tso4 || tso6) && self.has(VIRTIO_NET_F_GUEST_ECN),
            ufo: checksum && self.has(VIRTIO_NET_F_GUEST_UFO),
        };
        tap.set_offload(offload).map_err(|error| {
            VirtioStateError::new(format!("its tap cannot do what its guest uses: {error}"))
        })
    }

    /// Packets that wait at the tap are of before the guest said what it takes: it may not read them.
    fn lose_what_waits(&mut self) {
        let Some(tap) = &self.tap else {
            return;
        };
        self.incoming.resize(MAX_PACKET_BYTES, 0);
        for _ in 0..MAX_WAITING_PACKETS {
            if !matches!(tap.read(&mut self.incoming), Ok(1..)) {
                return;
            }
        }
    }

    fn transmit(&mut self, chain: &Chain, ram: &GuestRam) {
        self.outgoing.resize(MAX_PACKET_BYTES, 0);
        let Some(length) = sent_packet(chain, ram, &mut self.outgoing) else {
            return;
        };
        let (Some(tap), Some(packet)) = (&self.tap, self.outgoing.get(..length)) else {
            return;
        };
        // A network may lose packets; a tap that is down, or full, does.
        if let Err(error) = tap.write(packet) {
            self.note("sent", &error);
        }
    }

    fn note(&mut self, done: &str, error: &std::io::Error) {
        self.failures += 1;
        // A guest can make each of its packets fail.
        if self.failures.is_power_of_two() {
            let count = self.failures;
            tracing::debug!(count, "a packet could not be {done}: {error}");
        }
    }

    fn control(&mut self, chain: &Chain, ram: &GuestRam) -> u32 {
        let command = Command::parse(chain, ram);
        match command {
            Some(Command::Announced) => self.status &= !low_bits(VIRTIO_NET_S_ANNOUNCE),
            Some(Command::SetMac(mac)) => self.mac = mac,
            None => (),
        }
        self.show();
        let answer = if command.is_some() {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        };
        let [answer, ..] = answer.to_le_bytes();
        u32::from(chain.writable_bytes() > 0 && chain.write(ram, 0, &[answer]).is_ok())
    }
}

/// A status as the register has it.
const fn low_bits(status: u32) -> u16 {
    let [low, high, ..] = status.to_le_bytes();
    u16::from_le_bytes([low, high])
}

impl VirtioDevice for Net {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        if queue == TRANSMIT {
            self.transmit(request, ram);
            return 0;
        }
        self.control(request, ram)
    }

    fn limit(&mut self, queue: usize, request: &Chain) -> Option<(&mut Limiter, u64)> {
        let limiter = self.transmit_limit.as_mut().filter(|_| queue == TRANSMIT)?;
        let bytes = request.readable_bytes();
        Some((limiter, bytes.saturating_sub(HEAD_BYTES as u64)))
    }

    fn generation(&self) -> u8 {
        self.generation
    }

    fn activate(&mut self, features: u64) -> Result<(), VirtioStateError> {
        self.features = features;
        self.set_offload()?;
        self.lose_what_waits();
        Ok(())
    }

    fn reset(&mut self) {
        self.features = 0;
        self.incoming_bytes = 0;
        self.is_tap_gone = false;
        self.mac = self.own_mac;
        self.status &= !low_bits(VIRTIO_NET_S_ANNOUNCE);
        self.is_moved = false;
        self.show();
        // The next driver may take less; where the tap refuses so little, it is gone.
        let _gone = self.set_offload();
    }

    fn begin(&mut self) -> Result<bool, VirtioStateError> {
        if self.take_connection() {
            self.set_offload()?;
        }
        if std::mem::take(&mut self.is_moved)
            && self.tap.is_some()
            && self.has(VIRTIO_NET_F_GUEST_ANNOUNCE)
        {
            self.status |= low_bits(VIRTIO_NET_S_ANNOUNCE);
        }
        Ok(self.show() && self.features != 0)
    }

    fn inbound(&mut self) -> Option<&mut dyn Inbound> {
        Some(self)
    }

    fn save(&self) -> Vec<u8> {
        let state = NetState {
            mac: self.mac.bytes(),
            status: self.status,
            generation: self.generation,
        };
        // Plain numbers always fit.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let (state, rest): (NetState, _) = postcard::take_from_bytes(state)
            .map_err(|error| VirtioStateError::new(error.to_string()))?;
        if !rest.is_empty() {
            return Err(VirtioStateError::new("it has bytes too many"));
        }
        let saved = MacAddress::new(state.mac)
            .ok_or_else(|| VirtioStateError::new("its hardware address is a group's"))?;
        self.generation = state.generation;
        // What the guest saw last; what has changed since is shown when the machine begins.
        self.config[..6].copy_from_slice(&state.mac);
        self.config[6..].copy_from_slice(&state.status.to_le_bytes());
        self.mac = self.given_mac.unwrap_or(saved);
        self.is_moved = true;
        Ok(())
    }
}

impl Net {
    /// How many bytes of the packet that has come a limit counts: it has none for the header.
    fn counted_bytes(&self) -> u64 {
        self.incoming_bytes.saturating_sub(HEAD_BYTES) as u64
    }

    /// Whether a packet waits to be delivered; takes the next in where none does.
    fn take_in(&mut self) -> bool {
        if self.incoming_bytes > 0 || self.is_tap_gone {
            return self.incoming_bytes > 0;
        }
        let Some(tap) = &self.tap else {
            return false;
        };
        self.incoming.resize(MAX_PACKET_BYTES, 0);
        match tap.read(&mut self.incoming) {
            Ok(length) => self.incoming_bytes = length,
            Err(error) => {
                // It would be readable for ever.
                self.is_tap_gone = true;
                self.status &= !low_bits(VIRTIO_NET_S_LINK_UP);
                self.show();
                self.failures += 1;
                // Its guest can have it looked for again.
                if self.failures.is_power_of_two() {
                    tracing::warn!(
                        mac = %self.own_mac,
                        "a network device has lost its tap, its guest sees no link any more: {error}"
                    );
                }
            }
        }
        self.incoming_bytes > 0
    }
}

impl Inbound for Net {
    fn queues(&self) -> u64 {
        1 << RECEIVE
    }

    /// With a packet that waits already the tap is left alone: there is no place for another.
    fn source(&self) -> Option<Arc<OwnedFd>> {
        let may_look = self.incoming_bytes == 0 && !self.is_tap_gone;
        self.tap.as_ref().filter(|_| may_look).map(Tap::descriptor)
    }

    fn look(&mut self) {
        self.take_in();
    }

    fn wants(&mut self, queue: usize) -> Want {
        if queue != RECEIVE || !self.take_in() {
            return Want::Nothing;
        }
        let bytes = self.counted_bytes();
        let limiter = self.receive_limit.as_mut();
        if let Some(time) = limiter.and_then(|limiter| limiter.wait(bytes)) {
            Want::Later(time)
        } else if self.has(VIRTIO_NET_F_MRG_RXBUF) {
            Want::Bytes(self.incoming_bytes as u64)
        } else {
            Want::Room
        }
    }

    fn fill(&mut self, queue: usize, request: &Chain, ram: &GuestRam) -> u32 {
        let written = self.fill_all(queue, std::slice::from_ref(request), ram);
        written.first().copied().unwrap_or(0)
    }

    fn fill_all(&mut self, _: usize, requests: &[Chain], ram: &GuestRam) -> Vec<u32> {
        let counted = self.counted_bytes();
        if let Some(limiter) = &mut self.receive_limit {
            limiter.count(counted);
        }
        let length = std::mem::take(&mut self.incoming_bytes);
        let packet = self.incoming.get_mut(..length).unwrap_or_default();
        set_buffers(packet, u16::try_from(requests.len()).unwrap_or(u16::MAX));
        let room: u64 = requests.iter().map(Chain::writable_bytes).sum();
        // Half a packet is none.
        let mut rest: &[u8] = if room < length as u64 { &[] } else { packet };
        let mut written = Vec::with_capacity(requests.len());
        for request in requests {
            let room = usize::try_from(request.writable_bytes()).unwrap_or(usize::MAX);
            let (part, more) = rest.split_at(room.min(rest.len()));
            rest = more;
            // Memory that the guest has not: it gets what it finds there.
            let is_written = request.write(ram, 0, part).is_ok();
            let bytes = if is_written { part.len() } else { 0 };
            written.push(u32::try_from(bytes).unwrap_or(u32::MAX));
        }
        written
    }

    fn lose(&mut self, _: usize) {
        self.incoming_bytes = 0;
    }
}
