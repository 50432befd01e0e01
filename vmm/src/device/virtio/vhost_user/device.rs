#![forbid(unsafe_code)]
//! The device: what the guest sees of a backend, and its rings in the backend's hands.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use virtio_bindings::{virtio_blk as blk, virtio_net as net};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::error::VhostUserError;
use super::handshake::{PROTOCOL_FEATURES, open, sectors};
use super::rings::{HandedRing, handed, memory};
use super::session::{RETURN_LIMIT, Session, named};
use super::state::VhostUserState;
use crate::device::virtio::delegate::{Delegate, DelegateError};
use crate::device::virtio::device::{COMMON_FEATURES, DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::queue::{Chain, VirtQueue};
use crate::memory::guest::GuestRam;
use crate::spec::MacAddress;
use crate::sys::event::descriptor;

/// What of a disk goes through: the backend alone decides. More queues and a switch of its cache would need
/// more than registers that are read.
const BLOCK_FEATURES: u64 = 1 << blk::VIRTIO_BLK_F_SIZE_MAX
    | 1 << blk::VIRTIO_BLK_F_SEG_MAX
    | 1 << blk::VIRTIO_BLK_F_GEOMETRY
    | 1 << blk::VIRTIO_BLK_F_RO
    | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
    | 1 << blk::VIRTIO_BLK_F_FLUSH
    | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
    | 1 << blk::VIRTIO_BLK_F_DISCARD
    | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
/// What of a network device goes through: how packets are laid out.
const NET_FEATURES: u64 = 1 << net::VIRTIO_NET_F_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_TSO4
    | 1 << net::VIRTIO_NET_F_GUEST_TSO6
    | 1 << net::VIRTIO_NET_F_GUEST_ECN
    | 1 << net::VIRTIO_NET_F_GUEST_UFO
    | 1 << net::VIRTIO_NET_F_HOST_TSO4
    | 1 << net::VIRTIO_NET_F_HOST_TSO6
    | 1 << net::VIRTIO_NET_F_HOST_ECN
    | 1 << net::VIRTIO_NET_F_HOST_UFO
    | 1 << net::VIRTIO_NET_F_MRG_RXBUF;
/// What a network device has whatever its backend is: the address is given here.
const OWN_NET_FEATURES: u64 = 1 << net::VIRTIO_NET_F_MAC;
/// How often to look whether they are done.
const UNDER_WAY_PAUSE: Duration = Duration::from_millis(1);

static BLOCK_TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_BLOCK.to_le_bytes()[0] as u16,
    kind: "vhost-user-blk",
    version: 1,
    // Storage: SCSI, as QEMU's.
    pci_class: 0x01_0000,
    queues: &[128],
};

static NET_TYPE: DeviceType = DeviceType {
    number: VIRTIO_ID_NET.to_le_bytes()[0] as u16,
    kind: "vhost-user-net",
    version: 1,
    // Network: Ethernet.
    pci_class: 0x02_0000,
    queues: &[256, 256],
};

/// A device in another process.
pub struct VhostUser {
    device_type: &'static DeviceType,
    session: Session,
    /// Registers that the guest reads.
    config: Vec<u8>,
    /// Features that the guest takes.
    taken: u64,
    /// What the backend sleeps on, for each queue.
    kicks: Arc<[EventFd]>,
    /// What the backend writes when it has answers, for each queue.
    calls: Vec<EventFd>,
    /// Of the calls and the socket.
    source: Arc<OwnedFd>,
    /// Rings in the backend's hands.
    handed: Vec<HandedRing>,
}

impl fmt::Debug for VhostUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUser")
            .field("kind", &self.device_type.kind)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl VhostUser {
    /// A disk: connects to its backend.
    pub fn block(path: &Path) -> Result<Self, VhostUserError> {
        let (session, config) = open(path, BLOCK_TYPE.queues.len() as u64, true)?;
        Self::new(&BLOCK_TYPE, session, config)
    }

    /// A network device: connects to its backend.
    pub fn net(path: &Path, mac: MacAddress) -> Result<Self, VhostUserError> {
        let (session, _) = open(path, NET_TYPE.queues.len() as u64, false)?;
        Self::new(&NET_TYPE, session, mac.bytes().to_vec())
    }

    fn new(
        device_type: &'static DeviceType,
        session: Session,
        config: Vec<u8>,
    ) -> Result<Self, VhostUserError> {
        let events = || {
            let events = device_type.queues.iter();
            let events = events.map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC));
            events.collect::<io::Result<Vec<_>>>()
        };
        let (kicks, calls) = (events()?.into(), events()?);
        let source = source_of(&calls, &session)?;
        Ok(Self {
            device_type,
            session,
            config,
            taken: 0,
            kicks,
            calls,
            source,
            handed: Vec::new(),
        })
    }

    fn is_block(&self) -> bool {
        std::ptr::eq(self.device_type, &raw const BLOCK_TYPE)
    }

    fn mac(&self) -> [u8; 6] {
        let mac = if self.is_block() {
            None
        } else {
            self.config.first_chunk()
        };
        mac.copied().unwrap_or_default()
    }

    fn sectors(&self) -> u64 {
        if self.is_block() {
            sectors(&self.config)
        } else {
            0
        }
    }

    /// Connects again to a backend that went away: it must be what the guest knows.
    fn connect_again(&mut self) -> Result<(), VhostUserError> {
        let path = self.session.path().to_owned();
        let queues = self.device_type.queues.len() as u64;
        let (session, config) = open(&path, queues, self.is_block())?;
        if self.is_block() && config != self.config {
            return Err(session.wrong(
                "has another disk than it had: end the machine, or start the backend with the disk that its \
                 guest knows",
            ));
        }
        let missing = self.taken & !OWN_NET_FEATURES & !session.features;
        if missing != 0 {
            return Err(session.wrong(format!("lacks features {missing:#x}, which the guest uses")));
        }
        self.source = source_of(&self.calls, &session)?;
        self.session = session;
        Ok(())
    }

    fn hand_over(&mut self, queues: &[VirtQueue], ram: &GuestRam) -> Result<(), VhostUserError> {
        if !self.handed.is_empty() {
            return Ok(());
        }
        // What is the guest's fault is found before the backend hears of anything.
        let rings = handed(queues, ram)?;
        let memory = memory(ram).map_err(|guest_address| VhostUserError::Memory {
            path: self.session.path().to_owned(),
            guest_address,
        })?;
        if self.session.is_over() || self.session.look().is_err() {
            self.connect_again()?;
        }
        let features = self.taken & self.session.features | PROTOCOL_FEATURES;
        let (kicks, calls) = (&self.kicks, &self.calls);
        self.session.ask(|frontend| {
            named("SET_FEATURES", frontend.set_features(features))?;
            named("SET_MEM_TABLE", frontend.set_mem_table(&memory.regions))?;
            for ring in &rings {
                let number = ring.queue;
                let (Some(kick), Some(call)) = (kicks.get(number), calls.get(number)) else {
                    continue;
                };
                named("SET_VRING_NUM", frontend.set_vring_num(number, ring.size))?;
                named("SET_VRING_BASE", frontend.set_vring_base(number, ring.base))?;
                named(
                    "SET_VRING_ADDR",
                    frontend.set_vring_addr(number, &ring.places),
                )?;
                named("SET_VRING_CALL", frontend.set_vring_call(number, call))?;
                named("SET_VRING_KICK", frontend.set_vring_kick(number, kick))?;
                named("SET_VRING_ENABLE", frontend.set_vring_enable(number, true))?;
            }
            Ok(())
        })?;
        for ring in &rings {
            // What was made available meanwhile, or before a state was saved. A full counter is a kick too.
            if let Some(kick) = self.kicks.get(ring.queue) {
                let _ = kick.write(1);
            }
        }
        self.handed = rings;
        Ok(())
    }

    fn take_back(
        &mut self,
        queues: &mut [VirtQueue],
        ram: &GuestRam,
    ) -> Result<(), VhostUserError> {
        let rings = std::mem::take(&mut self.handed);
        let bases = if rings.is_empty() {
            Ok(Vec::new())
        } else {
            self.session.ask_within(RETURN_LIMIT, |frontend| {
                let bases = rings.iter().map(|ring| {
                    let base = named("GET_VRING_BASE", frontend.get_vring_base(ring.queue))?;
                    Ok((ring.queue, base))
                });
                bases.collect::<Result<Vec<_>, _>>()
            })
        };
        let mut outcome = bases.as_ref().map(drop).map_err(|_| ());
        let deadline = Instant::now() + RETURN_LIMIT;
        for ring in &rings {
            let Some(queue) = queues.get_mut(ring.queue) else {
                continue;
            };
            let of_ring = |(number, base): &(usize, u32)| (*number == ring.queue).then_some(*base);
            let base = bases.iter().flatten().find_map(of_ring);
            if !settle(queue, ram, base, deadline) {
                outcome = Err(());
            }
        }
        match (bases, outcome) {
            (Err(error), _) => Err(error),
            (Ok(_), Ok(())) => Ok(()),
            (Ok(_), Err(())) => {
                self.session.end();
                Err(self.session.wrong(
                    "gives rings back with requests that it neither does nor leaves: it is given up, and \
                     who takes the rings next does them again",
                ))
            }
        }
    }
}

/// Writes down how far a ring has come. `base` is the next request that the backend would take; those before
/// it are waited for. Whether all of them were done by the `deadline`.
fn settle(queue: &mut VirtQueue, ram: &GuestRam, base: Option<u32>, deadline: Instant) -> bool {
    let base = base.and_then(|base| u16::try_from(base).ok());
    loop {
        let Some(used) = queue.used_index(ram) else {
            // Its rings are where no memory is any more; it was valid when it was handed over.
            return false;
        };
        let is_settled = base == Some(used);
        if is_settled || base.is_none() || Instant::now() >= deadline {
            queue.set_progress(used);
            return is_settled;
        }
        thread::sleep(UNDER_WAY_PAUSE);
    }
}

/// One descriptor for all that a backend may say without being asked.
fn source_of(calls: &[EventFd], session: &Session) -> io::Result<Arc<OwnedFd>> {
    let source = epoll::create(CreateFlags::CLOEXEC)?;
    let add = |fd: BorrowedFd<'_>, number: u64| {
        let flags = EventFlags::IN | EventFlags::RDHUP;
        epoll::add(&source, fd, EventData::new_u64(number), flags)
    };
    for (number, call) in (1..).zip(calls) {
        add(descriptor(call), number)?;
    }
    add(session.socket(), 0)?;
    Ok(Arc::new(source))
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> &'static DeviceType {
        self.device_type
    }

    fn features(&self) -> u64 {
        if self.is_block() {
            self.session.features & BLOCK_FEATURES
        } else {
            self.session.features & NET_FEATURES | OWN_NET_FEATURES
        }
    }

    fn offered(&self) -> u64 {
        // How rings work is the backend's too.
        self.features() | COMMON_FEATURES & self.session.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(&mut self, _queue: usize, _request: &Chain, _ram: &GuestRam) -> u32 {
        // Nobody takes requests out of rings here.
        0
    }

    fn activate(&mut self, features: u64) -> Result<(), VirtioStateError> {
        self.taken = features;
        Ok(())
    }

    fn delegate(&mut self) -> Option<&mut dyn Delegate> {
        Some(self)
    }

    fn save(&self) -> Vec<u8> {
        let state = VhostUserState {
            sectors: self.sectors(),
            mac: self.mac(),
        };
        // Integers into memory: there is no way to fail.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VirtioStateError> {
        let state = VhostUserState::decode(state)?;
        let path = self.session.path().display();
        let sectors = self.sectors();
        if state.sectors != sectors {
            return Err(VirtioStateError::new(format!(
                "the guest knows a disk of {} sectors, the backend at {path} has one of {sectors}",
                state.sectors
            )));
        }
        if !self.is_block() {
            self.config = state.mac.to_vec();
        }
        Ok(())
    }
}

impl Delegate for VhostUser {
    fn kicks(&self) -> Arc<[EventFd]> {
        Arc::clone(&self.kicks)
    }

    fn start(&mut self, queues: &[VirtQueue], ram: &GuestRam) -> Result<(), DelegateError> {
        Ok(self.hand_over(queues, ram)?)
    }

    fn stop(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), DelegateError> {
        Ok(self.take_back(queues, ram)?)
    }

    fn look(&mut self) -> Result<u64, DelegateError> {
        let called = |call: &EventFd| call.read().is_ok_and(|count| count > 0);
        let calls = self.calls.iter().enumerate();
        let bits = calls.fold(0, |bits, (at, call)| bits | u64::from(called(call)) << at);
        // Its last answers count.
        match self.session.look() {
            Err(error) if bits == 0 => Err(error.into()),
            _ => Ok(bits),
        }
    }

    fn source(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.source)
    }

    fn close(&mut self) {
        self.session.end();
    }
}
