#![forbid(unsafe_code)]
//! Images that devices have or may get: drives and blockdevs, of the command line and of monitors.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use super::Vm;
use crate::device::virtio::block::backend::{Disk, DiskError};
use crate::machine::scratch_folder;
use crate::qemu::error::OptionError;
use crate::qemu::line::pci::{self, Image, PciDevices, is_file_node};
use crate::qemu::link::reason;
use crate::qemu::outputs;
use crate::qemu::qmp::message::QmpError;
use crate::qemu::words::Props;
use crate::report::one_line;
use crate::spec::{DeviceSpec, DiskAccess, DiskParts, Rate};

/// Most images that there can be: each may hold a descriptor.
const MAX_IMAGES: usize = 256;

/// All images.
#[derive(Debug, Default)]
pub(super) struct Images {
    nodes: Vec<Node>,
}

/// An image.
#[derive(Debug)]
struct Node {
    image: Image,
    /// The file, open as long as no device has it; after a device it is opened for the next one.
    opened: Option<Disk>,
    /// The device that has it.
    user: Option<String>,
}

impl Images {
    /// Those of the command line; `devices` are the machine's, in the order of theirs.
    pub(super) fn open(words: &PciDevices, devices: &[DeviceSpec]) -> Result<Self, OptionError> {
        let mut images = Self::default();
        for (image, user) in words.images() {
            let user = user.and_then(|place| devices.get(place));
            images.nodes.push(Node {
                image: image.clone(),
                opened: None,
                user: user.map(|device| device.id().to_owned()),
            });
        }
        let all = images.all();
        for node in &mut images.nodes {
            if node.user.is_none() && !is_file_node(&all, &node.image.id) {
                node.opened = Some(open(&node.image).map_err(OptionError::new)?);
            }
        }
        Ok(images)
    }

    fn all(&self) -> Vec<Image> {
        self.nodes.iter().map(|node| node.image.clone()).collect()
    }

    /// The disk of a drive that no device has.
    pub(super) fn free(&self, drive: &str) -> Result<DiskParts, OptionError> {
        let node = self.nodes.iter().find(|node| node.image.id == drive);
        let is_free = |node: &&Node| node.user.is_none() && !is_file_node(&self.all(), drive);
        node.filter(is_free)
            .map(|node| node.image.disk.clone())
            .ok_or_else(|| pci::no_drive(drive, node.is_some()))
    }

    /// The file of a drive that no device has, open.
    pub(super) fn take(&mut self, drive: &str) -> Result<Option<Disk>, String> {
        let node = self.nodes.iter_mut().find(|node| node.image.id == drive);
        let Some(node) = node else {
            return Ok(None);
        };
        match node.opened.take() {
            Some(disk) => Ok(Some(disk)),
            None => open(&node.image).map(Some),
        }
    }

    fn close(&mut self, drive: &str) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.image.id == drive) {
            node.opened = None;
        }
    }

    /// Nobody has the file of this one any more: it is kept for the next. Where that cannot be, the next hears
    /// why.
    fn reopen(&mut self, drive: &str) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.image.id == drive) {
            node.opened = open(&node.image).ok();
        }
    }

    /// From now on a device has the drive.
    pub(super) fn give(&mut self, drive: &str, device: &str) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.image.id == drive) {
            node.user = Some(device.to_owned());
        }
    }

    /// A device has gone: its drive goes with it, its blockdev is free.
    pub(super) fn release(&mut self, device: &str) {
        let has = |node: &Node| node.user.as_deref() == Some(device);
        self.nodes
            .retain(|node| !(has(node) && node.image.is_drive));
        if let Some(node) = self.nodes.iter_mut().find(|node| has(node)) {
            node.user = None;
        }
    }
}

impl Vm {
    /// `blockdev-add`
    pub(in crate::qemu) fn blockdev_add(&mut self, props: Props) -> Result<(), QmpError> {
        let all = self.images.all();
        let image = pci::blockdev(props, &all);
        let image = image.map_err(|error| QmpError::generic(error.message()))?;
        if all.len() >= MAX_IMAGES {
            return Err(QmpError::generic(format!(
                "there are {MAX_IMAGES} images, the most that there can be: use blockdev-del"
            )));
        }
        self.refuse_own_file(&image.disk.path)?;
        if let Some(inner) = &image.file_node {
            let free = self.images.free(inner);
            free.map_err(|error| QmpError::generic(error.message()))?;
            // A file has one writer: from now on that is the new one.
            self.images.close(inner);
        }
        let opened = open(&image).map_err(|error| {
            if let Some(inner) = &image.file_node {
                self.images.reopen(inner);
            }
            QmpError::generic(error)
        })?;
        self.images.nodes.push(Node {
            image,
            opened: Some(opened),
            user: None,
        });
        Ok(())
    }

    /// Refuses an image that this program writes otherwise, or that is memory.
    fn refuse_own_file(&self, path: &Path) -> Result<(), QmpError> {
        let wrong = |what: &str| {
            Err(QmpError::generic(format!(
                "{} is {what}: name another file",
                path.display()
            )))
        };
        if let Some(output) = outputs::writer_of(&self.plan.wanted, path) {
            return wrong(&format!("what {output} is written to"));
        }
        // What cannot be asked about cannot be opened either, which says why.
        if let Some(id) = fs::metadata(path)
            .ok()
            .and_then(|facts| self.backend_of(&facts))
        {
            return wrong(&format!("the file of memory backend {id}"));
        }
        Ok(())
    }

    /// `blockdev-del`
    pub(in crate::qemu) fn blockdev_del(&mut self, name: &str) -> Result<(), QmpError> {
        let nodes = &mut self.images.nodes;
        let at = nodes.iter().position(|node| node.image.id == name);
        let at = at.ok_or_else(|| {
            QmpError::generic(format!("Failed to find node with node-name='{name}'"))
        })?;
        let node = &nodes[at];
        if node.image.is_drive {
            return Err(QmpError::generic(format!(
                "Node {name} is not owned by the monitor"
            )));
        }
        if node.user.is_some() {
            return Err(QmpError::generic(format!("Node {name} is in use")));
        }
        if is_file_node(&self.images.all(), name) {
            return Err(QmpError::generic(format!("Block device {name} is in use")));
        }
        let node = self.images.nodes.remove(at);
        if let Some(inner) = &node.image.file_node {
            drop(node.opened);
            self.images.reopen(inner);
        }
        Ok(())
    }

    /// `query-block`: drives, and blockdevs that a device has.
    pub(in crate::qemu) fn query_block(&self) -> Value {
        let nodes = self.images.nodes.iter();
        let shown = nodes.filter(|node| node.image.is_drive || node.user.is_some());
        let shown = shown.map(|node| {
            let drive = node.image.is_drive.then_some(node.image.id.as_str());
            let mut block = json!({
                "device": drive.unwrap_or_default(),
                "type": "unknown",
                "removable": false,
                "locked": false,
                "inserted": inserted(node),
            });
            if let Some(device) = &node.user {
                block["qdev"] = json!(format!("/machine/peripheral/{device}/virtio-backend"));
                block["io-status"] = json!("ok");
            }
            block
        });
        shown.collect()
    }

    /// `query-named-block-nodes`
    pub(in crate::qemu) fn query_named_block_nodes(&self) -> Value {
        self.images.nodes.iter().rev().map(inserted).collect()
    }

    /// `info block`
    pub(in crate::qemu) fn block_text(&self) -> String {
        let mut text = String::new();
        for block in self.query_block().as_array().into_iter().flatten() {
            let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let inserted = &block["inserted"];
            let (device, node) = (word(&block["device"]), word(&inserted["node-name"]));
            let name = if device.is_empty() {
                node
            } else {
                format!("{device} ({node})")
            };
            let read_only = if inserted["ro"] == json!(true) {
                ", read-only"
            } else {
                ""
            };
            text.push_str(&format!(
                "{name}: {} (raw{read_only})\n",
                word(&inserted["file"])
            ));
            if let Some(qdev) = block["qdev"].as_str() {
                text.push_str(&format!("    Attached to:      {qdev}\n"));
            }
            text.push_str("    Cache mode:       writeback\n");
        }
        text
    }
}

fn open(image: &Image) -> Result<Disk, String> {
    let DiskParts { path, access, .. } = &image.disk;
    Disk::open(path, *access, &scratch_folder()).map_err(|error| match error {
        DiskError::Open { path, source } => {
            format!("Could not open '{}': {}", path.display(), reason(&source))
        }
        other => one_line(&other),
    })
}

/// `BlockDeviceInfo`
fn inserted(node: &Node) -> Value {
    let DiskParts { path, limits, .. } = &node.image.disk;
    let facts = fs::metadata(path).ok();
    let size = facts.as_ref().map_or(0, Metadata::len);
    let stored = facts.as_ref().map_or(0, |facts| facts.blocks() * 512);
    let file = path.display().to_string();
    let per_second = |rate: Option<Rate>| rate.map_or(0, Rate::per_second);
    let mut info = json!({
        "node-name": node.image.id,
        "file": file,
        "drv": "raw",
        "ro": node.image.disk.access == DiskAccess::Read,
        "encrypted": false,
        "backing_file_depth": 0,
        "active": true,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "bps": per_second(limits.bytes), "bps_rd": 0, "bps_wr": 0,
        "iops": per_second(limits.requests), "iops_rd": 0, "iops_wr": 0,
        "cache": {"writeback": true, "direct": false, "no-flush": false},
        "image": {
            "filename": file,
            "format": "raw",
            "virtual-size": size,
            "actual-size": stored,
            "dirty-flag": false,
        },
    });
    for (key, rate) in [("bps_max", limits.bytes), ("iops_max", limits.requests)] {
        if let Some(rate) = rate {
            info[key] = json!(rate.burst());
        }
    }
    info
}
