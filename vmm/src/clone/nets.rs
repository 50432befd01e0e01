#![forbid(unsafe_code)]
//! Where the cables of clones' network devices end, and which addresses the devices have.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::control::WorkerConfig;
use super::instantiate::CloneError;
use super::marks;
use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::console::backend::ConsoleConnection;
use crate::device::virtio::net::backend::{NetConnection, Tap};
use crate::device::virtio::vsock::backend::VsockConnection;
use crate::machine::{Attachment, Connections, MachineError};
use crate::report::one_line;
use crate::spec::{
    DeviceKind, DeviceParts, DeviceSpec, Limits, MacAddress, MachineSpec, NetParts, TapSpec,
};
use crate::template::Template;
use crate::template::limits_entry::LimitsEntry;

/// What stands for a clone's number in a name.
const NUMBER: &str = "%d";

/// The cable of one network device, for all clones: `%d` in names is a clone's number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetPattern {
    /// The device; without it, the first one that no other pattern has.
    pub id: Option<String>,
    /// The tap.
    pub tap: String,
    /// Its network namespace.
    pub netns: Option<String>,
    /// The hardware address of clone 0; that of clone K is K further. Without it, one is derived.
    pub mac: Option<MacAddress>,
    /// How fast its packets go, where that is not as in the template.
    pub limits: Option<LimitsEntry>,
    /// Whether the device is not the template's, but plugged into each clone.
    pub plug: bool,
}

/// The cable of one network device of one clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetPlan {
    /// The device.
    pub id: String,
    /// The tap.
    pub tap: String,
    /// Its network namespace.
    pub netns: Option<String>,
    /// The hardware address, where it was given.
    pub mac: Option<MacAddress>,
    /// How fast its packets go, where that was given.
    pub limits: Option<LimitsEntry>,
    /// Whether the device is plugged, because the template has none of this name.
    pub plug: bool,
}

impl NetPattern {
    /// The cable of a clone; what is wrong where it can have none.
    fn plan(&self, id: &str, clone: u64) -> Result<NetPlan, String> {
        let number = clone.to_string();
        let plan = NetPlan {
            id: id.to_owned(),
            tap: self.tap.replace(NUMBER, &number),
            netns: self.netns.as_ref().map(|ns| ns.replace(NUMBER, &number)),
            mac: match self.mac {
                None => None,
                Some(mac) => Some(mac.plus(clone).ok_or_else(|| {
                    format!("there is no MAC address {clone} behind {mac}: begin with a lower one")
                })?),
            },
            limits: self.limits,
            plug: self.plug,
        };
        plan.tap().map(|_| plan)
    }
}

impl NetPlan {
    fn tap(&self) -> Result<TapSpec, String> {
        TapSpec::new(&self.tap, self.netns.as_deref())
    }

    fn open(&self) -> Result<Tap, CloneError> {
        let tap = self.tap().map_err(CloneError::Net)?;
        Tap::open(&tap).map_err(|source| {
            let id = self.id.clone();
            CloneError::Machine(MachineError::Tap { id, source })
        })
    }

    fn limits(&self) -> Result<Option<Limits>, CloneError> {
        let limits = self.limits.as_ref().map(LimitsEntry::limits);
        limits.transpose().map_err(CloneError::Net)
    }

    fn mac(&self, template: &Template, clone: u64) -> MacAddress {
        let derived = || derived_mac(template, clone, &self.id);
        self.mac.unwrap_or_else(derived)
    }
}

/// Proves that the patterns are of devices that the machine has, and good for so many clones; gives each
/// its device.
pub fn check(
    patterns: &[NetPattern],
    spec: &MachineSpec,
    clones: u32,
) -> Result<Vec<NetPattern>, String> {
    let devices = spec.devices().iter();
    let mut free: Vec<&str> = devices
        .filter(|device| device.net().is_some())
        .map(|device| device.id())
        .collect();
    let present = patterns.iter().filter(|pattern| !pattern.plug);
    for id in present.filter_map(|pattern| pattern.id.as_deref()) {
        let at = free.iter().position(|other| *other == id);
        let at = at.ok_or_else(|| {
            format!("the template has no network device {id:?} that is not taken")
        })?;
        free.remove(at);
    }
    let mut free = free.into_iter();
    let mut proven = Vec::new();
    let mut all = spec.clone();
    for pattern in patterns {
        let next = || free.next().map(str::to_owned);
        let id = if pattern.plug {
            let (more, device) = with_net(&all, pattern.id.clone(), NetParts::default())?;
            all = more;
            device.id().to_owned()
        } else {
            let id = pattern.id.clone().or_else(next);
            id.ok_or(
                "the template has fewer network devices than --net is given: say plug for a new one",
            )?
        };
        let is_one_for_all = ![Some(&pattern.tap), pattern.netns.as_ref()]
            .into_iter()
            .flatten()
            .any(|name| name.contains(NUMBER));
        if clones > 1 && is_one_for_all {
            return Err(format!(
                "tap={} is one for {clones} clones: put {NUMBER} into it, or into netns, for a clone's \
                 number",
                pattern.tap
            ));
        }
        // The longest name and the last address.
        pattern.plan(&id, u64::from(clones.saturating_sub(1)))?;
        proven.push(NetPattern {
            id: Some(id),
            ..pattern.clone()
        });
    }
    Ok(proven)
}

/// The machine with one network device more, and that one.
fn with_net(
    spec: &MachineSpec,
    id: Option<String>,
    net: NetParts,
) -> Result<(MachineSpec, DeviceSpec), String> {
    if !spec.has_pci() {
        return Err(
            "nothing can be plugged: the template has no PCI bus (create it with --pci)".into(),
        );
    }
    let part = DeviceParts {
        id,
        slot: None,
        kind: DeviceKind::Net(net),
    };
    let more = spec.with_device(part).map_err(|error| one_line(&error))?;
    let device = more.devices().last().cloned();
    let device = device.ok_or("there is no device that could be plugged")?;
    Ok((more, device))
}

/// The cables of a clone, of patterns that were proven; what is wrong of one behind those for which they were.
pub fn plans(patterns: &[NetPattern], clone: u64) -> Result<Vec<NetPlan>, String> {
    let plan =
        |pattern: &NetPattern| pattern.plan(pattern.id.as_deref().unwrap_or_default(), clone);
    patterns.iter().map(plan).collect()
}

/// The address of a network device in a clone: the same for the same clone of the same template, and
/// another one for any other.
pub fn derived_mac(template: &Template, clone: u64, id: &str) -> MacAddress {
    let mut hash = Sha256::new();
    hash.update(b"pando mac\0");
    hash.update(&template.manifest().file().state.digest);
    hash.update(clone.to_le_bytes());
    hash.update(id);
    let digest = hash.finalize();
    let mut bytes = [0; 6];
    for (place, byte) in bytes.iter_mut().zip(digest) {
        *place = byte;
    }
    MacAddress::local(bytes)
}

/// Opens the taps of a clone. Every network device has its address; one without a plan has no cable.
pub(super) fn connect(
    template: &Template,
    config: &WorkerConfig,
) -> Result<Vec<(String, NetConnection)>, CloneError> {
    let has = |id: &str| {
        template
            .spec()
            .devices()
            .iter()
            .any(|device| device.id() == id)
    };
    let present = addresses(template, config).into_iter();
    present
        .filter(|(id, _)| has(id))
        .map(|(id, mac)| {
            let plan = config.nets.iter().find(|plan| plan.id == id && !plan.plug);
            let connection = NetConnection {
                tap: plan.map(NetPlan::open).transpose()?,
                mac: Some(mac),
                limits: plan.map(NetPlan::limits).transpose()?.flatten(),
            };
            Ok((id, connection))
        })
        .collect()
}

/// The address of each network device that a clone has, those included that are plugged.
pub(super) fn addresses(template: &Template, config: &WorkerConfig) -> Vec<(String, MacAddress)> {
    let devices = template.spec().devices().iter();
    let present = devices
        .filter(|device| device.net().is_some())
        .map(|device| {
            let id = device.id();
            let plan = config.nets.iter().find(|plan| plan.id == id && !plan.plug);
            let mac = match plan {
                Some(plan) => plan.mac(template, config.clone),
                None => derived_mac(template, config.clone, id),
            };
            (id.to_owned(), mac)
        });
    let plugged = config.nets.iter().filter(|plan| plan.plug);
    let plugged = plugged.map(|plan| (plan.id.clone(), plan.mac(template, config.clone)));
    present.chain(plugged).collect()
}

/// The connection of a clone's vsock device, if it has one.
pub(super) fn vsock(
    template: &Template,
    config: &WorkerConfig,
) -> Result<Option<VsockConnection>, CloneError> {
    Ok(config.vsock.connect(config.clone, template.spec())?)
}

/// What the ports of a clone's consoles lead to.
pub(super) fn consoles(
    template: &Template,
    config: &WorkerConfig,
) -> Result<Vec<(String, ConsoleConnection)>, CloneError> {
    Ok(config.consoles.connect(config.clone, template.spec())?)
}

/// The devices that a clone has and its template has not.
pub(super) fn plugged(
    template: &Template,
    config: &WorkerConfig,
) -> Result<Vec<(DeviceSpec, Attachment)>, CloneError> {
    let mut spec = template.spec().clone();
    let plans = config.nets.iter().filter(|plan| plan.plug);
    plans
        .map(|plan| {
            let mac = plan.mac(template, config.clone);
            let net = NetParts {
                tap: None,
                mac: Some(mac),
                limits: plan.limits()?.unwrap_or_default(),
            };
            let more = with_net(&spec, Some(plan.id.clone()), net);
            let (more, device) = more.map_err(CloneError::Net)?;
            spec = more;
            let connection = NetConnection {
                tap: Some(plan.open()?),
                ..NetConnection::default()
            };
            Ok((device, Attachment::Net(connection)))
        })
        .collect()
}

/// What a clone's devices are connected to, and what is plugged.
pub(super) fn connections(
    template: &Template,
    config: &WorkerConfig,
    serial: SerialTarget,
) -> Result<Connections, CloneError> {
    Ok(Connections {
        vsock: vsock(template, config)?,
        nets: connect(template, config)?,
        consoles: consoles(template, config)?,
        plugged: plugged(template, config)?,
        marks: marks::of(template, config)?,
        ..template.connections(serial)?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendSpec, CpuCount};

    fn spec(nets: usize) -> MachineSpec {
        let net = DeviceParts {
            id: None,
            slot: None,
            kind: DeviceKind::Net(NetParts::default()),
        };
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        spec.with_devices(vec![net; nets]).unwrap()
    }

    fn pattern(tap: &str) -> NetPattern {
        NetPattern {
            tap: tap.to_owned(),
            ..NetPattern::default()
        }
    }

    #[test]
    fn each_clone_has_its_names_and_its_address() {
        let second = NetPattern {
            id: Some("net0".into()),
            netns: Some("farm-%d".into()),
            mac: Some("02:00:00:00:00:ff".parse().unwrap()),
            ..pattern("tap0")
        };
        let proven = check(&[pattern("pando%d"), second], &spec(2), 100).unwrap();
        let plans = plans(&proven, 7).unwrap();
        let seen: Vec<_> = plans
            .iter()
            .map(|plan| (plan.id.as_str(), plan.tap.as_str(), plan.netns.as_deref()))
            .collect();
        assert_eq!(
            seen,
            [("net1", "pando7", None), ("net0", "tap0", Some("farm-7"))]
        );
        assert_eq!(plans[1].mac.unwrap().to_string(), "02:00:00:00:01:06");
    }

    #[test]
    fn what_is_plugged_has_a_name_and_a_place_that_are_free() {
        let plug = |id: Option<&str>| NetPattern {
            id: id.map(str::to_owned),
            plug: true,
            ..pattern("t%d")
        };
        let proven = check(
            &[plug(None), pattern("x%d"), plug(Some("own"))],
            &spec(1),
            9,
        )
        .unwrap();
        let ids: Vec<_> = proven.iter().filter_map(|net| net.id.as_deref()).collect();
        assert_eq!(ids, ["net1", "net0", "own"]);
        let plans = plans(&proven, 2).unwrap();
        assert!(plans[0].plug && !plans[1].plug);
        let (_, device) = with_net(&spec(2), None, NetParts::default()).unwrap();
        assert_eq!((device.id(), device.slot()), ("net2", 3));
        let taken = check(&[plug(Some("net0"))], &spec(1), 1).unwrap_err();
        assert!(taken.contains("net0"), "{taken}");
        check(&[plug(None)], &spec(0).with_pci(true), 1).unwrap();
        let no_bus = check(&[plug(None)], &spec(0), 1).unwrap_err();
        assert!(no_bus.contains("--pci"), "{no_bus}");
    }

    #[test]
    fn patterns_that_clones_cannot_have_are_refused() {
        let fault = |patterns: &[NetPattern], nets, clones| {
            check(patterns, &spec(nets), clones).unwrap_err()
        };
        assert!(fault(&[pattern("t")], 0, 1).contains("fewer network devices"));
        assert!(fault(&[pattern("t")], 1, 2).contains("one for 2 clones"));
        assert!(fault(&[pattern("0123456789ab%d")], 1, 1001).contains("no name of an interface"));
        let named = NetPattern {
            id: Some("net0".into()),
            ..pattern("t%d")
        };
        assert!(fault(&[named.clone(), named], 2, 1).contains("\"net0\" that is not taken"));
        let last = NetPattern {
            mac: Some("02:00:00:ff:ff:fe".parse().unwrap()),
            ..pattern("t%d")
        };
        check(std::slice::from_ref(&last), &spec(1), 2).unwrap();
        assert!(fault(&[last], 1, 3).contains("begin with a lower one"));
    }
}
