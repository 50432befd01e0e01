#![forbid(unsafe_code)]
//! The ports of a console device: which numbers and names they have, and where the host has their other
//! ends.

use std::path::PathBuf;

use thiserror::Error;

/// Most ports of a console device: their numbers are below.
pub const MAX_CONSOLE_PORTS: u8 = 16;
/// Most bytes of the name of a port.
pub const MAX_PORT_NAME_BYTES: usize = 64;
/// Most bytes of the path of a socket: all that has a zero behind it in 108 bytes.
pub const MAX_SOCKET_PATH_BYTES: usize = 108 - 1;

/// A console device: ports between programs of the guest and of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConsoleParts {
    /// The ports.
    pub ports: Vec<PortParts>,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortParts {
    /// Its number, by which the guest's driver calls it; without it, the first free one. The first console
    /// gets 0, which is for a console; others begin at 1.
    pub number: Option<u8>,
    /// What it is called, which a guest's udev makes a link of in `/dev/virtio-ports`.
    pub name: Option<String>,
    /// Whether it is a console (`/dev/hvc0`), to which a guest can write whatever the host does, or a
    /// serial port.
    pub is_console: bool,
    /// Where it leads on this host.
    pub target: PortTarget,
}

/// Where a port leads on the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PortTarget {
    /// Nowhere: what the guest writes is gone, and nothing comes.
    #[default]
    Null,
    /// A Unix socket to which programs of the host connect, one at a time.
    Socket(PathBuf),
    /// A file to which what the guest writes is appended.
    File(PathBuf),
}

/// Why a console device cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConsoleFault {
    /// All numbers are taken.
    #[error(
        "it has too many ports: their numbers are below {MAX_CONSOLE_PORTS}, and 0 is for a console"
    )]
    TooManyPorts,
    /// No such number.
    #[error("there is no port number {number}: the last is {}", MAX_CONSOLE_PORTS - 1)]
    NoNumber {
        /// The number.
        number: u8,
    },
    /// The number is another port's.
    #[error("the port number {number} is given twice")]
    NumberTaken {
        /// The number.
        number: u8,
    },
    /// A serial port where guests look for a console.
    #[error("port number 0 is for a console: give a serial port another one, or none")]
    NotAConsole,
    /// A name that is none.
    #[error(
        "the port name {name:?} is not 1 to {MAX_PORT_NAME_BYTES} printable ASCII characters without '/' that \
         do not begin with '.'"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The name is another port's.
    #[error("the port name {name:?} is given twice: names of ports must differ")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A path with which no socket can be made.
    #[error(
        "the path of the socket of port {number} is {bytes} bytes long: there is room for 1 to \
         {MAX_SOCKET_PATH_BYTES}"
    )]
    BadSocketPath {
        /// The port's number.
        number: u8,
        /// The path's length.
        bytes: usize,
    },
    /// A file without a path.
    #[error("port {number} has an empty path for its file")]
    NoPath {
        /// The port's number.
        number: u8,
    },
}

impl ConsoleParts {
    /// Gives every port its number, and proves the ports. `names` are those that ports of other devices
    /// have; these are added to them.
    pub(super) fn place(&mut self, names: &mut Vec<String>) -> Result<(), ConsoleFault> {
        self.number()?;
        for port in &self.ports {
            port.check()?;
            let Some(name) = &port.name else {
                continue;
            };
            if names.contains(name) {
                let name = name.clone();
                return Err(ConsoleFault::NameTaken { name });
            }
            names.push(name.clone());
        }
        self.ports.sort_by_key(|port| port.number);
        Ok(())
    }

    /// What was asked for comes first, so that no default takes it.
    fn number(&mut self) -> Result<(), ConsoleFault> {
        let mut taken: Vec<u8> = Vec::new();
        for port in &self.ports {
            let Some(number) = port.number else {
                continue;
            };
            if number >= MAX_CONSOLE_PORTS {
                return Err(ConsoleFault::NoNumber { number });
            }
            if taken.contains(&number) {
                return Err(ConsoleFault::NumberTaken { number });
            }
            if number == 0 && !port.is_console {
                return Err(ConsoleFault::NotAConsole);
            }
            taken.push(number);
        }
        for port in &mut self.ports {
            let first = u8::from(!port.is_console);
            let mut free = (first..MAX_CONSOLE_PORTS).filter(|number| !taken.contains(number));
            let number = port.number.or_else(|| free.next());
            let number = number.ok_or(ConsoleFault::TooManyPorts)?;
            port.number = Some(number);
            taken.push(number);
        }
        Ok(())
    }
}

impl PortParts {
    fn check(&self) -> Result<(), ConsoleFault> {
        if let Some(name) = &self.name
            && !is_name(name)
        {
            let name = name.clone();
            return Err(ConsoleFault::BadName { name });
        }
        let number = self.number.unwrap_or_default();
        match &self.target {
            PortTarget::Null => Ok(()),
            PortTarget::Socket(path) => {
                let bytes = path.as_os_str().len();
                if (1..=MAX_SOCKET_PATH_BYTES).contains(&bytes) {
                    Ok(())
                } else {
                    Err(ConsoleFault::BadSocketPath { number, bytes })
                }
            }
            PortTarget::File(path) if path.as_os_str().is_empty() => {
                Err(ConsoleFault::NoPath { number })
            }
            PortTarget::File(_) => Ok(()),
        }
    }
}

/// Whether a port can be called so: it becomes a file name, in the guest and, of clones, on the host.
fn is_name(name: &str) -> bool {
    (1..=MAX_PORT_NAME_BYTES).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn port(number: Option<u8>, is_console: bool) -> PortParts {
        PortParts {
            number,
            is_console,
            ..PortParts::default()
        }
    }

    fn named(name: &str) -> PortParts {
        PortParts {
            name: Some(name.to_owned()),
            ..PortParts::default()
        }
    }

    fn place(ports: Vec<PortParts>) -> Result<Vec<PortParts>, ConsoleFault> {
        let mut console = ConsoleParts { ports };
        console.place(&mut vec!["other".to_owned()])?;
        Ok(console.ports)
    }

    #[test]
    fn the_first_console_is_port_0_and_serial_ports_begin_at_1() {
        let ports = vec![
            port(None, false),
            port(None, true),
            port(Some(1), false),
            port(None, true),
        ];
        let placed = place(ports).unwrap();
        let seen: Vec<_> = placed
            .iter()
            .map(|port| (port.number.unwrap(), port.is_console))
            .collect();
        assert_eq!(seen, [(0, true), (1, false), (2, false), (3, true)]);
        assert_eq!(place(placed.clone()).unwrap(), placed);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let fault = |ports| place(ports).unwrap_err();
        assert_eq!(place(vec![]), Ok(vec![]));
        let number = MAX_CONSOLE_PORTS;
        assert_eq!(
            fault(vec![port(Some(number), false)]),
            ConsoleFault::NoNumber { number }
        );
        let twice = vec![port(Some(3), false), port(Some(3), true)];
        assert_eq!(fault(twice), ConsoleFault::NumberTaken { number: 3 });
        assert_eq!(fault(vec![port(Some(0), false)]), ConsoleFault::NotAConsole);
        let many = vec![port(None, false); MAX_CONSOLE_PORTS.into()];
        assert_eq!(fault(many), ConsoleFault::TooManyPorts);
        place(vec![port(None, true); MAX_CONSOLE_PORTS.into()]).unwrap();
        let long = "x".repeat(MAX_PORT_NAME_BYTES + 1);
        for name in ["", ".", "..", "a/b", "a b", "ä", &long] {
            let name = name.to_owned();
            assert_eq!(fault(vec![named(&name)]), ConsoleFault::BadName { name });
        }
        place(vec![named(&long[1..]), named("org.qemu.guest_agent.0")]).unwrap();
        for names in [["a", "a"], ["b", "other"]] {
            let name = names[1].to_owned();
            assert_eq!(
                fault(names.map(named).to_vec()),
                ConsoleFault::NameTaken { name }
            );
        }
        let to = |target| PortParts {
            target,
            ..PortParts::default()
        };
        for bytes in [0, MAX_SOCKET_PATH_BYTES + 1] {
            let path = PathBuf::from("p".repeat(bytes));
            assert_eq!(
                fault(vec![to(PortTarget::Socket(path))]),
                ConsoleFault::BadSocketPath { number: 1, bytes }
            );
        }
        let no_path = PortTarget::File(PathBuf::new());
        assert_eq!(fault(vec![to(no_path)]), ConsoleFault::NoPath { number: 1 });
    }

    proptest! {
        #[test]
        fn numbers_never_meet(
            asked in proptest::collection::vec(
                (proptest::option::of(0_u8..20), any::<bool>()),
                0..20,
            ),
        ) {
            let ports = asked.iter().map(|&(number, is_console)| port(number, is_console));
            if let Ok(placed) = place(ports.collect()) {
                let mut numbers: Vec<_> = placed.iter().map(|port| port.number.unwrap()).collect();
                numbers.dedup();
                prop_assert_eq!(numbers.len(), asked.len());
                prop_assert!(numbers.iter().all(|&number| number < MAX_CONSOLE_PORTS));
                let zero = placed.iter().find(|port| port.number == Some(0));
                prop_assert!(zero.is_none_or(|port| port.is_console));
            }
        }
    }
}
