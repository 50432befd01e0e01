#![forbid(unsafe_code)]
//! Ends of cables that devices have or may get: netdevs, of the command line and of monitors.

use super::Vm;
use crate::device::virtio::net::backend::Tap;
use crate::qemu::error::OptionError;
use crate::qemu::line::netdev::{self, Netdev, no_netdev};
use crate::qemu::line::pci::PciDevices;
use crate::qemu::qmp::message::{Class, QmpError};
use crate::qemu::words::Props;
use crate::report::one_line;
use crate::spec::{DeviceSpec, TapSpec};

/// Most netdevs that there can be: each may hold a descriptor.
const MAX_NETDEVS: usize = 64;

/// All netdevs.
#[derive(Debug, Default)]
pub(super) struct Netdevs {
    nodes: Vec<Node>,
}

/// A netdev.
#[derive(Debug)]
struct Node {
    netdev: Netdev,
    /// The tap, attached to as long as no device has it; after a device it is attached to for the next one.
    opened: Option<Tap>,
    /// The device that has it.
    user: Option<String>,
}

impl Netdevs {
    /// Those of the command line; `devices` are the machine's, in the order of theirs.
    pub(super) fn open(words: &PciDevices, devices: &[DeviceSpec]) -> Result<Self, OptionError> {
        let mut netdevs = Self::default();
        for (netdev, user) in words.netdevs() {
            let user = user.and_then(|place| devices.get(place));
            let user = user.map(|device| device.id().to_owned());
            let opened = match user {
                // Who makes the machine attaches to it.
                Some(_) => None,
                None => Some(open(netdev).map_err(OptionError::new)?),
            };
            netdevs.nodes.push(Node {
                netdev: netdev.clone(),
                opened,
                user,
            });
        }
        Ok(netdevs)
    }

    /// The tap of a netdev that no device has.
    pub(super) fn free(&self, id: &str) -> Result<TapSpec, OptionError> {
        let node = self.nodes.iter().find(|node| node.netdev.id == id);
        node.filter(|node| node.user.is_none())
            .map(|node| node.netdev.tap.clone())
            .ok_or_else(|| no_netdev(id, node.is_some()))
    }

    /// The tap of a netdev that no device has, attached to.
    pub(super) fn take(&mut self, id: &str) -> Result<Option<Tap>, String> {
        let node = self.nodes.iter_mut().find(|node| node.netdev.id == id);
        let Some(node) = node else {
            return Ok(None);
        };
        match node.opened.take() {
            Some(tap) => Ok(Some(tap)),
            None => open(&node.netdev).map(Some),
        }
    }

    /// From now on a device has the netdev.
    pub(super) fn give(&mut self, id: &str, device: &str) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.netdev.id == id) {
            node.user = Some(device.to_owned());
        }
    }

    /// A device has gone: its netdev is free.
    pub(super) fn release(&mut self, device: &str) {
        let has = |node: &&mut Node| node.user.as_deref() == Some(device);
        if let Some(node) = self.nodes.iter_mut().find(has) {
            node.user = None;
        }
    }
}

impl Vm {
    /// `netdev_add`
    pub(in crate::qemu) fn netdev_add(&mut self, props: Props) -> Result<(), QmpError> {
        let wrong = |error: OptionError| QmpError::generic(error.message());
        let netdev = netdev::netdev(props).map_err(wrong)?;
        let nodes = &mut self.netdevs.nodes;
        if nodes.iter().any(|node| node.netdev.id == netdev.id) {
            return Err(wrong(netdev::duplicate(&netdev.id)));
        }
        if nodes.len() >= MAX_NETDEVS {
            return Err(QmpError::generic(format!(
                "there are {MAX_NETDEVS} netdevs, the most that there can be: use netdev_del"
            )));
        }
        let opened = Some(open(&netdev).map_err(QmpError::generic)?);
        nodes.push(Node {
            netdev,
            opened,
            user: None,
        });
        Ok(())
    }

    /// `netdev_del`
    pub(in crate::qemu) fn netdev_del(&mut self, id: &str) -> Result<(), QmpError> {
        let nodes = &mut self.netdevs.nodes;
        let at = nodes.iter().position(|node| node.netdev.id == id);
        let at = at.ok_or_else(|| {
            QmpError::of(Class::DeviceNotFound, format!("Device '{id}' not found"))
        })?;
        if let Some(device) = nodes.get(at).and_then(|node| node.user.as_deref()) {
            return Err(QmpError::generic(format!(
                "Device '{id}' is in use by the device '{device}': take that out first"
            )));
        }
        nodes.remove(at);
        Ok(())
    }
}

fn open(netdev: &Netdev) -> Result<Tap, String> {
    Tap::open(&netdev.tap).map_err(|error| one_line(&error))
}
