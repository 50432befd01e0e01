#![forbid(unsafe_code)]
//! Ports of console devices on the command line.

use std::str::FromStr;

use clap::Args as ClapArgs;

use super::split;
use crate::config::file::{DeviceTable, PortTable};

/// `--console`, once for each port.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct ConsoleArgs {
    /// A port between programs of the guest and of the host; may be given several times. It leads to whoever
    /// connects to a Unix socket, is appended to a file, or leads nowhere. With console it is one (/dev/hvc0),
    /// else a serial port, in a guest with udev /dev/virtio-ports/NAME. Ports are on one device, or on those
    /// that id names. Clones have sockets of their own (pando clone --console)
    #[arg(
        long = "console",
        value_name = "unix:PATH|file:PATH|null[,name=NAME][,console][,number=N][,id=ID]"
    )]
    pub ports: Vec<PortArg>,
}

impl ConsoleArgs {
    /// The devices as in a machine file, in the order in which their first ports were given.
    pub fn tables(&self) -> Vec<DeviceTable> {
        let mut devices: Vec<(Option<String>, Vec<PortTable>)> = Vec::new();
        for PortArg { device, port } in &self.ports {
            match devices.iter_mut().find(|(id, _)| id == device) {
                Some((_, ports)) => ports.push(port.clone()),
                None => devices.push((device.clone(), vec![port.clone()])),
            }
        }
        let table = |(id, ports)| DeviceTable::Console {
            id,
            slot: None,
            ports,
        };
        devices.into_iter().map(table).collect()
    }
}

/// One port, and the device that it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortArg {
    device: Option<String>,
    port: PortTable,
}

impl FromStr for PortArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = split(text).into_iter();
        let end = words.next().unwrap_or_default();
        let (mut device, mut port) = (None, PortTable::default());
        match end.split_once(':') {
            Some(("unix", path)) => port.uds_path = Some(path.into()),
            Some(("file", path)) => port.file = Some(path.into()),
            None if end == "null" => (),
            _ => return Err(format!("{end:?} is none of unix:PATH, file:PATH, null")),
        }
        for word in words {
            match word.split_once('=') {
                None if word == "console" => port.console = true,
                Some(("name", value)) => port.name = Some(value.to_owned()),
                Some(("number", value)) => {
                    let number = value.parse();
                    port.number = Some(number.map_err(|_| format!("{value:?} is no number"))?);
                }
                Some(("id", value)) => device = Some(value.to_owned()),
                _ => {
                    return Err(format!(
                        "{word:?} is none of name=NAME, console, number=N, id=ID"
                    ));
                }
            }
        }
        Ok(Self { device, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_on_one_device_or_on_those_that_are_named() {
        let ports = [
            "unix:/a,,b,name=agent",
            "null,console,id=c",
            "file:log,number=3",
        ];
        let args = ConsoleArgs {
            ports: ports.map(|port| port.parse().unwrap()).to_vec(),
        };
        let agent = PortTable {
            name: Some("agent".into()),
            uds_path: Some("/a,b".into()),
            ..PortTable::default()
        };
        let log = PortTable {
            number: Some(3),
            file: Some("log".into()),
            ..PortTable::default()
        };
        let console = PortTable {
            console: true,
            ..PortTable::default()
        };
        let device = |id: Option<&str>, ports| DeviceTable::Console {
            id: id.map(str::to_owned),
            slot: None,
            ports,
        };
        assert_eq!(
            args.tables(),
            [
                device(None, vec![agent, log]),
                device(Some("c"), vec![console])
            ]
        );
    }

    #[test]
    fn what_is_no_port_is_named() {
        for (wrong, word) in [
            ("", "\"\" is none of unix:PATH"),
            ("/path", "is none of unix:PATH"),
            ("tcp:1", "is none of unix:PATH"),
            ("null,nr=1", "\"nr=1\""),
            ("null,number=300", "\"300\" is no number"),
        ] {
            let error = wrong.parse::<PortArg>().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
