#![forbid(unsafe_code)]
//! The part of a manifest that says which devices the machine has, and where the images of its disks
//! are.

use serde::{Deserialize, Serialize};

use super::limits_entry::LimitsEntry;
use super::seal::Seal;
use crate::spec::{
    BalloonParts, ConsoleParts, DeviceKind, DeviceParts, DeviceSpec, DiskAccess, DiskParts,
    MacAddress, NetParts, PortParts, PortTarget, VsockParts,
};

/// The first format that has this part.
pub(super) const FIRST_FORMAT: u32 = 4;

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceEntry {
    /// What it is called.
    pub id: String,
    /// Its device number on the PCI bus.
    pub slot: u8,
    /// What it is: `virtio-rng`, `document`, `virtio-blk`, which has a disk, `virtio-vsock`, which has a context
    /// ID, `virtio-net`, which has a `mac`, `virtio-console`, which has `ports`, or `virtio-balloon`, which has a
    /// `balloon`.
    pub kind: String,
    /// The disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskEntry>,
    /// The context ID of a `virtio-vsock` when the machine was frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<u32>,
    /// The hardware address of a `virtio-net`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The ports of a `virtio-console`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<PortEntry>>,
    /// What a `virtio-balloon` offers the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonEntry>,
    /// How fast a disk or a `virtio-net` may be used, where that is limited: formats from 5 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsEntry>,
}

/// What a `virtio-balloon` offers the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonEntry {
    /// The guest takes memory back before it ends programs for want of it.
    pub deflate_on_oom: bool,
    /// The guest says which of its pages are free.
    pub free_page_reporting: bool,
}

/// A port of a `virtio-console`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortEntry {
    /// Its number.
    pub number: u8,
    /// What it is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it is a console.
    pub console: bool,
}

/// The image of a disk as it was when the machine was frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskEntry {
    /// Its file, a plain name inside the template.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether the guest cannot write it.
    pub readonly: bool,
    /// The serial number that the guest was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Sparse digest of the file.
    pub digest: String,
    /// Identity of the file.
    pub seal: Seal,
}

impl DeviceEntry {
    /// The entry of a device; `disk` is its image, if it has one.
    pub(super) fn of(device: &DeviceSpec, disk: Option<DiskEntry>) -> Self {
        Self {
            id: device.id().to_owned(),
            slot: device.slot(),
            kind: device.kind().word().to_owned(),
            disk,
            cid: device.vsock().map(|vsock| vsock.cid),
            mac: device.net().and_then(|net| net.mac),
            ports: device
                .console()
                .map(|console| console.ports.iter().map(PortEntry::of).collect()),
            balloon: device.balloon().map(|balloon| BalloonEntry {
                deflate_on_oom: balloon.deflate_on_oom,
                free_page_reporting: balloon.free_page_reporting,
            }),
            limits: LimitsEntry::of(&device.limits()),
        }
    }

    /// The device's parts, unchecked; the reason where it is none.
    pub(super) fn parts(&self) -> Result<DeviceParts, String> {
        if self.ports.is_some() != (self.kind == "virtio-console") {
            let with = with(self.ports.is_some());
            return Err(format!(
                "device {} is a {:?} {with} ports",
                self.id, self.kind
            ));
        }
        if self.balloon.is_some() != (self.kind == "virtio-balloon") {
            let with = with(self.balloon.is_some());
            return Err(format!(
                "device {} is a {:?} {with} a balloon",
                self.id, self.kind
            ));
        }
        let ports = self.ports.as_deref().unwrap_or_default();
        let limits = self.limits.as_ref().map(LimitsEntry::limits).transpose();
        let limits = limits.map_err(|reason| format!("device {}: {reason}", self.id))?;
        let can_be_limited = matches!(self.kind.as_str(), "virtio-blk" | "virtio-net");
        if limits.is_some() && !can_be_limited {
            return Err(format!(
                "device {} is a {:?} with limits",
                self.id, self.kind
            ));
        }
        let limits = limits.unwrap_or_default();
        let kind = match (self.kind.as_str(), &self.disk, self.cid, self.mac) {
            ("virtio-rng", None, None, None) => DeviceKind::Rng,
            // What it says is each clone's own.
            ("document", None, None, None) => DeviceKind::Document,
            ("virtio-balloon", None, None, None) => {
                let balloon = self.balloon.as_ref();
                DeviceKind::Balloon(BalloonParts {
                    deflate_on_oom: balloon.is_some_and(|balloon| balloon.deflate_on_oom),
                    free_page_reporting: balloon.is_some_and(|balloon| balloon.free_page_reporting),
                })
            }
            // Where they lead to is said when a clone is made.
            ("virtio-console", None, None, None) => DeviceKind::Console(ConsoleParts {
                ports: ports.iter().map(PortEntry::parts).collect(),
            }),
            // Where its socket is is said when a clone is made.
            ("virtio-vsock", None, Some(cid), None) => {
                DeviceKind::Vsock(VsockParts { cid, path: None })
            }
            // Which tap a clone has is said when it is made.
            ("virtio-net", None, None, Some(mac)) => DeviceKind::Net(NetParts {
                tap: None,
                mac: Some(mac),
                limits,
            }),
            ("virtio-blk", Some(disk), None, None) => {
                if disk.seal.bytes != disk.bytes {
                    return Err(format!(
                        "disk {} has {} bytes, its sealed file has {}",
                        self.id, disk.bytes, disk.seal.bytes
                    ));
                }
                DeviceKind::Block(DiskParts {
                    path: disk.file.as_str().into(),
                    access: if disk.readonly {
                        DiskAccess::Read
                    } else {
                        DiskAccess::Snapshot
                    },
                    serial: disk.serial.clone(),
                    limits,
                })
            }
            (kind @ ("vhost-user-blk" | "vhost-user-net"), ..) => {
                return Err(unshared(&self.id, kind));
            }
            (kind, disk, cid, mac) => {
                let (disk, cid, mac) = (
                    with(disk.is_some()),
                    with(cid.is_some()),
                    with(mac.is_some()),
                );
                return Err(format!(
                    "device {} is a {kind:?} {disk} a disk, {cid} a context id and {mac} a mac",
                    self.id
                ));
            }
        };
        Ok(DeviceParts {
            id: Some(self.id.clone()),
            slot: Some(self.slot),
            kind,
        })
    }
}

/// Why a template has no device in another process.
pub fn unshared(id: &str, kind: &str) -> String {
    format!(
        "device {id} is a {kind:?}: it shares all guest memory with another process, which clones cannot do, \
         as their memory is share=off: make the template without it, or give it a virtio-blk or virtio-net"
    )
}

impl PortEntry {
    fn of(port: &PortParts) -> Self {
        Self {
            number: port.number.unwrap_or_default(),
            name: port.name.clone(),
            console: port.is_console,
        }
    }

    fn parts(&self) -> PortParts {
        PortParts {
            number: Some(self.number),
            name: self.name.clone(),
            is_console: self.console,
            target: PortTarget::Null,
        }
    }
}

fn with(is_there: bool) -> &'static str {
    if is_there { "with" } else { "without" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_with_a_device_of_another_process_is_refused_with_the_reason() {
        for kind in ["vhost-user-blk", "vhost-user-net"] {
            let entry = format!(r#"{{"id": "vu0", "slot": 3, "kind": "{kind}"}}"#);
            let entry: DeviceEntry = serde_json::from_str(&entry).unwrap();
            let why = format!(
                "device vu0 is a {kind:?}: it shares all guest memory with another process, which clones cannot \
                 do, as their memory is share=off: make the template without it, or give it a virtio-blk or \
                 virtio-net"
            );
            assert_eq!(entry.parts().unwrap_err(), why);
        }
    }
}
