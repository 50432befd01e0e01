#![forbid(unsafe_code)]
//! What the devices of a machine are connected to on this host.

use std::path::PathBuf;

use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::console::backend::{ConsoleConnection, PortEnd};
use crate::device::virtio::net::backend::{NetConnection, Tap};
use crate::device::virtio::vsock::backend::{HostSide, VsockConnection};
use crate::spec::{DeviceSpec, MachineSpec, Uuid};

use super::document::{Document, Role};
use super::error::MachineError;
use super::generation::GenerationId;
use super::modules::Module;

/// Images by the ids of their disks.
pub type Disks = Vec<(String, Disk)>;

/// Where COM1 goes, the images of the disks, the host's side of the vsock, where cables of network devices
/// end and ports of consoles lead to, and which machine of its template it is.
#[derive(Debug)]
pub struct Connections {
    /// COM1.
    pub serial: SerialTarget,
    /// The disks.
    pub disks: Disks,
    /// The vsock's host side; `None` where there is none yet.
    pub vsock: Option<VsockConnection>,
    /// Ends of cables by the ids of network devices; a device that is not here has no cable.
    pub nets: Vec<(String, NetConnection)>,
    /// Where ports lead to, by the ids of console devices; those of a device that is not here lead to nobody.
    pub consoles: Vec<(String, ConsoleConnection)>,
    /// Devices that the machine is given beside those that it was made or saved with: its guest is told of them
    /// as of any that are plugged, and finds them when it looks.
    pub plugged: Vec<(DeviceSpec, Attachment)>,
    /// The VM generation ID of a machine that has one; `None` for a new one.
    pub generation_id: Option<GenerationId>,
    /// By what else it is told apart from others of its template.
    pub marks: Marks,
}

/// By what a machine is told apart from others of its template. Empty is as it was made or saved.
#[derive(Debug, Default)]
pub struct Marks {
    /// What SMBIOS calls it, where it has such tables.
    pub uuid: Option<Uuid>,
    /// What its document says, where it has one.
    pub document: Option<Vec<u8>>,
}

/// The host's side of a device that is plugged.
#[derive(Debug)]
pub enum Attachment {
    /// It has none.
    Nothing,
    /// The image of a disk.
    Disk(Box<Disk>),
    /// The end of a network device's cable.
    Net(NetConnection),
    /// The host's side of a vsock.
    Vsock(VsockConnection),
    /// Memory that grows and shrinks.
    Memory(Box<Module>),
}

impl Attachment {
    /// Takes the memory out.
    pub(super) fn take_memory(&mut self) -> Option<Box<Module>> {
        match std::mem::replace(self, Self::Nothing) {
            Self::Memory(module) => Some(module),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl From<Disk> for Attachment {
    fn from(disk: Disk) -> Self {
        Self::Disk(Box::new(disk))
    }
}

impl From<SerialTarget> for Connections {
    /// Those of a machine without disks and networks.
    fn from(serial: SerialTarget) -> Self {
        Self {
            serial,
            disks: Vec::new(),
            vsock: None,
            nets: Vec::new(),
            consoles: Vec::new(),
            plugged: Vec::new(),
            generation_id: None,
            marks: Marks::default(),
        }
    }
}

impl Marks {
    /// Those of a machine that is no clone.
    pub fn of(spec: &MachineSpec, role: Role) -> Self {
        let has_document = spec.devices().iter().any(DeviceSpec::is_document);
        Self {
            uuid: None,
            document: has_document.then(|| Document::of(role, spec.identity().uuid).archive()),
        }
    }
}

impl Connections {
    /// Opens the image of every disk by its path, the socket of the vsock, every tap by its name, and what ports
    /// lead to.
    pub fn open(spec: &MachineSpec, serial: SerialTarget) -> Result<Self, MachineError> {
        let nets = open_taps(spec)?;
        Ok(Self {
            serial,
            disks: open_disks(spec, &[])?,
            vsock: open_vsock(spec)?,
            nets,
            consoles: open_consoles(spec)?,
            plugged: Vec::new(),
            generation_id: None,
            marks: Marks::of(spec, Role::Machine),
        })
    }
}

/// The image of every disk: that of `open`, with what was written over it, or opened by its path.
pub fn open_disks(spec: &MachineSpec, open: &[(String, Disk)]) -> Result<Disks, MachineError> {
    let mut disks = Disks::new();
    for device in spec.devices() {
        let Some(disk) = device.disk() else {
            continue;
        };
        let id = device.id().to_owned();
        if let Some((_, disk)) = open.iter().find(|(of, _)| *of == id) {
            disks.push((id, disk.clone()));
            continue;
        }
        match Disk::open(&disk.path, disk.access, &scratch_folder()) {
            Ok(disk) => disks.push((id, disk)),
            Err(source) => return Err(MachineError::Disk { id, source }),
        }
    }
    Ok(disks)
}

/// The vsock of a machine that is no clone, with its socket where that was asked for.
pub fn open_vsock(spec: &MachineSpec) -> Result<Option<VsockConnection>, MachineError> {
    let mut devices = spec.devices().iter();
    let found = devices.find(|device| device.vsock().is_some());
    found.map_or(Ok(None), open_vsock_of)
}

/// The host's side of one device, if it is a vsock, with its socket where that was asked for.
pub fn open_vsock_of(device: &DeviceSpec) -> Result<Option<VsockConnection>, MachineError> {
    let Some(vsock) = device.vsock() else {
        return Ok(None);
    };
    let host = vsock.path.as_deref().map(HostSide::listen).transpose();
    let host = host.map_err(|source| MachineError::Vsock {
        id: device.id().to_owned(),
        source,
    })?;
    let cid = Some(vsock.cid);
    Ok(Some(VsockConnection { cid, host }))
}

/// What the ports of every console device lead to.
pub fn open_consoles(spec: &MachineSpec) -> Result<Vec<(String, ConsoleConnection)>, MachineError> {
    let opened = spec.devices().iter().filter_map(|device| {
        let connection = open_console_of(device).transpose()?;
        Some(connection.map(|connection| (device.id().to_owned(), connection)))
    });
    opened.collect()
}

/// What the ports of one device lead to, if it is a console.
fn open_console_of(device: &DeviceSpec) -> Result<Option<ConsoleConnection>, MachineError> {
    let Some(console) = device.console() else {
        return Ok(None);
    };
    let mut connection = ConsoleConnection::default();
    for port in &console.ports {
        let number = port.number.unwrap_or_default();
        let end = PortEnd::open(&port.target).map_err(|source| MachineError::Port {
            id: device.id().to_owned(),
            number,
            source,
        })?;
        connection.ends.push((number, end));
    }
    Ok(Some(connection))
}

/// Opens the tap of every network device that has one.
pub fn open_taps(spec: &MachineSpec) -> Result<Vec<(String, NetConnection)>, MachineError> {
    let mut nets = Vec::new();
    for device in spec.devices() {
        let Some(tap) = device.net().and_then(|net| net.tap.as_ref()) else {
            continue;
        };
        let id = device.id().to_owned();
        match Tap::open(tap) {
            Ok(tap) => {
                let connection = NetConnection {
                    tap: Some(tap),
                    ..NetConnection::default()
                };
                nets.push((id, connection));
            }
            Err(source) => return Err(MachineError::Tap { id, source }),
        }
    }
    Ok(nets)
}

/// Where files without a name are made for what guests write over images that they share: `TMPDIR`, or
/// `/var/tmp`, which is on a disk, or `/tmp`.
pub fn scratch_folder() -> PathBuf {
    let asked = std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty());
    asked.map_or_else(
        || {
            let on_disk = PathBuf::from("/var/tmp");
            if on_disk.is_dir() {
                on_disk
            } else {
                "/tmp".into()
            }
        },
        PathBuf::from,
    )
}
