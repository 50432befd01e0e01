#![forbid(unsafe_code)]
//! Devices on the PCI bus: `-drive`, `-blockdev`, `-device virtio-*-pci` and the objects that they name. What
//! monitors say of them (`blockdev-add`, `device_add`) is read here too. What networks have of their own is
//! in [`super::netdev`].

mod root_port;

use self::root_port::RootPorts;
use super::balloon;
use super::chardev::Chardev;
use super::console::{self, Port};
use super::mem;
use super::netdev::{self, NET_DRIVERS, NetDevice, Netdev, no_netdev};
use super::place::words;
use super::throttle;
use super::vhost_user::{self, Backend, VhostUser};
use super::vsock;
use crate::qemu::error::{OptionError, missing};
use crate::qemu::words::{Form, Props};
use crate::spec::{
    BalloonParts, DeviceKind, DeviceParts, DiskAccess, DiskParts, MemParts, TapSpec, VsockParts,
};

pub use super::blockdev::{blockdev, is_file_node, no_drive};

/// Drivers of `-device`, each with its other names.
const BLOCK_DRIVERS: [&str; 3] = [
    "virtio-blk-pci",
    "virtio-blk",
    "virtio-blk-pci-non-transitional",
];
const RNG_DRIVERS: [&str; 3] = [
    "virtio-rng-pci",
    "virtio-rng",
    "virtio-rng-pci-non-transitional",
];

/// What options say of devices on the bus.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PciDevices {
    /// `-drive` and `-blockdev`
    images: Vec<Image>,
    /// `-object rng-*`
    sources: Vec<String>,
    /// `-netdev`
    netdevs: Vec<Netdev>,
    /// `-device`
    devices: Vec<Device>,
    /// Ports, by which devices can name the bus.
    pub(in crate::qemu) root_ports: RootPorts,
    /// What leads to devices in other processes.
    pub(in crate::qemu) vhost_user: VhostUser,
}

/// An image that a device can name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What it is called.
    pub id: String,
    /// The file and what becomes of what is written.
    pub disk: DiskParts,
    /// The blockdev that it has as its file.
    pub file_node: Option<String>,
    /// Whether it is a drive, which goes with its device; a blockdev stays.
    pub is_drive: bool,
}

/// A device as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What it is called.
    pub id: Option<String>,
    /// Its place.
    pub slot: Option<u8>,
    /// Its driver, as it was typed.
    pub driver: String,
    what: What,
    typed: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Rng {
        source: Option<String>,
    },
    Block {
        drive: String,
        serial: Option<String>,
    },
    Vsock(VsockParts),
    Net(NetDevice),
    Console(console::Bus),
    VhostUser(Backend),
    Balloon(BalloonParts),
    Mem(MemParts),
}

impl PciDevices {
    /// Reads an option of this kind; whether it is one.
    pub fn option(&mut self, name: &str, value: &str, typed: &str) -> Result<bool, OptionError> {
        match name {
            "drive" => self.drive(value, typed)?,
            "blockdev" => {
                let image = blockdev(words(value, "driver")?, &self.images)?;
                self.images.push(image);
            }
            "netdev" => {
                let is_taken = |id: &str| self.netdevs.iter().any(|other| other.id == id);
                let props = words(value, "type")?;
                let Some(props) = self.vhost_user.netdev(props, &is_taken, typed)? else {
                    return Ok(true);
                };
                let new = netdev::netdev(props)?;
                if is_taken(&new.id) || self.vhost_user.has_netdev(&new.id) {
                    return Err(netdev::duplicate(&new.id));
                }
                self.netdevs.push(new);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Reads `-object`, if it is a source of entropy; whether it is.
    pub fn object(&mut self, value: &str) -> Result<bool, OptionError> {
        let mut props = Props::parse(value, Some("qom-type"), Form::SwitchesOrJson)?;
        let kind = props.text("qom-type").ok().flatten().unwrap_or_default();
        if !matches!(kind.as_str(), "rng-random" | "rng-builtin") {
            return Ok(false);
        }
        let id = props.required("id")?;
        if kind == "rng-random"
            && let Some(file) = props.text("filename")?
            && !matches!(file.as_str(), "/dev/urandom" | "/dev/random")
        {
            return Err(OptionError::new(format!(
                "filename={file} cannot be had: entropy is the kernel's, /dev/urandom"
            )));
        }
        props.finish()?;
        self.sources.push(id);
        Ok(true)
    }

    /// Takes a device of this kind; gives the properties of any other back.
    pub fn device(&mut self, props: Props, typed: &str) -> Result<Option<Props>, OptionError> {
        let props = match Port::read(props, typed)? {
            Ok(port) => return self.port(port).map(|()| None),
            Err(props) => props,
        };
        let Some(props) = self.vhost_user.proxy(props, typed)? else {
            return Ok(None);
        };
        let Some(props) = self.root_ports.read(props)? else {
            return Ok(None);
        };
        match Device::read(props, typed, &self.root_ports)? {
            Ok(device) => {
                self.devices.push(device);
                Ok(None)
            }
            Err(props) => Ok(Some(props)),
        }
    }

    /// Puts a port on its device, which comes first on the line.
    fn port(&mut self, port: Port) -> Result<(), OptionError> {
        let mut buses = self.devices.iter_mut().filter_map(|device| {
            let name = device.id.as_ref().map(|id| format!("{id}.0"));
            match &mut device.what {
                What::Console(bus) => Some((name, bus)),
                _ => None,
            }
        });
        let found = buses.find(|(name, _)| port.bus.is_none() || *name == port.bus);
        let (_, bus) = found.ok_or_else(|| port.no_bus())?;
        bus.ports.push(port);
        Ok(())
    }

    /// Says where ports lead to: `chardev_of` finds a chardev that nobody has.
    pub(super) fn connect_ports(
        &mut self,
        mut chardev_of: impl FnMut(&str) -> Option<Chardev>,
    ) -> Result<(), OptionError> {
        self.vhost_user.connect(&mut chardev_of)?;
        for device in &mut self.devices {
            let bus = match &mut device.what {
                What::Console(bus) => bus,
                What::VhostUser(backend) => {
                    let connected = backend.connect(&mut chardev_of);
                    connected.map_err(|error| error.at(&device.typed))?;
                    continue;
                }
                _ => continue,
            };
            for port in &mut bus.ports {
                let chardev = port.chardev.as_deref().and_then(&mut chardev_of);
                port.connect(chardev)
                    .map_err(|error| error.at(&port.typed))?;
            }
        }
        Ok(())
    }

    fn drive(&mut self, value: &str, typed: &str) -> Result<(), OptionError> {
        let mut props = Props::parse(value, None, Form::Switches)?;
        let path = props.text("file")?.ok_or_else(|| missing("file"))?;
        let interface = props.text("if")?.unwrap_or_else(|| "ide".to_owned());
        if !matches!(interface.as_str(), "virtio" | "none") {
            return Err(OptionError::new(format!(
                "if={interface} cannot be had: disks are virtio, so say if=virtio, or if=none and -device \
                 virtio-blk-pci"
            )));
        }
        only(&mut props, "format", &["raw"])?;
        only(&mut props, "media", &["disk"])?;
        only(&mut props, "cache", &["writeback"])?;
        only(&mut props, "aio", &["threads"])?;
        only(&mut props, "discard", &["unmap", "on"])?;
        let limits = throttle::limits(&mut props)?;
        let read_only = props.switch("readonly")?;
        let read_only = read_only.or(props.switch("read-only")?).unwrap_or(false);
        let is_snapshot = props.switch("snapshot")?.unwrap_or(false);
        let number = self.images.len();
        let id = props.text("id")?;
        let id = id.unwrap_or_else(|| format!("{interface}{number}"));
        props.finish()?;
        let access = match (read_only, is_snapshot) {
            (true, _) => DiskAccess::Read,
            (false, true) => DiskAccess::Snapshot,
            (false, false) => DiskAccess::Write,
        };
        let disk = DiskParts {
            path: path.into(),
            access,
            serial: None,
            limits,
        };
        self.add(id.clone(), disk)?;
        if interface == "virtio" {
            self.devices.push(Device {
                id: Some(id.clone()),
                slot: None,
                driver: "virtio-blk-pci".to_owned(),
                what: What::Block {
                    drive: id,
                    serial: None,
                },
                typed: typed.to_owned(),
            });
        }
        Ok(())
    }

    fn add(&mut self, id: String, disk: DiskParts) -> Result<(), OptionError> {
        if self.images.iter().any(|image| image.id == id) {
            return Err(OptionError::new(format!("Duplicate ID '{id}' for drive")));
        }
        self.images.push(Image {
            id,
            disk,
            file_node: None,
            is_drive: true,
        });
        Ok(())
    }

    /// The devices, each with its image. An image that no device has waits for one.
    pub fn parts(&self) -> Result<Vec<DeviceParts>, OptionError> {
        let mut free: Vec<&Image> = self.images.iter().collect();
        free.retain(|image| !is_file_node(&self.images, &image.id));
        let mut cables: Vec<&Netdev> = self.netdevs.iter().collect();
        let mut sockets = self.vhost_user.free();
        let parts = self.devices.iter().map(|device| {
            let net = match &device.what {
                What::Net(net) => sockets.take(net),
                _ => Ok(None),
            };
            match net {
                Ok(None) => (),
                Ok(Some(kind)) => return Ok(device.as_parts(kind)),
                Err(error) => return Err(error.at(&device.typed)),
            }
            let disk_of = |drive: &str| {
                let at = free.iter().position(|image| image.id == drive);
                let known = self.images.iter().any(|image| image.id == drive);
                let at = at.ok_or_else(|| no_drive(drive, known))?;
                Ok(free.remove(at).disk.clone())
            };
            let tap_of = |id: &str| {
                let at = cables.iter().position(|netdev| netdev.id == id);
                let known = self.netdevs.iter().any(|netdev| netdev.id == id);
                let at = at.ok_or_else(|| no_netdev(id, known))?;
                Ok(cables.remove(at).tap.clone())
            };
            let parts = device.parts(&self.sources, disk_of, tap_of);
            parts.map_err(|error| error.at(&device.typed))
        });
        parts.collect()
    }

    /// All images, each with the place among the devices of the one that has it.
    pub fn images(&self) -> impl Iterator<Item = (&Image, Option<usize>)> {
        self.images.iter().map(|image| {
            let has = |device: &Device| device.drive() == Some(&image.id);
            (image, self.devices.iter().position(has))
        })
    }

    /// All netdevs, each with the place among the devices of the one that has it.
    pub fn netdevs(&self) -> impl Iterator<Item = (&Netdev, Option<usize>)> {
        self.netdevs.iter().map(|netdev| {
            let has = |device: &Device| device.netdev() == Some(&netdev.id);
            (netdev, self.devices.iter().position(has))
        })
    }

    /// The option of a memory device, as it was typed; that of the only one, where it has no name.
    pub fn typed_of_memory(&self, id: &str) -> Option<&str> {
        let mut mems = self
            .devices
            .iter()
            .filter(|device| device.memdev().is_some());
        let found = mems.find(|device| device.id.as_deref().is_none_or(|own| own == id));
        found.map(|device| device.typed.as_str())
    }

    /// Sources of entropy.
    pub fn sources(&self) -> &[String] {
        &self.sources
    }
}

impl Device {
    /// Reads a device on the bus; gives the properties of any other back.
    pub fn read(
        mut props: Props,
        typed: &str,
        ports: &RootPorts,
    ) -> Result<Result<Self, Props>, OptionError> {
        let driver = props.required("driver")?;
        let is_block = BLOCK_DRIVERS.contains(&driver.as_str());
        let is_vsock = vsock::DRIVERS.contains(&driver.as_str());
        let is_net = NET_DRIVERS.contains(&driver.as_str());
        let is_console = console::DRIVERS.contains(&driver.as_str());
        let is_balloon = balloon::DRIVERS.contains(&driver.as_str());
        let is_vhost_user = vhost_user::DRIVERS.contains(&driver.as_str());
        let is_mem = mem::DRIVERS.contains(&driver.as_str());
        let is_memory = is_balloon || is_mem;
        let is_virtual = is_vsock || is_net || is_console || is_memory || is_vhost_user;
        let is_other = is_virtual || RNG_DRIVERS.contains(&driver.as_str());
        if !is_block && !is_other {
            props.add("driver", &driver);
            return Ok(Err(props));
        }
        let id = props.text("id")?;
        let (bus, address) = (props.text("bus")?, props.text("addr")?);
        let slot = ports.place(bus.as_deref(), address.as_deref())?;
        let what = if is_block {
            What::Block {
                drive: props
                    .text("drive")?
                    .ok_or_else(|| OptionError::new("drive property not set"))?,
                serial: props.text("serial")?,
            }
        } else if is_vsock {
            What::Vsock(vsock::parts(&mut props)?)
        } else if is_mem {
            What::Mem(mem::parts(&mut props)?)
        } else if is_net {
            What::Net(NetDevice::read(&mut props)?)
        } else if is_console {
            What::Console(console::Bus::read(&mut props)?)
        } else if is_vhost_user {
            What::VhostUser(Backend::read(&mut props)?)
        } else if is_balloon {
            What::Balloon(balloon::parts(&mut props)?)
        } else {
            What::Rng {
                source: props.text("rng")?,
            }
        };
        if let Some(name) = props.names().next() {
            return Err(OptionError::new(format!(
                "Property '{driver}.{name}' not found"
            )));
        }
        Ok(Ok(Self {
            id,
            slot,
            driver,
            what,
            typed: typed.to_owned(),
        }))
    }

    /// The backend of memory that grows and shrinks.
    pub fn memdev(&self) -> Option<&str> {
        match &self.what {
            What::Mem(mem) => Some(&mem.backend),
            _ => None,
        }
    }

    /// The drive of a disk.
    pub fn drive(&self) -> Option<&str> {
        match &self.what {
            What::Block { drive, .. } => Some(drive),
            _ => None,
        }
    }

    /// The netdev of a network device.
    pub fn netdev(&self) -> Option<&str> {
        match &self.what {
            What::Net(net) => net.netdev.as_deref(),
            _ => None,
        }
    }

    /// Finds the socket of a device in another process: `chardev_of` knows chardevs.
    pub fn connect(
        &mut self,
        mut chardev_of: impl FnMut(&str) -> Option<Chardev>,
    ) -> Result<(), OptionError> {
        match &mut self.what {
            What::VhostUser(backend) => backend.connect(&mut chardev_of),
            _ => Ok(()),
        }
    }

    fn as_parts(&self, kind: DeviceKind) -> DeviceParts {
        DeviceParts {
            id: self.id.clone(),
            slot: self.slot,
            kind,
        }
    }

    /// Its parts, with the disk of its drive or the tap of its netdev: `disk_of` and `tap_of` find one that
    /// nobody has.
    pub fn parts(
        &self,
        sources: &[String],
        disk_of: impl FnOnce(&str) -> Result<DiskParts, OptionError>,
        tap_of: impl FnOnce(&str) -> Result<TapSpec, OptionError>,
    ) -> Result<DeviceParts, OptionError> {
        let kind = match &self.what {
            What::Rng { source } => {
                if let Some(source) = source
                    && !sources.contains(source)
                {
                    return Err(OptionError::new(format!("Device '{source}' not found")));
                }
                DeviceKind::Rng
            }
            What::Mem(mem) => DeviceKind::Mem(mem.clone()),
            What::Vsock(vsock) => DeviceKind::Vsock(vsock.clone()),
            What::Net(net) => DeviceKind::Net(net.parts(tap_of)?),
            What::Console(bus) => DeviceKind::Console(bus.parts()?),
            What::VhostUser(backend) => backend.disk()?,
            What::Balloon(parts) => DeviceKind::Balloon(*parts),
            What::Block { drive, serial } => {
                let mut disk = disk_of(drive)?;
                disk.serial.clone_from(serial);
                DeviceKind::Block(disk)
            }
        };
        Ok(self.as_parts(kind))
    }
}

/// Refuses a property that says anything else than what is so.
pub(super) fn only(props: &mut Props, key: &str, words: &[&str]) -> Result<(), OptionError> {
    match props.text(key)? {
        Some(word) if !words.contains(&word.as_str()) => Err(OptionError::new(format!(
            "{key}={word} cannot be had: {key}={} is what there is",
            words.first().copied().unwrap_or_default()
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
