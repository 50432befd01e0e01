#![forbid(unsafe_code)]
//! Devices on the command line.

mod console;

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args as ClapArgs;

use self::console::ConsoleArgs;
use crate::clone::marks::DocumentPattern;
use crate::clone::nets::NetPattern;
use crate::config::file::DeviceTable;
use crate::spec::MacAddress;

/// Devices of a machine, beside those of the machine file.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct DeviceArgs {
    /// A disk on a raw image; may be given several times. With ro nobody can write it; with snapshot what
    /// the guest writes ends with the VM. A comma in FILE is written twice
    #[arg(
        long = "disk",
        value_name = "FILE[,ro][,snapshot][,id=ID][,serial=TEXT]"
    )]
    pub disks: Vec<DiskArg>,
    /// A network device; may be given several times. The tap must exist; with netns it is in that network
    /// namespace of `ip netns`
    #[arg(
        long = "net",
        value_name = "[tap=NAME][,netns=NAME][,mac=ADDRESS][,id=ID]"
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
    /// Ports.
    #[command(flatten)]
    pub consoles: ConsoleArgs,
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
        let devices = disks.chain(nets).chain(own).chain(vsock);
        devices.chain(consoles).collect()
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
        for word in words {
            match word.split_once('=') {
                None if word == "ro" => readonly = true,
                None if word == "snapshot" => snapshot = true,
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("serial", value)) => serial = Some(value.to_owned()),
                _ => {
                    return Err(format!(
                        "{word:?} is none of ro, snapshot, id=ID, serial=TEXT"
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetArg {
    id: Option<String>,
    tap: Option<String>,
    netns: Option<String>,
    mac: Option<MacAddress>,
}

impl NetArg {
    fn table(&self) -> DeviceTable {
        DeviceTable::Net {
            id: self.id.clone(),
            slot: None,
            tap: self.tap.clone(),
            netns: self.netns.clone(),
            mac: self.mac,
        }
    }
}

/// What devices of clones have.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct CloneDeviceArgs {
    /// Where the cable of a network device ends; may be given several times. `%d` in names is the clone's
    /// number; clone K has the K-th address from ADDRESS on. With plug each clone gets a device that the
    /// template has not [default: an address derived from template and clone; without --net no cable]
    #[arg(
        long = "net",
        value_name = "tap=NAME[,netns=NAME][,mac=ADDRESS][,id=ID][,plug]"
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
        } = words.join(",").parse()?;
        Ok(Self(NetPattern {
            id,
            tap: tap.ok_or("--net of clones needs tap=NAME")?,
            netns,
            mac,
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
        let mut net = Self::default();
        for word in split(text).iter().filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some(("tap", value)) => net.tap = Some(value.to_owned()),
                Some(("netns", value)) => net.netns = Some(value.to_owned()),
                Some(("mac", value)) => net.mac = Some(value.parse()?),
                Some(("id", value)) => net.id = Some(value.to_owned()),
                _ => {
                    return Err(format!(
                        "{word:?} is none of tap=NAME, netns=NAME, mac=ADDRESS, id=ID"
                    ));
                }
            }
        }
        Ok(net)
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
        };
        assert_eq!(disk, expected);
        for (wrong, word) in [
            ("", "begins with"),
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
