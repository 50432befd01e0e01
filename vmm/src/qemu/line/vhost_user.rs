#![forbid(unsafe_code)]
//! Devices in other processes: `-device vhost-user-blk-pci`, `-netdev vhost-user` and the chardevs that lead to
//! them; and `-device x-pci-proxy-dev`, which is refused when it is known what memory the machine has.

use std::path::PathBuf;

use super::chardev::{Address, Chardev, Role};
use super::netdev::{NetDevice, duplicate, no_netdev};
use super::pci::only;
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::{DeviceKind, VhostUserFunction, VhostUserParts};

/// Drivers of `-device` for disks, the same under several names.
pub(super) const DRIVERS: [&str; 3] = [
    "vhost-user-blk-pci",
    "vhost-user-blk",
    "vhost-user-blk-pci-non-transitional",
];
/// A device of QEMU's multi-process kind.
const PROXY: &str = "x-pci-proxy-dev";

/// What leads to devices in other processes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VhostUser {
    netdevs: Vec<Netdev>,
    /// Sockets of chardevs, for devices that come while the machine runs.
    sockets: Vec<(String, Chardev)>,
    /// Devices that are refused.
    pub proxies: Vec<Proxy>,
}

/// A device of QEMU's multi-process kind, as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// What it is called.
    pub id: Option<String>,
    /// The socket to its process.
    pub fd: Option<String>,
    /// The option.
    pub typed: String,
}

/// A network whose other end is a process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Netdev {
    id: String,
    backend: Backend,
    typed: String,
}

/// The way to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backend {
    chardev: String,
    /// Where it listens, when that is known.
    socket: Option<PathBuf>,
}

/// Networks that no device has yet.
pub(super) struct FreeNetdevs<'a> {
    all: &'a [Netdev],
    free: Vec<&'a Netdev>,
}

impl VhostUser {
    /// Takes a netdev of this kind; gives the properties of any other back.
    pub(super) fn netdev(
        &mut self,
        mut props: Props,
        is_taken: &dyn Fn(&str) -> bool,
        typed: &str,
    ) -> Result<Option<Props>, OptionError> {
        let kind = props.required("type")?;
        if kind != "vhost-user" {
            props.add("type", &kind);
            return Ok(Some(props));
        }
        let id = props.required("id")?;
        let backend = Backend {
            chardev: props.required("chardev")?,
            socket: None,
        };
        only(&mut props, "queues", &["1"])?;
        // There is no other way.
        props.switch("vhostforce")?;
        props.finish()?;
        if is_taken(&id) || self.has_netdev(&id) {
            return Err(duplicate(&id));
        }
        self.netdevs.push(Netdev {
            id,
            backend,
            typed: typed.to_owned(),
        });
        Ok(None)
    }

    /// Whether there is a netdev of this kind and name.
    pub fn has_netdev(&self, id: &str) -> bool {
        self.netdevs.iter().any(|netdev| netdev.id == id)
    }

    /// Takes a device of the multi-process kind; gives the properties of any other back.
    pub(super) fn proxy(
        &mut self,
        mut props: Props,
        typed: &str,
    ) -> Result<Option<Props>, OptionError> {
        let driver = props.required("driver")?;
        if driver != PROXY {
            props.add("driver", &driver);
            return Ok(Some(props));
        }
        self.proxies.push(Proxy {
            id: props.text("id")?,
            fd: props.text("fd")?,
            typed: typed.to_owned(),
        });
        Ok(None)
    }

    /// Says where the processes listen: `chardev_of` finds a chardev that nobody has.
    pub(super) fn connect(
        &mut self,
        chardev_of: &mut dyn FnMut(&str) -> Option<Chardev>,
    ) -> Result<(), OptionError> {
        for netdev in &mut self.netdevs {
            let connected = netdev.backend.connect(chardev_of);
            connected.map_err(|error| error.at(&netdev.typed))?;
        }
        Ok(())
    }

    /// Keeps chardevs for devices that come later.
    pub(super) fn keep(&mut self, chardevs: Vec<(String, Chardev)>) {
        self.sockets = chardevs;
    }

    /// A chardev for a device that comes now.
    pub fn chardev(&self, id: &str) -> Option<Chardev> {
        let found = self.sockets.iter().find(|(other, _)| other == id);
        found.map(|(_, chardev)| chardev.clone())
    }

    /// Networks of this kind, for devices that take them.
    pub(super) fn free(&self) -> FreeNetdevs<'_> {
        FreeNetdevs {
            all: &self.netdevs,
            free: self.netdevs.iter().collect(),
        }
    }
}

impl FreeNetdevs<'_> {
    /// What a network device is whose netdev is of this kind; `None` where it is of another.
    pub(super) fn take(&mut self, net: &NetDevice) -> Result<Option<DeviceKind>, OptionError> {
        let Some(id) = &net.netdev else {
            return Ok(None);
        };
        if self.all.iter().all(|netdev| netdev.id != *id) {
            return Ok(None);
        }
        let at = self.free.iter().position(|netdev| netdev.id == *id);
        let netdev = self.free.remove(at.ok_or_else(|| no_netdev(id, true))?);
        let function = VhostUserFunction::Net { mac: net.mac };
        netdev.backend.device(function).map(Some)
    }
}

impl Backend {
    /// Takes the properties that are of such a disk only.
    pub(super) fn read(props: &mut Props) -> Result<Self, OptionError> {
        let chardev = props.text("chardev")?;
        let chardev = chardev.ok_or_else(|| OptionError::new("chardev is mandatory"))?;
        only(props, "num-queues", &["1"])?;
        only(props, "queue-size", &["128"])?;
        only(props, "config-wce", &["off"])?;
        Ok(Self {
            chardev,
            socket: None,
        })
    }

    /// Says where the process listens.
    pub(super) fn connect(
        &mut self,
        chardev_of: &mut dyn FnMut(&str) -> Option<Chardev>,
    ) -> Result<(), OptionError> {
        let id = &self.chardev;
        let wrong = |why: &str| Err(OptionError::new(format!("chardev '{id}' {why}")));
        match chardev_of(id) {
            None => {
                return Err(OptionError::new(format!(
                    "Property 'vhost-user.chardev' can't find value '{id}', or it's in use"
                )));
            }
            Some(Chardev::Socket {
                address: Address::Unix(path),
                role: Role::Client,
            }) => self.socket = Some(path),
            Some(Chardev::Socket {
                address: Address::Unix(_),
                role: Role::Server { .. },
            }) => {
                return wrong(
                    "listens: a vhost-user backend listens itself, so leave server=on out and start it first",
                );
            }
            Some(_) => {
                return wrong(
                    "is no Unix socket, by which alone memory can be shared: say socket,id=ID,path=PATH",
                );
            }
        }
        Ok(())
    }

    /// The disk that it is.
    pub(super) fn disk(&self) -> Result<DeviceKind, OptionError> {
        self.device(VhostUserFunction::Block)
    }

    fn device(&self, function: VhostUserFunction) -> Result<DeviceKind, OptionError> {
        let socket = self
            .socket
            .clone()
            .ok_or_else(|| OptionError::new(format!("chardev '{}' leads nowhere", self.chardev)))?;
        Ok(DeviceKind::VhostUser(VhostUserParts { socket, function }))
    }
}
