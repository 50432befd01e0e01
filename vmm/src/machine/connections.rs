#![forbid(unsafe_code)]
//! What the devices of a machine are connected to on this host.

use std::path::PathBuf;

use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::net::backend::{NetConnection, Tap};
use crate::device::virtio::vsock::backend::{HostSide, VsockConnection};
use crate::spec::{DeviceSpec, MachineSpec};

use super::error::MachineError;
use super::generation::GenerationId;

/// Images by the ids of their disks.
pub type Disks = Vec<(String, Disk)>;

/// Where COM1 goes, the images of the disks, the host's side of the vsock, where cables of network devices
/// end, and which machine of its template it is.
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
    /// Devices that the machine is given beside those that it was made or saved with: its guest is told of them
    /// as of any that are plugged, and finds them when it looks.
    pub plugged: Vec<(DeviceSpec, Attachment)>,
    /// The VM generation ID of a machine that has one; `None` for a new one.
    pub generation_id: Option<GenerationId>,
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
            plugged: Vec::new(),
            generation_id: None,
        }
    }
}

impl Connections {
    /// Opens the image of every disk by its path, the socket of the vsock, and every tap by its name.
    pub fn open(spec: &MachineSpec, serial: SerialTarget) -> Result<Self, MachineError> {
        let nets = open_taps(spec)?;
        Ok(Self {
            serial,
            disks: open_disks(spec, &[])?,
            vsock: open_vsock(spec)?,
            nets,
            plugged: Vec::new(),
            generation_id: None,
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
