#![forbid(unsafe_code)]
//! What the devices of a machine are connected to on this host.

use std::path::PathBuf;

use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::block::backend::Disk;
use crate::spec::MachineSpec;

use super::error::MachineError;
use super::generation::GenerationId;

/// Where COM1 goes, the images of the disks, and which machine of its template it is.
#[derive(Debug)]
pub struct Connections {
    /// COM1.
    pub serial: SerialTarget,
    /// Images by the ids of their disks.
    pub disks: Vec<(String, Disk)>,
    /// The VM generation ID of a machine that has one; `None` for a new one.
    pub generation_id: Option<GenerationId>,
}

impl From<SerialTarget> for Connections {
    /// Those of a machine without disks.
    fn from(serial: SerialTarget) -> Self {
        Self {
            serial,
            disks: Vec::new(),
            generation_id: None,
        }
    }
}

impl Connections {
    /// Opens the image of every disk by its path.
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
        Ok(Self {
            serial,
            disks,
            generation_id: None,
        })
    }
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
