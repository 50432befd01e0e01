#![forbid(unsafe_code)]
//! What the devices of a machine are connected to on this host.

use std::path::PathBuf;

use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::net::backend::{NetConnection, Tap};
use crate::spec::MachineSpec;

use super::error::MachineError;

/// Where COM1 goes, the images of the disks, and where cables of network devices end.
#[derive(Debug)]
pub struct Connections {
    /// COM1.
    pub serial: SerialTarget,
    /// Images by the ids of their disks.
    pub disks: Vec<(String, Disk)>,
    /// Ends of cables by the ids of network devices; a device that is not here has no cable.
    pub nets: Vec<(String, NetConnection)>,
}

impl From<SerialTarget> for Connections {
    /// Those of a machine without disks and networks.
    fn from(serial: SerialTarget) -> Self {
        Self {
            serial,
            disks: Vec::new(),
            nets: Vec::new(),
        }
    }
}

impl Connections {
    /// Opens the image of every disk by its path, and every tap by its name.
    pub fn open(spec: &MachineSpec, serial: SerialTarget) -> Result<Self, MachineError> {
        let mut disks = Vec::new();
        for device in spec.devices() {
            let Some(disk) = device.disk() else {
                continue;
            };
            let id = device.id().to_owned();
            let opened = Disk::open(&disk.path, disk.access, &scratch_folder());
            match opened {
                Ok(disk) => disks.push((id, disk)),
                Err(source) => return Err(MachineError::Disk { id, source }),
            }
        }
        let nets = open_taps(spec)?;
        Ok(Self {
            serial,
            disks,
            nets,
        })
    }
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
                let tap = Some(tap);
                nets.push((id, NetConnection { tap, mac: None }));
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
