#![forbid(unsafe_code)]
//! Devices that a machine is given: each has a name, a place on the PCI bus, and what it is.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::backend::is_id;
use super::balloon::BalloonParts;
use super::console::{ConsoleFault, ConsoleParts};
use super::limits::Limits;
use super::mac::MacAddress;
use super::mem::{MemFault, MemParts};
use super::tap::TapSpec;
use super::vhost_user::{VhostUserFunction, VhostUserParts};

/// The last device number of a PCI bus; 0 is the host bridge.
pub const LAST_SLOT: u8 = 31;
/// The first context ID that a guest can have: 2 is the host, 0 and 1 are nobody's.
pub const FIRST_CID: u32 = 3;
/// The last context ID that a guest can have: the next stands for any.
pub const LAST_CID: u32 = u32::MAX - 1;
/// Most bytes of the path of a vsock device's socket: `_` and a port come behind it, and all that has a zero
/// behind it in 108 bytes.
pub const MAX_VSOCK_PATH_BYTES: usize = 108 - 1 - "_4294967295".len();
/// Most bytes of the serial number of a disk (`VIRTIO_BLK_ID_BYTES`).
pub const MAX_SERIAL_BYTES: usize = 20;

/// A device that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceParts {
    /// What it is called; without it, its kind and a number.
    pub id: Option<String>,
    /// Its device number on the PCI bus; without it, the first free one.
    pub slot: Option<u8>,
    /// What it is.
    pub kind: DeviceKind,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// Entropy from the host.
    Rng,
    /// A disk.
    Block(DiskParts),
    /// Connections to programs of the host.
    Vsock(VsockParts),
    /// A network device.
    Net(NetParts),
    /// A disk that tells the guest who it is, in each clone something else.
    Document,
    /// Ports between programs of the guest and of the host.
    Console(ConsoleParts),
    /// A device in another process.
    VhostUser(VhostUserParts),
    /// Memory that the guest gives away and takes back.
    Balloon(BalloonParts),
    /// Memory that grows and shrinks.
    Mem(MemParts),
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetParts {
    /// The host's end of its cable; none where there is no cable.
    pub tap: Option<TapSpec>,
    /// Its hardware address; without it, the first free one from [`MacAddress::DEFAULT`] on.
    pub mac: Option<MacAddress>,
    /// How fast packets go, each way.
    pub limits: Limits,
}

/// Connections between programs of the guest and of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockParts {
    /// The guest's context ID.
    pub cid: u32,
    /// The Unix socket on which programs of the host reach the guest; `None` where none can.
    pub path: Option<PathBuf>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskParts {
    /// The raw image.
    pub path: PathBuf,
    /// What happens to what the guest writes.
    pub access: DiskAccess,
    /// The serial number that the guest is told.
    pub serial: Option<String>,
    /// How fast it is used.
    pub limits: Limits,
}

/// What happens to what a guest writes to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskAccess {
    /// It goes to the image.
    #[default]
    Write,
    /// It cannot: the disk is read-only.
    Read,
    /// It goes to a file of the machine's own and ends with it; the image stays as it is.
    Snapshot,
}

/// A device of a machine: proven when it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    id: String,
    slot: u8,
    kind: DeviceKind,
}

/// Why a device cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DeviceFault {
    /// A name that is none.
    #[error("an id is 1 to 64 letters, digits, '-', '_' and '.', and does not begin with '.'")]
    BadId,
    /// Two devices of one id.
    #[error("the id is given twice: ids of devices must differ")]
    DuplicateId,
    /// No such place.
    #[error("there is no PCI slot {slot}: slots are 1 to {LAST_SLOT}")]
    NoSlot {
        /// The place asked for.
        slot: u8,
    },
    /// Another device is there.
    #[error("PCI slot {slot} is taken by device {other:?}")]
    SlotTaken {
        /// The place asked for.
        slot: u8,
        /// Who has it.
        other: String,
    },
    /// All places are taken.
    #[error("all {LAST_SLOT} PCI slots are taken")]
    NoFreeSlot,
    /// A serial number that the guest cannot be told.
    #[error("serial {serial:?} is not 1 to {MAX_SERIAL_BYTES} printable ASCII characters")]
    BadSerial {
        /// The number.
        serial: String,
    },
    /// Parts that do not go together.
    #[error("{reason}")]
    BadParts {
        /// Why not.
        reason: String,
    },
    /// A disk without an image.
    #[error("a disk needs the path of its image")]
    NoPath,
    /// A context ID that no guest can have.
    #[error("the context id {cid} is no guest's: those are {FIRST_CID} to {LAST_CID}")]
    BadCid {
        /// The ID.
        cid: u32,
    },
    /// A path with which no socket can be made.
    #[error(
        "the path of its socket is {bytes} bytes long: with \"_PORT\" behind it a socket's path has room \
         for 1 to {MAX_VSOCK_PATH_BYTES}"
    )]
    BadVsockPath {
        /// Its length.
        bytes: usize,
    },
    /// Guests have one of them.
    #[error("there is a virtio-vsock already: a guest uses one")]
    SecondVsock,
    /// Guests have one of them.
    #[error("there is a document already: what it says is said once")]
    SecondDocument,
    /// Memory that another process cannot reach.
    #[error("{reason}")]
    Unshared {
        /// Which, and what to do.
        reason: String,
    },
    /// Guests have one of them.
    #[error("there is a balloon already: Only one balloon device is supported")]
    SecondBalloon,
    /// Ports that cannot be.
    #[error(transparent)]
    Console(#[from] ConsoleFault),
    /// Memory that cannot grow and shrink.
    #[error(transparent)]
    Memory(#[from] MemFault),
}

impl DeviceKind {
    /// The kind as a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Rng => "virtio-rng",
            Self::Block(_) => "virtio-blk",
            Self::Vsock(_) => "virtio-vsock",
            Self::Net(_) => "virtio-net",
            Self::Document => "document",
            Self::Console(_) => "virtio-console",
            Self::VhostUser(parts) => parts.function.word(),
            Self::Balloon(_) => "virtio-balloon",
            Self::Mem(_) => "virtio-mem",
        }
    }

    fn prefix(&self) -> &'static str {
        match self {
            Self::Rng => "rng",
            Self::Block(_) => "disk",
            Self::Vsock(_) => "vsock",
            Self::Net(_) => "net",
            Self::Document => "document",
            Self::Console(_) => "console",
            Self::VhostUser(_) => "vhost-user",
            Self::Balloon(_) => "balloon",
            Self::Mem(_) => "mem",
        }
    }

    fn check(&self) -> Result<(), DeviceFault> {
        match self {
            // Ports are proven together with those of other devices.
            Self::Rng
            | Self::Net(_)
            | Self::Document
            | Self::Console(_)
            | Self::Balloon(_)
            | Self::Mem(_) => Ok(()),
            Self::Block(disk) => disk.check(),
            Self::Vsock(vsock) => vsock.check(),
            Self::VhostUser(parts) => parts.check(),
        }
    }
}

impl VsockParts {
    fn check(&self) -> Result<(), DeviceFault> {
        let cid = self.cid;
        if !(FIRST_CID..=LAST_CID).contains(&cid) {
            return Err(DeviceFault::BadCid { cid });
        }
        let bytes = self.path.as_ref().map(|path| path.as_os_str().len());
        match bytes {
            Some(bytes) if !(1..=MAX_VSOCK_PATH_BYTES).contains(&bytes) => {
                Err(DeviceFault::BadVsockPath { bytes })
            }
            _ => Ok(()),
        }
    }
}

impl DiskParts {
    fn check(&self) -> Result<(), DeviceFault> {
        let disk = self;
        if disk.path.as_os_str().is_empty() {
            return Err(DeviceFault::NoPath);
        }
        let is_serial = |text: &String| {
            (1..=MAX_SERIAL_BYTES).contains(&text.len())
                && text
                    .bytes()
                    .all(|byte| byte == b' ' || byte.is_ascii_graphic())
        };
        match &disk.serial {
            Some(serial) if !is_serial(serial) => Err(DeviceFault::BadSerial {
                serial: serial.clone(),
            }),
            _ => Ok(()),
        }
    }
}

impl DeviceSpec {
    /// What it is called.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its device number on the PCI bus.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// What it is.
    pub fn kind(&self) -> &DeviceKind {
        &self.kind
    }

    /// The disk, if it is one.
    pub fn disk(&self) -> Option<&DiskParts> {
        match &self.kind {
            DeviceKind::Block(disk) => Some(disk),
            _ => None,
        }
    }

    /// The connections to the host, if it is what makes them.
    pub fn vsock(&self) -> Option<&VsockParts> {
        match &self.kind {
            DeviceKind::Vsock(vsock) => Some(vsock),
            _ => None,
        }
    }

    /// Whether it is the document.
    pub fn is_document(&self) -> bool {
        matches!(self.kind, DeviceKind::Document)
    }

    /// The network device, if it is one.
    pub fn net(&self) -> Option<&NetParts> {
        match &self.kind {
            DeviceKind::Net(net) => Some(net),
            _ => None,
        }
    }

    /// The ports, if it is what has them.
    pub fn console(&self) -> Option<&ConsoleParts> {
        match &self.kind {
            DeviceKind::Console(console) => Some(console),
            _ => None,
        }
    }

    /// The balloon, if it is one.
    pub fn balloon(&self) -> Option<&BalloonParts> {
        match &self.kind {
            DeviceKind::Balloon(balloon) => Some(balloon),
            _ => None,
        }
    }

    /// The memory that grows and shrinks, if it is that.
    pub fn memory(&self) -> Option<&MemParts> {
        match &self.kind {
            DeviceKind::Mem(mem) => Some(mem),
            _ => None,
        }
    }

    /// Requests so much of memory that grows and shrinks.
    pub(super) fn request_memory(&mut self, bytes: u64) -> Result<(), MemFault> {
        if let DeviceKind::Mem(mem) = &mut self.kind {
            mem.check_requested(bytes)?;
            mem.requested_bytes = bytes;
        }
        Ok(())
    }

    /// The image of a disk.
    pub fn disk_path(&self) -> Option<&Path> {
        self.disk().map(|disk| disk.path.as_path())
    }

    /// How fast it may be used.
    pub fn limits(&self) -> Limits {
        match &self.kind {
            DeviceKind::Block(disk) => disk.limits,
            DeviceKind::Net(net) => net.limits,
            _ => Limits::default(),
        }
    }

    /// The parts that it was, or could have been, made of.
    pub fn to_parts(&self) -> DeviceParts {
        DeviceParts {
            id: Some(self.id.clone()),
            slot: Some(self.slot),
            kind: self.kind.clone(),
        }
    }
}

/// Gives every device its name and its place. What was asked for comes first, so that no default
/// takes it. The device that cannot be is named by its id, or by its kind.
pub(super) fn place(parts: Vec<DeviceParts>) -> Result<Vec<DeviceSpec>, (String, DeviceFault)> {
    let name_of = |part: &DeviceParts| {
        let id = part.id.clone();
        id.unwrap_or_else(|| part.kind.word().to_owned())
    };
    let mut taken: Vec<(u8, String)> = Vec::new();
    let mut ids: Vec<String> = Vec::new();
    let (mut has_vsock, mut has_document, mut has_balloon) = (false, false, false);
    for part in &parts {
        let name = name_of(part);
        let fault = |fault| (name.clone(), fault);
        part.kind.check().map_err(fault)?;
        let is_vsock = matches!(part.kind, DeviceKind::Vsock(_));
        if is_vsock && std::mem::replace(&mut has_vsock, true) {
            return Err(fault(DeviceFault::SecondVsock));
        }
        let is_document = matches!(part.kind, DeviceKind::Document);
        if is_document && std::mem::replace(&mut has_document, true) {
            return Err(fault(DeviceFault::SecondDocument));
        }
        let is_balloon = matches!(part.kind, DeviceKind::Balloon(_));
        if is_balloon && std::mem::replace(&mut has_balloon, true) {
            return Err(fault(DeviceFault::SecondBalloon));
        }
        if let Some(id) = &part.id {
            if !is_id(id) {
                return Err(fault(DeviceFault::BadId));
            }
            if ids.contains(id) {
                return Err(fault(DeviceFault::DuplicateId));
            }
            ids.push(id.clone());
        }
        if let Some(slot) = part.slot {
            if !(1..=LAST_SLOT).contains(&slot) {
                return Err(fault(DeviceFault::NoSlot { slot }));
            }
            if let Some((_, other)) = taken.iter().find(|(other, _)| *other == slot) {
                let other = other.clone();
                return Err(fault(DeviceFault::SlotTaken { slot, other }));
            }
            taken.push((slot, name.clone()));
        }
    }
    let mut devices = Vec::new();
    let mut parts = parts;
    give_addresses(&mut parts);
    let mut port_names = Vec::new();
    for part in &mut parts {
        if let DeviceKind::Console(console) = &mut part.kind
            && let Err(fault) = console.place(&mut port_names)
        {
            return Err((name_of(part), fault.into()));
        }
    }
    for part in parts {
        let free = |slot: &u8| taken.iter().all(|(other, _)| other != slot);
        let slot = part.slot.or_else(|| (1..=LAST_SLOT).find(free));
        let slot = slot.ok_or_else(|| (name_of(&part), DeviceFault::NoFreeSlot))?;
        let id = part.id.unwrap_or_else(|| {
            let names = (0..).map(|number: u32| format!("{}{number}", part.kind.prefix()));
            let mut free = names.filter(|name| !ids.contains(name));
            free.next().unwrap_or_default()
        });
        taken.push((slot, id.clone()));
        ids.push(id.clone());
        devices.push(DeviceSpec {
            id,
            slot,
            kind: part.kind,
        });
    }
    Ok(devices)
}

/// Gives a hardware address to each network device that has none.
fn give_addresses(parts: &mut [DeviceParts]) {
    let mut macs: Vec<&mut Option<MacAddress>> = parts
        .iter_mut()
        .filter_map(|part| match &mut part.kind {
            DeviceKind::Net(net) => Some(&mut net.mac),
            DeviceKind::VhostUser(parts) => match &mut parts.function {
                VhostUserFunction::Net { mac } => Some(mac),
                VhostUserFunction::Block => None,
            },
            _ => None,
        })
        .collect();
    let mut taken: Vec<MacAddress> = macs.iter().filter_map(|mac| **mac).collect();
    for mac in &mut macs {
        let mut free = (0..).map_while(|number| MacAddress::DEFAULT.plus(number));
        **mac = mac.or_else(|| free.find(|mac| !taken.contains(mac)));
        taken.extend(**mac);
    }
}

#[cfg(test)]
mod tests;
