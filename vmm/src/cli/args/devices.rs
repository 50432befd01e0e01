#![forbid(unsafe_code)]
//! Devices on the command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args as ClapArgs;

use crate::config::file::DeviceTable;

/// Devices of a machine, beside those of the machine file.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct DeviceArgs {
    /// A disk on a raw image: FILE[,ro][,snapshot][,id=ID][,serial=TEXT]; may be given several times.
    /// With ro nobody can write it; with snapshot what the guest writes ends with the VM. A comma in
    /// FILE is written twice
    #[arg(long = "disk", value_name = "FILE[,..]")]
    pub disks: Vec<DiskArg>,
    /// An entropy device
    #[arg(long)]
    pub rng: bool,
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
        disks.chain(rng).collect()
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
