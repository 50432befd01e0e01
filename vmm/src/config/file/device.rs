#![forbid(unsafe_code)]
//! Devices of a machine file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::port::PortTable;
use super::{Bytes, is_default};
use crate::spec::{
    BalloonParts, ConsoleParts, DeviceKind, DeviceParts, DeviceSpec, DiskAccess, DiskParts, Limits,
    MacAddress, MemParts, NetParts, PortParts, Rate, TapSpec, VhostUserFunction, VhostUserParts,
    VsockParts,
};

/// One device on the PCI bus. There is a bus where there is a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", deny_unknown_fields)]
pub enum DeviceTable {
    /// Entropy from the host.
    #[serde(rename = "virtio-rng")]
    Rng {
        /// What it is called; `rng0`, `rng1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
    },
    /// A disk.
    #[serde(rename = "virtio-blk")]
    Block {
        /// What it is called; `disk0`, `disk1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// The raw image: a multiple of 512 bytes.
        path: PathBuf,
        /// Whether nobody can write it.
        #[serde(default, skip_serializing_if = "is_default")]
        readonly: bool,
        /// Whether what the guest writes ends with the machine and the image stays as it is.
        #[serde(default, skip_serializing_if = "is_default")]
        snapshot: bool,
        /// The serial number that the guest is told: at most 20 characters.
        #[serde(skip_serializing_if = "Option::is_none")]
        serial: Option<String>,
        /// Bytes per second that it reads and writes, together; no limit if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        bps: Option<Bytes>,
        /// Bytes at once after a time of rest; a tenth of a second's if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        bps_burst: Option<Bytes>,
        /// Requests per second; no limit if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1))]
        iops: Option<u64>,
        /// Requests at once after a time of rest; a tenth of a second's if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1))]
        iops_burst: Option<u64>,
    },
    /// Connections between programs of the guest and of the host.
    #[serde(rename = "virtio-vsock")]
    Vsock {
        /// What it is called; `vsock0` if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// The guest's context ID. In a clone it is this and the clone's number, or what `pando clone` is told.
        #[schemars(range(min = 3))]
        cid: u32,
        /// The Unix socket on which programs of the host reach the guest (`CONNECT PORT`); with `_PORT` behind
        /// it those that the guest reaches. Without it none do. A clone's is what `pando clone` is told.
        #[serde(skip_serializing_if = "Option::is_none")]
        uds_path: Option<PathBuf>,
    },
    /// A network device.
    #[serde(rename = "virtio-net")]
    Net {
        /// What it is called; `net0`, `net1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// The tap at the other end of its cable; no cable if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        tap: Option<String>,
        /// The network namespace of the tap, as `ip netns` names it; that of this process if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        netns: Option<String>,
        /// Its hardware address; the first free one from 52:54:00:12:34:56 on if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<String>")]
        mac: Option<MacAddress>,
        /// Bytes per second, each way; no limit if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        bps: Option<Bytes>,
        /// Bytes at once after a time of rest; a tenth of a second's if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        bps_burst: Option<Bytes>,
        /// Packets per second, each way; no limit if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1))]
        pps: Option<u64>,
        /// Packets at once after a time of rest; a tenth of a second's if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1))]
        pps_burst: Option<u64>,
    },
    /// Memory that grows and shrinks while the machine runs. A template that is made of a machine file has none.
    #[serde(rename = "virtio-mem")]
    Mem {
        /// What it is called; `mem0`, `mem1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// Id of its memory backend.
        memory: String,
        /// How much of it the guest is to have.
        #[serde(default, skip_serializing_if = "is_default")]
        requested: Bytes,
        /// What is plugged at once: a power of two; 2 MiB if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        block: Option<Bytes>,
        /// The node that it belongs to.
        #[serde(default, skip_serializing_if = "is_default")]
        node: u32,
        /// Whether what is plugged is taken from the host at once.
        #[serde(default, skip_serializing_if = "is_default")]
        prealloc: bool,
        /// Its first guest physical address; the first that fits if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        address: Option<u64>,
    },
    /// A small disk that tells the guest who it is: in each clone something else (docs/identity.md).
    #[serde(rename = "document")]
    Document {
        /// What it is called; `document0` if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
    },
    /// Ports between programs of the guest and of the host.
    #[serde(rename = "virtio-console")]
    Console {
        /// What it is called; `console0`, `console1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// Its ports: at most 16.
        ports: Vec<PortTable>,
    },
    /// Memory that the guest gives away and takes back.
    #[serde(rename = "virtio-balloon")]
    Balloon {
        /// What it is called; `balloon0` if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// Whether the guest takes memory back before it ends programs for want of it.
        #[serde(default, skip_serializing_if = "is_default", rename = "deflate-on-oom")]
        deflate_on_oom: bool,
        /// Whether the guest says which of its pages are free, so that they are discarded.
        #[serde(
            default,
            skip_serializing_if = "is_default",
            rename = "free-page-reporting"
        )]
        free_page_reporting: bool,
    },
    /// A disk that another process serves (vhost-user): all memory must be shared with it.
    #[serde(rename = "vhost-user-blk")]
    VhostUserBlock {
        /// What it is called; `vhost-user0`, `vhost-user1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// The Unix socket on which the process listens.
        socket: PathBuf,
    },
    /// A network device that another process serves (vhost-user): all memory must be shared with it.
    #[serde(rename = "vhost-user-net")]
    VhostUserNet {
        /// What it is called; `vhost-user0`, `vhost-user1`, ... if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Its device number on the bus; the first free one if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 31))]
        slot: Option<u8>,
        /// The Unix socket on which the process listens.
        socket: PathBuf,
        /// Its hardware address; the first free one from 52:54:00:12:34:56 on if left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<String>")]
        mac: Option<MacAddress>,
    },
}

impl DeviceTable {
    /// The name and the kind of a device that another process serves.
    pub fn in_other_process(&self) -> Option<(&str, &'static str)> {
        match self {
            Self::VhostUserBlock { .. } => Some((self.name(), "vhost-user-blk")),
            Self::VhostUserNet { .. } => Some((self.name(), "vhost-user-net")),
            _ => None,
        }
    }

    /// What it is called, or what it is.
    pub fn name(&self) -> &str {
        let (id, word) = match self {
            Self::Rng { id, .. } => (id, "virtio-rng"),
            Self::Block { id, .. } => (id, "virtio-blk"),
            Self::Net { id, .. } => (id, "virtio-net"),
            Self::Vsock { id, .. } => (id, "virtio-vsock"),
            Self::Document { id, .. } => (id, "document"),
            Self::Console { id, .. } => (id, "virtio-console"),
            Self::Balloon { id, .. } => (id, "virtio-balloon"),
            Self::VhostUserBlock { id, .. } => (id, "vhost-user-blk"),
            Self::VhostUserNet { id, .. } => (id, "vhost-user-net"),
            Self::Mem { id, .. } => (id, "virtio-mem"),
        };
        id.as_deref().unwrap_or(word)
    }
}

impl TryFrom<&DeviceTable> for DeviceParts {
    type Error = String;

    fn try_from(table: &DeviceTable) -> Result<Self, String> {
        Ok(match table.clone() {
            DeviceTable::Rng { id, slot } => device(id, slot, DeviceKind::Rng),
            DeviceTable::Document { id, slot } => device(id, slot, DeviceKind::Document),
            table @ DeviceTable::Mem { .. } => mem(table)?,
            DeviceTable::Vsock {
                id,
                slot,
                cid,
                uds_path: path,
            } => device(id, slot, DeviceKind::Vsock(VsockParts { cid, path })),
            DeviceTable::Console { id, slot, ports } => {
                let ports: Result<_, _> = ports.iter().map(PortParts::try_from).collect();
                Self {
                    id,
                    slot,
                    kind: DeviceKind::Console(ConsoleParts { ports: ports? }),
                }
            }
            DeviceTable::Balloon {
                id,
                slot,
                deflate_on_oom,
                free_page_reporting,
            } => {
                let balloon = BalloonParts {
                    deflate_on_oom,
                    free_page_reporting,
                };
                device(id, slot, DeviceKind::Balloon(balloon))
            }
            DeviceTable::VhostUserBlock { id, slot, socket } => {
                device(id, slot, vhost_user(socket, VhostUserFunction::Block))
            }
            DeviceTable::VhostUserNet {
                id,
                slot,
                socket,
                mac,
            } => device(id, slot, vhost_user(socket, VhostUserFunction::Net { mac })),
            DeviceTable::Block {
                id,
                slot,
                path,
                readonly,
                snapshot,
                serial,
                bps,
                bps_burst,
                iops,
                iops_burst,
            } => Self {
                id,
                slot,
                kind: DeviceKind::Block(DiskParts {
                    path,
                    access: match (readonly, snapshot) {
                        // Nobody writes it: there is nothing to keep apart.
                        (true, _) => DiskAccess::Read,
                        (false, true) => DiskAccess::Snapshot,
                        (false, false) => DiskAccess::Write,
                    },
                    serial,
                    limits: limits(bps, bps_burst, (iops, iops_burst), "requests")?,
                }),
            },
            DeviceTable::Net {
                id,
                slot,
                tap,
                netns,
                mac,
                bps,
                bps_burst,
                pps,
                pps_burst,
            } => {
                if tap.is_none() && netns.is_some() {
                    return Err("netns says where a tap is: say tap too".to_owned());
                }
                let tap = tap.map(|tap| TapSpec::new(&tap, netns.as_deref()));
                let tap = tap.transpose()?;
                let limits = limits(bps, bps_burst, (pps, pps_burst), "packets")?;
                Self {
                    id,
                    slot,
                    kind: DeviceKind::Net(NetParts { tap, mac, limits }),
                }
            }
        })
    }
}

fn device(id: Option<String>, slot: Option<u8>, kind: DeviceKind) -> DeviceParts {
    DeviceParts { id, slot, kind }
}

fn vhost_user(socket: PathBuf, function: VhostUserFunction) -> DeviceKind {
    DeviceKind::VhostUser(VhostUserParts { socket, function })
}

impl From<&DeviceSpec> for DeviceTable {
    fn from(device: &DeviceSpec) -> Self {
        let (id, slot) = (Some(device.id().to_owned()), Some(device.slot()));
        match device.kind().clone() {
            DeviceKind::Rng => Self::Rng { id, slot },
            DeviceKind::Document => Self::Document { id, slot },
            DeviceKind::Mem(mem) => Self::Mem {
                id,
                slot,
                memory: mem.backend,
                requested: Bytes(mem.requested_bytes),
                block: mem.block_bytes.map(Bytes),
                node: mem.node,
                prealloc: mem.prealloc,
                address: mem.guest_address,
            },
            DeviceKind::Vsock(VsockParts { cid, path }) => Self::Vsock {
                id,
                slot,
                cid,
                uds_path: path,
            },
            DeviceKind::Console(ConsoleParts { ports }) => Self::Console {
                id,
                slot,
                ports: ports.iter().map(PortTable::from).collect(),
            },
            DeviceKind::Balloon(BalloonParts {
                deflate_on_oom,
                free_page_reporting,
            }) => Self::Balloon {
                id,
                slot,
                deflate_on_oom,
                free_page_reporting,
            },
            DeviceKind::VhostUser(VhostUserParts { socket, function }) => match function {
                VhostUserFunction::Block => Self::VhostUserBlock { id, slot, socket },
                VhostUserFunction::Net { mac } => Self::VhostUserNet {
                    id,
                    slot,
                    socket,
                    mac,
                },
            },
            DeviceKind::Block(DiskParts {
                path,
                access,
                serial,
                limits,
            }) => Self::Block {
                id,
                slot,
                path,
                readonly: access == DiskAccess::Read,
                snapshot: access == DiskAccess::Snapshot,
                serial,
                bps: limits.bytes.map(Rate::per_second).map(Bytes),
                bps_burst: limits.bytes.map(Rate::burst).map(Bytes),
                iops: limits.requests.map(Rate::per_second),
                iops_burst: limits.requests.map(Rate::burst),
            },
            DeviceKind::Net(NetParts { tap, mac, limits }) => Self::Net {
                id,
                slot,
                netns: (tap.as_ref()).and_then(|tap| tap.namespace().map(str::to_owned)),
                tap: tap.map(|tap| tap.name().to_owned()),
                mac,
                bps: limits.bytes.map(Rate::per_second).map(Bytes),
                bps_burst: limits.bytes.map(Rate::burst).map(Bytes),
                pps: limits.requests.map(Rate::per_second),
                pps_burst: limits.requests.map(Rate::burst),
            },
        }
    }
}

/// Memory that grows and shrinks.
fn mem(table: DeviceTable) -> Result<DeviceParts, String> {
    let DeviceTable::Mem {
        id,
        slot,
        memory,
        requested,
        block,
        node,
        prealloc,
        address,
    } = table
    else {
        return Err("it is no virtio-mem".to_owned());
    };
    let kind = DeviceKind::Mem(MemParts {
        backend: memory,
        requested_bytes: requested.0,
        block_bytes: block.map(|block| block.0),
        node,
        prealloc,
        guest_address: address,
        bytes: 0,
    });
    Ok(DeviceParts { id, slot, kind })
}

/// The limits of bytes and of what a device has beside.
pub fn limits(
    bps: Option<Bytes>,
    bps_burst: Option<Bytes>,
    (rate, rate_burst): (Option<u64>, Option<u64>),
    what: &'static str,
) -> Result<Limits, String> {
    let bytes = |bytes: Option<Bytes>| bytes.map(|bytes| bytes.0);
    let bytes = Rate::new(bytes(bps), bytes(bps_burst), "bytes");
    let requests = Rate::new(rate, rate_burst, what);
    Ok(Limits {
        bytes: bytes.map_err(|fault| fault.to_string())?,
        requests: requests.map_err(|fault| fault.to_string())?,
    })
}
