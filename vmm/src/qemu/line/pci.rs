#![forbid(unsafe_code)]
//! Devices on the PCI bus: `-drive`, `-blockdev`, `-device virtio-*-pci` and the objects that they name.
//! What networks have of their own is in [`super::netdev`].

use std::path::PathBuf;

use super::netdev::{NET_DRIVERS, NetDevice, Netdevs};
use crate::qemu::error::{OptionError, missing};
use crate::qemu::words::{Form, Props};
use crate::spec::{DeviceKind, DeviceParts, DiskAccess, DiskParts};

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
    netdevs: Netdevs,
    /// `-device`
    devices: Vec<Device>,
}

/// An image that a device can name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    id: String,
    disk: DiskParts,
    /// Of a blockdev that another one has as its file.
    is_file_node: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    id: Option<String>,
    slot: Option<u8>,
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
    Net(NetDevice),
}

impl PciDevices {
    /// Reads an option of this kind; whether it is one.
    pub fn option(&mut self, name: &str, value: &str, typed: &str) -> Result<bool, OptionError> {
        match name {
            "drive" => self.drive(value, typed)?,
            "blockdev" => self.blockdev(value)?,
            "netdev" => self.netdevs.read(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Reads `-object`, if it is a source of entropy; whether it is.
    pub fn object(&mut self, value: &str) -> Result<bool, OptionError> {
        let mut props = Props::parse(value, Some("qom-type"), Form::KeyValue)?;
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
    pub fn device(&mut self, mut props: Props, typed: &str) -> Result<Option<Props>, OptionError> {
        let driver = props.required("driver")?;
        let is_block = BLOCK_DRIVERS.contains(&driver.as_str());
        let is_net = NET_DRIVERS.contains(&driver.as_str());
        if !is_block && !is_net && !RNG_DRIVERS.contains(&driver.as_str()) {
            props.add("driver", &driver);
            return Ok(Some(props));
        }
        let id = props.text("id")?;
        if let Some(bus) = props.text("bus")?
            && !matches!(bus.as_str(), "pci.0" | "pcie.0")
        {
            return Err(OptionError::new(format!("Bus '{bus}' not found")));
        }
        let slot = props.text("addr")?.map(|text| slot(&text)).transpose()?;
        let what = if is_block {
            What::Block {
                drive: props
                    .text("drive")?
                    .ok_or_else(|| OptionError::new("drive property not set"))?,
                serial: props.text("serial")?,
            }
        } else if is_net {
            What::Net(NetDevice::read(&mut props)?)
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
        self.devices.push(Device {
            id,
            slot,
            what,
            typed: typed.to_owned(),
        });
        Ok(None)
    }

    fn drive(&mut self, value: &str, typed: &str) -> Result<(), OptionError> {
        let mut props = Props::parse(value, None, Form::KeyValue)?;
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
        self.add(id.clone(), path.into(), access)?;
        if interface == "virtio" {
            self.devices.push(Device {
                id: Some(id.clone()),
                slot: None,
                what: What::Block {
                    drive: id,
                    serial: None,
                },
                typed: typed.to_owned(),
            });
        }
        Ok(())
    }

    fn blockdev(&mut self, value: &str) -> Result<(), OptionError> {
        let mut props = Props::parse(value, Some("driver"), Form::KeyValue)?;
        let driver = props.required("driver")?;
        let node = props.required("node-name")?;
        let read_only = props.switch("read-only")?.unwrap_or(false);
        only(&mut props, "discard", &["unmap"])?;
        only(&mut props, "cache.direct", &["off"])?;
        only(&mut props, "cache.no-flush", &["off"])?;
        only(&mut props, "auto-read-only", &["off"])?;
        let access = |read_only| {
            if read_only {
                DiskAccess::Read
            } else {
                DiskAccess::Write
            }
        };
        match driver.as_str() {
            "file" => {
                let path = props.required("filename")?;
                only(&mut props, "aio", &["threads"])?;
                props.finish()?;
                self.add(node, path.into(), access(read_only))
            }
            "raw" => {
                if let Some(file) = props.text("file")? {
                    props.finish()?;
                    let inner = self.images.iter_mut().find(|image| image.id == file);
                    let inner = inner.ok_or_else(|| {
                        OptionError::new(format!("Cannot find device='' nor node-name='{file}'"))
                    })?;
                    inner.is_file_node = true;
                    let is_readable_only = inner.disk.access == DiskAccess::Read;
                    let path = inner.disk.path.clone();
                    return self.add(node, path, access(read_only || is_readable_only));
                }
                only(&mut props, "file.driver", &["file"])?;
                let path = props.required("file.filename")?;
                props.finish()?;
                self.add(node, path.into(), access(read_only))
            }
            other => Err(OptionError::new(format!(
                "driver '{other}' cannot be had: images are raw files, so say driver=file or driver=raw"
            ))),
        }
    }

    fn add(&mut self, id: String, path: PathBuf, access: DiskAccess) -> Result<(), OptionError> {
        if self.images.iter().any(|image| image.id == id) {
            return Err(OptionError::new(format!("Duplicate ID '{id}' for drive")));
        }
        let disk = DiskParts {
            path,
            access,
            serial: None,
        };
        self.images.push(Image {
            id,
            disk,
            is_file_node: false,
        });
        Ok(())
    }

    /// The devices, each with its image. An image that no device has is refused: nobody would see it.
    pub fn parts(&self) -> Result<Vec<DeviceParts>, OptionError> {
        let mut free: Vec<&Image> = self.images.iter().collect();
        free.retain(|image| !image.is_file_node);
        let mut parts = Vec::new();
        let mut taken = Vec::new();
        for device in &self.devices {
            let kind = match &device.what {
                What::Rng { source } => {
                    if let Some(source) = source
                        && !self.sources.contains(source)
                    {
                        let error = format!("Device '{source}' not found");
                        return Err(OptionError::new(error).at(&device.typed));
                    }
                    DeviceKind::Rng
                }
                What::Net(net) => {
                    let net = self.netdevs.parts(net, &mut taken);
                    DeviceKind::Net(net.map_err(|error| error.at(&device.typed))?)
                }
                What::Block { drive, serial } => {
                    let at = free.iter().position(|image| image.id == *drive);
                    let at = at.ok_or_else(|| {
                        let known = self.images.iter().any(|image| image.id == *drive);
                        let error = if known {
                            format!("Drive '{drive}' is already in use by another block device")
                        } else {
                            format!("Property 'virtio-blk-device.drive' can't find value '{drive}'")
                        };
                        OptionError::new(error).at(&device.typed)
                    })?;
                    let mut disk = free.remove(at).disk.clone();
                    disk.serial.clone_from(serial);
                    DeviceKind::Block(disk)
                }
            };
            parts.push(DeviceParts {
                id: device.id.clone(),
                slot: device.slot,
                kind,
            });
        }
        self.netdevs.check_taken(&taken)?;
        match free.first() {
            Some(image) => Err(OptionError::new(format!(
                "no device has the drive '{}': add -device virtio-blk-pci,drive={0}, or say if=virtio",
                image.id
            ))),
            None => Ok(parts),
        }
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

/// A device number and, behind a dot, a function, both hexadecimal.
fn slot(text: &str) -> Result<u8, OptionError> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let digits = slot.strip_prefix("0x").unwrap_or(slot);
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let slot = u8::from_str_radix(digits, 16).ok().filter(|_| is_number);
    match (slot, function) {
        (Some(slot @ 1..32), "0") => Ok(slot),
        _ => Err(OptionError::new(format!(
            "addr={text} cannot be had: a device is function 0 of slot 01 to 1f of the bus"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &[(&str, &str)]) -> Result<Vec<DeviceParts>, OptionError> {
        let mut devices = PciDevices::default();
        for (name, value) in options {
            match *name {
                "device" => {
                    let props = Props::parse(value, Some("driver"), Form::KeyValue)?;
                    assert!(devices.device(props, "-device ...")?.is_none());
                }
                "object" => assert!(devices.object(value)?),
                name => assert!(devices.option(name, value, "-drive ...")?),
            }
        }
        devices.parts()
    }

    fn disk(id: Option<&str>, slot: Option<u8>, access: DiskAccess) -> DeviceParts {
        DeviceParts {
            id: id.map(str::to_owned),
            slot,
            kind: DeviceKind::Block(DiskParts {
                path: "d.img".into(),
                access,
                serial: None,
            }),
        }
    }

    #[test]
    fn a_drive_is_a_disk_by_itself_or_by_its_device() {
        let drive = "file=d.img,if=virtio,format=raw,cache=writeback,aio=threads";
        let expected = [disk(Some("virtio0"), None, DiskAccess::Write)];
        assert_eq!(read(&[("drive", drive)]).unwrap(), expected);
        let device = "virtio-blk-pci,drive=a,id=x,addr=0x1f.0,bus=pcie.0";
        for (option, image, access) in [
            (
                "drive",
                "file=d.img,if=none,id=a,readonly=on",
                DiskAccess::Read,
            ),
            (
                "drive",
                "file=d.img,if=none,id=a,snapshot=on",
                DiskAccess::Snapshot,
            ),
            (
                "blockdev",
                "file,node-name=a,filename=d.img",
                DiskAccess::Write,
            ),
            (
                "blockdev",
                "driver=raw,node-name=a,file.driver=file,file.filename=d.img,read-only=on",
                DiskAccess::Read,
            ),
            (
                "blockdev",
                r#"{"driver": "file", "node-name": "a", "filename": "d.img", "read-only": true}"#,
                DiskAccess::Read,
            ),
        ] {
            let parts = read(&[(option, image), ("device", device)]).unwrap();
            assert_eq!(parts, [disk(Some("x"), Some(31), access)], "{image}");
        }
        let chain = [
            ("blockdev", "file,node-name=f,filename=d.img,read-only=on"),
            ("blockdev", "raw,node-name=a,file=f"),
            ("device", "virtio-blk,drive=a"),
        ];
        assert_eq!(read(&chain).unwrap(), [disk(None, None, DiskAccess::Read)]);
    }

    #[test]
    fn entropy_has_the_kernels_source() {
        let source = ("object", "rng-random,id=r,filename=/dev/urandom");
        let parts = read(&[source, ("device", "virtio-rng-pci,rng=r")]).unwrap();
        assert_eq!(parts[0].kind, DeviceKind::Rng);
        assert_eq!(read(&[("device", "virtio-rng-pci")]).unwrap(), parts);
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (options, text) in [
            (&[("drive", "file=a")][..], "if=ide cannot be had"),
            (&[("drive", "if=virtio")], "'file' is missing"),
            (
                &[("drive", "file=a,if=virtio,format=qcow2")],
                "format=qcow2 cannot be had: format=raw",
            ),
            (
                &[("drive", "file=a,if=virtio,cache=none")],
                "cache=none cannot be had",
            ),
            (
                &[("drive", "file=a,if=virtio,bps=5")],
                "Invalid parameter 'bps'",
            ),
            (
                &[("drive", "file=a,if=none,id=a")],
                "no device has the drive 'a'",
            ),
            (
                &[("blockdev", "qcow2,node-name=a")],
                "driver 'qcow2' cannot be had",
            ),
            (&[("blockdev", "raw,node-name=a,file=b")], "node-name='b'"),
            (&[("device", "virtio-blk-pci")], "drive property not set"),
            (
                &[("device", "virtio-blk-pci,drive=a")],
                "can't find value 'a'",
            ),
            (
                &[("device", "virtio-rng-pci,rng=r")],
                "Device 'r' not found",
            ),
            (
                &[("device", "virtio-rng-pci,max-bytes=5")],
                "'virtio-rng-pci.max-bytes' not found",
            ),
            (
                &[("device", "virtio-rng-pci,addr=20")],
                "addr=20 cannot be had",
            ),
            (
                &[("device", "virtio-rng-pci,addr=4.1")],
                "addr=4.1 cannot be had",
            ),
            (
                &[("device", "virtio-rng-pci,bus=pci.1")],
                "Bus 'pci.1' not found",
            ),
            (
                &[("object", "rng-random,id=r,filename=/x")],
                "filename=/x cannot be had",
            ),
        ] {
            let error = read(options).unwrap_err().to_string();
            assert!(error.contains(text), "{options:?}: {error}");
        }
        let twice = [
            ("drive", "file=a,if=virtio,id=d"),
            ("device", "virtio-blk-pci,drive=d"),
        ];
        assert!(
            read(&twice)
                .unwrap_err()
                .to_string()
                .contains("already in use")
        );
    }
}
