#![forbid(unsafe_code)]
//! `-device virtio-serial-pci` and the ports on it, `-device virtconsole` and `-device virtserialport`, each
//! with its `-chardev`.

use super::chardev::{Address, Chardev, Role};
use super::pci::only;
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::{ConsoleParts, PortParts, PortTarget};

/// Drivers of `-device` that have ports, each with its other names.
pub(super) const DRIVERS: [&str; 3] = [
    "virtio-serial-pci",
    "virtio-serial",
    "virtio-serial-pci-non-transitional",
];
/// A port that is a console.
const CONSOLE: &str = "virtconsole";
/// A port that is none.
const SERIAL: &str = "virtserialport";
/// Most ports that QEMU has.
const MAX_PORTS: u64 = 31;

/// A device with ports as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bus {
    max_ports: u64,
    pub(super) ports: Vec<Port>,
}

/// A port as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    driver: String,
    /// The bus that it is on; without it, the first.
    pub(super) bus: Option<String>,
    pub(super) chardev: Option<String>,
    pub(super) parts: PortParts,
    pub(super) typed: String,
}

impl Bus {
    /// Takes the properties that are of this device only.
    pub(super) fn read(props: &mut Props) -> Result<Self, OptionError> {
        let max_ports = props.number("max_ports")?.unwrap_or(MAX_PORTS);
        if !(1..=MAX_PORTS).contains(&max_ports) {
            return Err(OptionError::new(format!(
                "maximum ports supported: {MAX_PORTS}, not max_ports={max_ports}"
            )));
        }
        only(props, "emergency-write", &["off"])?;
        Ok(Self {
            max_ports,
            ports: Vec::new(),
        })
    }

    /// Its ports, each where it leads to.
    pub(super) fn parts(&self) -> Result<ConsoleParts, OptionError> {
        let ports = self.ports.iter().map(|port| port.parts.clone());
        let ports: Vec<_> = ports.collect();
        // Number 0 waits for a console.
        let kept = u64::from(!ports.iter().any(|port| port.is_console));
        let numbers = ports.iter().filter_map(|port| port.number);
        let beyond = numbers.map(u64::from).find(|&nr| nr >= self.max_ports);
        if beyond.is_some() {
            return Err(OptionError::new(format!(
                "virtio-serial-bus: Out-of-range port id specified, max. allowed: {}",
                self.max_ports - 1
            )));
        }
        if ports.len() as u64 + kept > self.max_ports && !ports.is_empty() {
            return Err(OptionError::new(
                "virtio-serial-bus: Maximum port limit for this device reached",
            ));
        }
        Ok(ConsoleParts { ports })
    }
}

impl Port {
    /// Reads a port; gives the properties of any other device back.
    pub(super) fn read(mut props: Props, typed: &str) -> Result<Result<Self, Props>, OptionError> {
        let driver = props.required("driver")?;
        if !is_port(&driver) {
            props.add("driver", &driver);
            return Ok(Err(props));
        }
        // The port's own name, which nothing refers to.
        props.text("id")?;
        let number = props.number("nr")?.map(|number| {
            u8::try_from(number)
                .map_err(|_| OptionError::new(format!("there is no port number {number}")))
        });
        let port = Self {
            bus: props.text("bus")?,
            chardev: props.text("chardev")?,
            parts: PortParts {
                number: number.transpose()?,
                name: props.text("name")?,
                is_console: driver == CONSOLE,
                target: PortTarget::Null,
            },
            driver,
            typed: typed.to_owned(),
        };
        if let Some(name) = props.names().next() {
            let driver = &port.driver;
            return Err(OptionError::new(format!(
                "Property '{driver}.{name}' not found"
            )));
        }
        Ok(Ok(port))
    }

    /// Why it has no device.
    pub(super) fn no_bus(&self) -> OptionError {
        OptionError::new(match &self.bus {
            Some(bus) => format!("Bus '{bus}' not found"),
            None => format!(
                "No 'virtio-serial-bus' bus found for device '{}'",
                self.driver
            ),
        })
    }

    /// Says where it leads to; `chardev` is the one that it names, if there is such and nobody has it.
    pub(super) fn connect(&mut self, chardev: Option<Chardev>) -> Result<(), OptionError> {
        let Some(id) = &self.chardev else {
            return Ok(());
        };
        let chardev = chardev.ok_or_else(|| {
            OptionError::new(format!(
                "Property '{}.chardev' can't find value '{id}', or it is in use already",
                self.driver
            ))
        })?;
        let no = |what: &str| {
            Err(OptionError::new(format!(
                "chardev '{id}' cannot be a port's: {what}; it is socket,path=PATH,server=on,wait=off, \
                 file,path=PATH or null"
            )))
        };
        self.parts.target = match chardev {
            Chardev::Null => PortTarget::Null,
            Chardev::File { path, .. } => PortTarget::File(path),
            Chardev::Socket {
                address: Address::Unix(path),
                role: Role::Server { wait: false },
            } => PortTarget::Socket(path),
            Chardev::Socket {
                role: Role::Server { wait: true },
                ..
            } => return no("a machine does not wait for whoever is at a port"),
            Chardev::Socket {
                role: Role::Client, ..
            } => return no("a port does not connect, it listens"),
            Chardev::Socket { .. } => return no("a port's socket is a Unix socket"),
            Chardev::Stdio | Chardev::Pty => return no("a port has no terminal"),
            Chardev::Hub(_) => return no("nobody shares it and it has no log"),
        };
        Ok(())
    }
}

fn is_port(driver: &str) -> bool {
    matches!(driver, CONSOLE | SERIAL)
}

/// Whether a driver is that of a port, or of a device that has them: they are there from the start.
pub fn has_ports(driver: &str) -> bool {
    is_port(driver) || DRIVERS.contains(&driver)
}

#[cfg(test)]
mod tests {
    use crate::qemu::line::{Wanted, arguments, wanted};
    use crate::spec::{DeviceKind, PortParts, PortTarget};

    fn read(words: &[&str]) -> Result<Wanted, String> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let arguments = arguments(&words, &mut |_| unreachable!()).map_err(|e| e.to_string())?;
        wanted::read(&arguments).map_err(|error| error.to_string())
    }

    fn ports(words: &[&str]) -> Result<Vec<Vec<PortParts>>, String> {
        let parts = read(words)?.memory.pci.parts();
        let parts = parts.map_err(|error| error.to_string())?.into_iter();
        let ports = parts.map(|part| match part.kind {
            DeviceKind::Console(console) => console.ports,
            other => panic!("{other:?}"),
        });
        Ok(ports.collect())
    }

    const BUS: [&str; 2] = ["-device", "virtio-serial-pci,id=vs"];

    #[test]
    fn ports_are_on_the_bus_that_they_name_or_the_first() {
        let words = [
            &BUS[..],
            &["-device", "virtio-serial,id=other,max_ports=4"],
            &["-chardev", "socket,id=s,path=/s,server=on,wait=off"],
            &["-chardev", "file,id=f,path=/f,append=on"],
            &["-device", "virtconsole,chardev=f,id=con"],
            &[
                "-device",
                "virtserialport,bus=other.0,chardev=s,name=agent,nr=3",
            ],
        ]
        .concat();
        let console = PortParts {
            is_console: true,
            target: PortTarget::File("/f".into()),
            ..PortParts::default()
        };
        let agent = PortParts {
            number: Some(3),
            name: Some("agent".into()),
            is_console: false,
            target: PortTarget::Socket("/s".into()),
        };
        assert_eq!(ports(&words).unwrap(), [vec![console], vec![agent]]);
        assert_eq!(ports(&BUS).unwrap(), [vec![]]);
    }

    #[test]
    fn what_cannot_be_is_said() {
        for (words, text) in [
            (
                &["-device", "virtconsole"][..],
                "No 'virtio-serial-bus' bus found for device 'virtconsole'",
            ),
            (
                &["-device", "virtserialport,bus=x.0"],
                "Bus 'x.0' not found",
            ),
            (
                &["-device", "virtserialport,chardev=c"],
                "'virtserialport.chardev' can't find value 'c'",
            ),
            (
                &["-device", "virtserialport,speed=9"],
                "'virtserialport.speed' not found",
            ),
            (&["-device", "virtserialport,nr=256"], "no port number 256"),
            (
                &["-device", "virtio-serial-pci,max_ports=32"],
                "max_ports=32",
            ),
            (
                &["-device", "virtio-serial-pci,max_ports=0"],
                "maximum ports supported",
            ),
        ] {
            let words = if text.starts_with("No 'virtio") {
                words.to_vec()
            } else {
                [&BUS, words].concat()
            };
            let error = ports(&words).unwrap_err();
            assert!(error.contains(text), "{words:?}: {error}");
        }
        for (chardev, text) in [
            ("socket,id=c,path=/s,server=on", "does not wait"),
            ("socket,id=c,path=/s", "does not connect"),
            (
                "socket,id=c,host=127.0.0.1,port=1,server=on,wait=off",
                "is a Unix socket",
            ),
            ("pty,id=c", "has no terminal"),
            ("null,id=c,mux=on", "nobody shares it"),
        ] {
            let port = ["-chardev", chardev, "-device", "virtconsole,chardev=c"];
            let error = ports(&[&BUS[..], &port].concat()).unwrap_err();
            assert!(error.contains(text), "{chardev}: {error}");
        }
        let few = ["-device", "virtio-serial-pci,max_ports=2"];
        let port = ["-device", "virtserialport"];
        for (more, text) in [
            ([port, port], "Maximum port limit"),
            ([port, ["-device", "virtconsole,nr=2"]], "max. allowed: 1"),
        ] {
            let error = ports(&[few, more[0], more[1]].concat()).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        assert_eq!(ports(&[few, port].concat()).unwrap()[0].len(), 1);
    }
}
