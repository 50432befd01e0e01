#![forbid(unsafe_code)]
//! Devices on the command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args as ClapArgs;

use crate::clone::nets::NetPattern;
use crate::config::file::DeviceTable;
use crate::spec::MacAddress;

/// Devices of a machine, beside those of the machine file.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct DeviceArgs {
    /// A disk on a raw image: FILE[,ro][,snapshot][,id=ID][,serial=TEXT]; may be given several times.
    /// With ro nobody can write it; with snapshot what the guest writes ends with the VM. A comma in
    /// FILE is written twice
    #[arg(long = "disk", value_name = "FILE[,..]")]
    pub disks: Vec<DiskArg>,
    /// A network device: [tap=NAME][,netns=NAME][,mac=ADDRESS][,id=ID]; may be given several times. The tap
    /// must exist; with netns it is in that network namespace of `ip netns`
    #[arg(long = "net", value_name = "tap=NAME[,..]")]
    pub nets: Vec<NetArg>,
    /// An entropy device
    #[arg(long)]
    pub rng: bool,
}

impl DeviceArgs {
    /// The devices as in a machine file.
    pub fn tables(&self) -> Vec<DeviceTable> {
        let disks = self.disks.iter().map(|disk| disk.0.clone());
        let rng = self.rng.then_some(DeviceTable::Rng {
            id: None,
            slot: None,
        });
        let nets = self.nets.iter().map(|net| net.table());
        disks.chain(nets).chain(rng).collect()
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

    /// The cable of clones, where it is a cable.
    pub fn pattern(&self) -> Result<NetPattern, String> {
        Ok(NetPattern {
            id: self.id.clone(),
            tap: self.tap.clone().ok_or("--net of clones needs tap=NAME")?,
            netns: self.netns.clone(),
            mac: self.mac,
        })
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
        let net: NetArg = "tap=t%d,netns=n,mac=52:54:00:00:00:01,id=x"
            .parse()
            .unwrap();
        let pattern = net.pattern().unwrap();
        assert_eq!(
            (pattern.tap.as_str(), pattern.netns.as_deref()),
            ("t%d", Some("n"))
        );
        assert!("".parse::<NetArg>().unwrap().pattern().is_err());
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
}
