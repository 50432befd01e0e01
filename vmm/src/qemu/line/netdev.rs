#![forbid(unsafe_code)]
//! `-netdev` and `-device virtio-net-pci`.

use super::pci::only;
use crate::qemu::error::{OptionError, missing};
use crate::qemu::words::Props;
use crate::spec::{MacAddress, NetParts, TapSpec};

/// Drivers of `-device`, each with its other names.
pub(super) const NET_DRIVERS: [&str; 3] = [
    "virtio-net-pci",
    "virtio-net",
    "virtio-net-pci-non-transitional",
];

/// The end of a cable that a device can name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netdev {
    /// What it is called.
    pub id: String,
    /// The tap.
    pub tap: TapSpec,
}

/// A network device as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetDevice {
    pub(super) netdev: Option<String>,
    pub(super) mac: Option<MacAddress>,
}

/// Reads a netdev.
pub fn netdev(mut props: Props) -> Result<Netdev, OptionError> {
    let kind = props.required("type")?;
    if kind == "vhost-user" {
        return Err(OptionError::new(
            "type=vhost-user cannot be added while the machine runs: say -netdev vhost-user,id=ID,chardev=ID",
        ));
    }
    if kind != "tap" {
        return Err(OptionError::new(format!(
            "type={kind} cannot be had: a network is a tap, so say tap,id=ID,ifname=NAME,script=no,\
             downscript=no; or vhost-user, where all memory is shared"
        )));
    }
    let id = props.required("id")?;
    let name = props.text("ifname")?.ok_or_else(|| missing("ifname"))?;
    for key in ["script", "downscript"] {
        let script = props.text(key)?;
        let script = script.unwrap_or_else(|| "of QEMU's own".to_owned());
        if script != "no" && !script.is_empty() {
            return Err(OptionError::new(format!(
                "the {key} {script} cannot be had: make the tap first and say {key}=no"
            )));
        }
    }
    only(&mut props, "vhost", &["off"])?;
    only(&mut props, "vnet_hdr", &["on"])?;
    only(&mut props, "queues", &["1"])?;
    props.finish()?;
    let tap = TapSpec::new(&name, None).map_err(OptionError::new)?;
    Ok(Netdev { id, tap })
}

/// Why there cannot be another netdev of this name.
pub fn duplicate(id: &str) -> OptionError {
    OptionError::new(format!("Duplicate ID '{id}' for netdev"))
}

/// Why a device cannot have a netdev: another has it, or there is none.
pub fn no_netdev(netdev: &str, is_known: bool) -> OptionError {
    let property = "Property 'virtio-net-device.netdev'";
    OptionError::new(if is_known {
        format!("{property} can't take value '{netdev}', it's in use")
    } else {
        format!("{property} can't find value '{netdev}'")
    })
}

impl NetDevice {
    /// Takes the properties that are of a network device only.
    pub(super) fn read(props: &mut Props) -> Result<Self, OptionError> {
        let mac = props.text("mac")?.map(|text| {
            text.parse().map_err(|_| {
                OptionError::new(format!(
                    "Property 'virtio-net-device.mac' doesn't take value '{text}'"
                ))
            })
        });
        only(props, "romfile", &[""])?;
        Ok(Self {
            netdev: props.text("netdev")?,
            mac: mac.transpose()?,
        })
    }

    /// Its parts, with the tap of its netdev: `tap_of` finds one that nobody has.
    pub(super) fn parts(
        &self,
        tap_of: impl FnOnce(&str) -> Result<TapSpec, OptionError>,
    ) -> Result<NetParts, OptionError> {
        let mac = self.mac;
        let tap = self.netdev.as_deref().map(tap_of).transpose()?;
        Ok(NetParts {
            tap,
            mac,
            ..NetParts::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::pci::PciDevices;
    use super::*;
    use crate::qemu::words::Form;
    use crate::spec::{BackendSpec, CpuCount, DeviceKind, MachineSpec};

    const TAP: &str = "tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=off";

    fn read(netdevs: &[&str], options: &[&str]) -> Result<Vec<NetParts>, OptionError> {
        let mut devices = PciDevices::default();
        for netdev in netdevs {
            assert!(devices.option("netdev", netdev, "-netdev ...")?);
        }
        for device in options {
            let props = Props::parse(device, Some("driver"), Form::KeyValue)?;
            assert!(devices.device(props, "-device ...")?.is_none());
        }
        let parts = devices.parts()?.into_iter();
        let nets = parts.map(|part| match part.kind {
            DeviceKind::Net(net) => net,
            other => panic!("{other:?}"),
        });
        Ok(nets.collect())
    }

    #[test]
    fn a_device_has_its_tap_and_its_address() {
        let device = "virtio-net-pci,netdev=n0,id=nic0,mac=52:54:00:aa:bb:cc,addr=4";
        let nets = read(&[TAP], &[device]).unwrap();
        assert_eq!(nets[0].tap.as_ref().map(TapSpec::name), Some("tap0"));
        assert_eq!(nets[0].mac.unwrap().to_string(), "52:54:00:aa:bb:cc");
        let json =
            r#"{"type": "tap", "id": "n0", "ifname": "tap0", "script": "no", "downscript": "no"}"#;
        assert_eq!(read(&[json], &[device]).unwrap(), nets);
        assert_eq!(read(&[], &["virtio-net"]).unwrap(), [NetParts::default()]);
        assert!(
            read(&[TAP], &[]).unwrap().is_empty(),
            "it waits for a device"
        );
    }

    #[test]
    fn addresses_that_were_not_given_are_qemus() {
        let mut devices = PciDevices::default();
        for device in [
            "virtio-net-pci",
            "virtio-net-pci,mac=52:54:00:12:34:57",
            "virtio-net-pci",
        ] {
            let props = Props::parse(device, Some("driver"), Form::KeyValue).unwrap();
            assert!(devices.device(props, "-device ...").unwrap().is_none());
        }
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        let spec = spec.with_devices(devices.parts().unwrap()).unwrap();
        let macs: Vec<_> = spec
            .devices()
            .iter()
            .filter_map(|device| device.net()?.mac)
            .collect();
        let last: Vec<_> = macs.iter().map(|mac| mac.bytes()[5]).collect();
        assert_eq!(last, [0x56, 0x57, 0x58]);
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (netdevs, devices, text) in [
            (&["user,id=n0"][..], &[][..], "type=user cannot be had"),
            (&["tap,ifname=t"], &[], "'id' is missing"),
            (&["tap,id=n"], &[], "'ifname' is missing"),
            (
                &["tap,id=n,ifname=t"],
                &[],
                "script of QEMU's own cannot be had",
            ),
            (
                &["tap,id=n,ifname=t,script=no,downscript=no,vhost=on"],
                &[],
                "vhost=on cannot be had",
            ),
            (
                &["tap,id=n,ifname=t,script=no,downscript=no,queues=2"],
                &[],
                "queues=2 cannot be had",
            ),
            (
                &["tap,id=n,ifname=a/b,script=no,downscript=no"],
                &[],
                "no name of an interface",
            ),
            (&[TAP, TAP], &[], "Duplicate ID 'n0' for netdev"),
            (
                &[],
                &["virtio-net-pci,mac=zz"],
                "Property 'virtio-net-device.mac' doesn't take value 'zz'",
            ),
            (
                &[],
                &["virtio-net-pci,netdev=x"],
                "Property 'virtio-net-device.netdev' can't find value 'x'",
            ),
            (
                &[TAP],
                &["virtio-net-pci,netdev=n0", "virtio-net-pci,netdev=n0"],
                "can't take value 'n0', it's in use",
            ),
            (
                &[],
                &["virtio-net-pci,x=1"],
                "Property 'virtio-net-pci.x' not found",
            ),
        ] {
            let error = read(netdevs, devices).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
