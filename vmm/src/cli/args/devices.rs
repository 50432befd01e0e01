#![forbid(unsafe_code)]
//! Devices on the command line.

mod balloon;
mod console;

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args as ClapArgs;

use self::balloon::BalloonArgs;
use self::balloon::CloneBalloonArgs;
pub use self::balloon::DiscardArg;
use self::console::ConsoleArgs;
use crate::clone::marks::DocumentPattern;
use crate::clone::nets::NetPattern;
use crate::config::file::{Bytes, DeviceTable, limits};
use crate::size::Size;
use crate::spec::{Limits, MacAddress};
use crate::template::limits_entry::LimitsEntry;

/// Devices of a machine, beside those of the machine file.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct DeviceArgs {
    /// A disk on a raw image; may be given several times. With ro nobody can write it; with snapshot what
    /// the guest writes ends with the VM; bps and iops are the most bytes and requests per second, with a burst
    /// of a tenth of that unless it is given. A comma in FILE is written twice
    #[arg(
        long = "disk",
        value_name = "FILE[,ro][,snapshot][,id=ID][,serial=TEXT][,bps=SIZE][,bps-burst=SIZE][,iops=N][,iops-burst=N]"
    )]
    pub disks: Vec<DiskArg>,
    /// A network device; may be given several times. The tap must exist; with netns it is in that network
    /// namespace of `ip netns`; bps and pps are the most bytes and packets per second, each way
    #[arg(
        long = "net",
        value_name = "[tap=NAME][,netns=NAME][,mac=ADDRESS][,id=ID][,bps=SIZE][,bps-burst=SIZE][,pps=N][,pps-burst=N]"
    )]
    pub nets: Vec<NetArg>,
    /// An entropy device
    #[arg(long)]
    pub rng: bool,
    /// A small disk (serial number pando-document) that tells the guest who it is: a tar archive, in each
    /// clone another one (docs/identity.md)
    #[arg(long)]
    pub document: bool,
    /// A PCI bus although nothing is on it: clones may be given what is plugged there
    #[arg(long)]
    pub pci: bool,
    /// Connections between programs of the guest and of the host: the guest's context ID, and the Unix
    /// socket on which programs of the host reach it by the line `CONNECT PORT`; those
    /// that the guest reaches listen on PATH_PORT. Clones have their own (pando clone --vsock)
    #[arg(long, value_name = "CID[,uds=PATH][,id=ID]")]
    pub vsock: Option<VsockArg>,
    /// A disk that another process serves (vhost-user), by the Unix socket on which it listens. All memory must be
    /// shared with that process: give it backends with share = true in a machine file
    #[arg(long = "vhost-user-blk", value_name = "SOCKET")]
    pub vhost_user_disks: Vec<PathBuf>,
    /// A network device that another process serves (vhost-user), as with --vhost-user-blk
    #[arg(long = "vhost-user-net", value_name = "SOCKET")]
    pub vhost_user_nets: Vec<PathBuf>,
    /// Ports.
    #[command(flatten)]
    pub consoles: ConsoleArgs,
    /// Memory that the guest gives away.
    #[command(flatten)]
    pub balloon: BalloonArgs,
    /// Give the machine a VM generation ID, by which a guest sees that it was cloned and renews its random
    /// numbers, or not [default: a template has one unless its kernel is the built-in guest]
    #[arg(long, value_name = "YES", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub vmgenid: Option<bool>,
}

impl DeviceArgs {
    /// The devices as in a machine file.
    pub fn tables(&self) -> Vec<DeviceTable> {
        let disks = self.disks.iter().map(|disk| disk.0.clone());
        let rng = self.rng.then_some(DeviceTable::Rng {
            id: None,
            slot: None,
        });
        let document = self.document.then_some(DeviceTable::Document {
            id: None,
            slot: None,
        });
        let vsock = self.vsock.iter().map(|vsock| vsock.0.clone());
        let nets = self.nets.iter().map(|net| net.table());
        let own = rng.into_iter().chain(document);
        let consoles = self.consoles.tables();
        let balloon = self.balloon.balloon.iter().map(|balloon| balloon.0.clone());
        let devices = disks.chain(nets).chain(own).chain(vsock).chain(balloon);
        let devices = devices.chain(consoles);
        devices.chain(self.in_other_processes()).collect()
    }
}

impl DeviceArgs {
    /// Devices that other processes serve.
    fn in_other_processes(&self) -> impl Iterator<Item = DeviceTable> {
        let disk = |socket: &PathBuf| DeviceTable::VhostUserBlock {
            id: None,
            slot: None,
            socket: socket.clone(),
        };
        let net = |socket: &PathBuf| DeviceTable::VhostUserNet {
            id: None,
            slot: None,
            socket: socket.clone(),
            mac: None,
        };
        let disks = self.vhost_user_disks.iter().map(disk);
        disks.chain(self.vhost_user_nets.iter().map(net))
    }
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArg(pub DeviceTable);

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = split(text).into_iter();
        let path = words.next().filter(|path| !path.is_empty());
        let path = PathBuf::from(path.ok_or("it begins with the image's file")?);
        let (mut readonly, mut snapshot) = (false, false);
        let (mut id, mut serial) = (None, None);
        let mut rates = RateWords::of("iops");
        for word in words {
            match word.split_once('=') {
                None if word == "ro" => readonly = true,
                None if word == "snapshot" => snapshot = true,
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("serial", value)) => serial = Some(value.to_owned()),
                Some((key, value)) if rates.take(key, value)? => (),
                _ => {
                    return Err(format!(
                        "{word:?} is none of ro, snapshot, id=ID, serial=TEXT, {}",
                        rates.words()
                    ));
                }
            }
        }
        Ok(Self(DeviceTable::Block {
            id,
            slot: None,
            path,
            readonly,
            snapshot,
            serial,
            bps: rates.bps,
            bps_burst: rates.bps_burst,
            iops: rates.rate,
            iops_burst: rates.rate_burst,
        }))
    }
}

/// Connections to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockArg(pub DeviceTable);

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = split(text).into_iter();
        let cid = words.next().unwrap_or_default();
        let cid = cid
            .parse()
            .map_err(|_| format!("{cid:?} is no context id: it begins with one, such as 3"))?;
        let (mut id, mut uds_path) = (None, None);
        for word in words {
            match word.split_once('=') {
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("uds", value)) => uds_path = Some(value.into()),
                _ => return Err(format!("{word:?} is none of uds=PATH, id=ID")),
            }
        }
        Ok(Self(DeviceTable::Vsock {
            id,
            slot: None,
            cid,
            uds_path,
        }))
    }
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArg {
    id: Option<String>,
    tap: Option<String>,
    netns: Option<String>,
    mac: Option<MacAddress>,
    rates: RateWords,
}

impl NetArg {
    fn table(&self) -> DeviceTable {
        DeviceTable::Net {
            id: self.id.clone(),
            slot: None,
            tap: self.tap.clone(),
            netns: self.netns.clone(),
            mac: self.mac,
            bps: self.rates.bps,
            bps_burst: self.rates.bps_burst,
            pps: self.rates.rate,
            pps_burst: self.rates.rate_burst,
        }
    }
}

/// What devices of clones have.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct CloneDeviceArgs {
    /// Memory that their guests give away.
    #[command(flatten)]
    pub balloon: CloneBalloonArgs,
    /// Where the cable of a network device ends; may be given several times. `%d` in names is the clone's
    /// number; clone K has the K-th address from ADDRESS on. With plug each clone gets a device that the
    /// template has not. Limits hold each way, for each clone, in place of the template's [default: an address
    /// derived from template and clone; without --net no cable]
    #[arg(
        long = "net",
        value_name = "tap=NAME[,netns=NAME][,mac=ADDRESS][,id=ID][,plug][,bps=SIZE][,bps-burst=SIZE][,pps=N][,pps-burst=N]"
    )]
    pub nets: Vec<CloneNetArg>,
    /// Add a file to the document of each clone, where its guest unpacks it as NAME; may be given several
    /// times. `%d` in FILE is the clone's number (pando template create --document, docs/identity.md)
    #[arg(long = "document", value_name = "NAME=FILE")]
    pub documents: Vec<CloneDocumentArg>,
}

/// The cable of a network device of clones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneNetArg(pub NetPattern);

impl FromStr for CloneNetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (plug, words): (Vec<_>, Vec<_>) = text.split(',').partition(|word| *word == "plug");
        let NetArg {
            id,
            tap,
            netns,
            mac,
            rates,
        } = words.join(",").parse()?;
        Ok(Self(NetPattern {
            id,
            tap: tap.ok_or("--net of clones needs tap=NAME")?,
            netns,
            mac,
            limits: LimitsEntry::of(&rates.limits("packets")?),
            plug: !plug.is_empty(),
        }))
    }
}

/// A file of clones' documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneDocumentArg(pub DocumentPattern);

impl FromStr for CloneDocumentArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !path.is_empty() => Ok(Self(DocumentPattern {
                name: name.to_owned(),
                path: path.into(),
            })),
            _ => Err("it is NAME=FILE".to_owned()),
        }
    }
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut net = Self {
            id: None,
            tap: None,
            netns: None,
            mac: None,
            rates: RateWords::of("pps"),
        };
        for word in split(text).iter().filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some(("tap", value)) => net.tap = Some(value.to_owned()),
                Some(("netns", value)) => net.netns = Some(value.to_owned()),
                Some(("mac", value)) => net.mac = Some(value.parse()?),
                Some(("id", value)) => net.id = Some(value.to_owned()),
                Some((key, value)) if net.rates.take(key, value)? => (),
                _ => {
                    return Err(format!(
                        "{word:?} is none of tap=NAME, netns=NAME, mac=ADDRESS, id=ID, {}",
                        net.rates.words()
                    ));
                }
            }
        }
        Ok(net)
    }
}

/// Words that say how fast a device may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RateWords {
    bps: Option<Bytes>,
    bps_burst: Option<Bytes>,
    /// The word for what is counted beside bytes.
    word: &'static str,
    rate: Option<u64>,
    rate_burst: Option<u64>,
}

impl RateWords {
    fn of(word: &'static str) -> Self {
        Self {
            bps: None,
            bps_burst: None,
            word,
            rate: None,
            rate_burst: None,
        }
    }

    /// Takes a word of these; whether it is one.
    fn take(&mut self, key: &str, value: &str) -> Result<bool, String> {
        let bytes = || value.parse().map(|size: Size| Some(Bytes(size.0)));
        let number = || match value.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(format!("{key}={value} is no number")),
        };
        match key.strip_prefix(self.word) {
            Some("") => self.rate = number()?,
            Some("-burst") => self.rate_burst = number()?,
            _ if key == "bps" => self.bps = bytes()?,
            _ if key == "bps-burst" => self.bps_burst = bytes()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What there is.
    fn words(&self) -> String {
        let word = self.word;
        format!("bps=SIZE, bps-burst=SIZE, {word}=N, {word}-burst=N")
    }

    fn limits(&self, what: &'static str) -> Result<Limits, String> {
        let counted = (self.rate, self.rate_burst);
        limits(self.bps, self.bps_burst, counted, what)
    }
}

/// Words between single commas; a double one is a comma.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let is_double = letter == ',' && letters.next_if_eq(&',').is_some();
        if letter == ',' && !is_double {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(letter);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_device_is_words() {
        let words = "tap=t%d,netns=n,plug,mac=52:54:00:00:00:01,id=x";
        let CloneNetArg(pattern) = words.parse().unwrap();
        assert_eq!(
            (pattern.tap.as_str(), pattern.netns.as_deref(), pattern.plug),
            ("t%d", Some("n"), true)
        );
        words.parse::<NetArg>().unwrap_err();
        assert_eq!(pattern.limits, None);
        let words = "tap=t%d,bps=1M,pps=100,pps-burst=9";
        let CloneNetArg(pattern) = words.parse().unwrap();
        let limits = pattern.limits.unwrap().limits().unwrap();
        let rates = [limits.bytes, limits.requests]
            .map(|rate| rate.map(|rate| (rate.per_second(), rate.burst())));
        assert_eq!(rates, [Some((1 << 20, (1 << 20) / 10)), Some((100, 9))]);
        for (wrong, text) in [
            ("tap=t,pps=0", "0 packets cannot be"),
            ("tap=t,pps-burst=9", "without a limit"),
            ("tap=t,iops=9", "\"iops=9\" is none of"),
        ] {
            let error = wrong.parse::<CloneNetArg>().unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        let no_tap = "plug".parse::<CloneNetArg>().unwrap_err();
        assert!(no_tap.contains("needs tap=NAME"), "{no_tap}");
        for (wrong, word) in [
            ("tap", "\"tap\""),
            ("mac=zz", "no MAC address"),
            ("t=1", "\"t=1\""),
        ] {
            assert!(
                wrong.parse::<NetArg>().unwrap_err().contains(word),
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_disk_is_a_file_and_words() {
        let DiskArg(disk) = "a,,b,ro,id=root,serial=x=y".parse().unwrap();
        let expected = DeviceTable::Block {
            id: Some("root".into()),
            slot: None,
            path: "a,b".into(),
            readonly: true,
            snapshot: false,
            serial: Some("x=y".into()),
            bps: None,
            bps_burst: None,
            iops: None,
            iops_burst: None,
        };
        assert_eq!(disk, expected);
        let DiskArg(disk) = "d,iops=500,iops-burst=50,bps=8M".parse().unwrap();
        let DeviceTable::Block {
            bps,
            bps_burst,
            iops,
            iops_burst,
            ..
        } = disk
        else {
            panic!("{disk:?}");
        };
        assert_eq!((bps, bps_burst), (Some(Bytes(8 << 20)), None));
        assert_eq!((iops, iops_burst), (Some(500), Some(50)));
        for (wrong, word) in [
            ("", "begins with"),
            ("f,bps=100", "has no unit"),
            ("f,iops=5k", "iops=5k is no number"),
            (",ro", "begins with"),
            ("f,rw", "\"rw\""),
        ] {
            let error = wrong.parse::<DiskArg>().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn connections_are_a_context_id_and_words() {
        let VsockArg(vsock) = "5,uds=a,,b,id=v".parse().unwrap();
        let expected = DeviceTable::Vsock {
            id: Some("v".into()),
            slot: None,
            cid: 5,
            uds_path: Some("a,b".into()),
        };
        assert_eq!(vsock, expected);
        for (wrong, word) in [
            ("", "\"\""),
            ("uds=a", "context id"),
            ("3,cid=4", "\"cid=4\""),
        ] {
            let error = wrong.parse::<VsockArg>().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
