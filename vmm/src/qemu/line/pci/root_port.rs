#![forbid(unsafe_code)]
//! `-device pcie-root-port`: with QEMU the place of one device that may come and go. Here every place of the one bus
//! is such a place, and a port is a name of that bus.

use super::super::place::slot;
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;

/// Drivers of ports.
const DRIVERS: [&str; 2] = ["pcie-root-port", "ioh3420"];
/// The bus itself.
const BUSES: [&str; 2] = ["pci.0", "pcie.0"];

/// The ports that there are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootPorts(Vec<String>);

impl RootPorts {
    /// Reads a port; gives the properties of any other device back.
    pub(super) fn read(&mut self, mut props: Props) -> Result<Option<Props>, OptionError> {
        let driver = props.text("driver").ok().flatten().unwrap_or_default();
        if !DRIVERS.contains(&driver.as_str()) {
            props.add("driver", &driver);
            return Ok(Some(props));
        }
        let id = props.text("id")?;
        check_bus(props.text("bus")?.as_deref())?;
        // Where it is itself nobody can ask: it is not on the bus.
        for name in ["chassis", "port", "slot"] {
            props.number(name)?;
        }
        props.text("addr")?;
        props.switch("multifunction")?;
        if props.switch("hotplug")? == Some(false) {
            return Err(OptionError::new(
                "hotplug=off cannot be had: devices come and go at every place of the bus",
            ));
        }
        if let Some(name) = props.names().next() {
            return Err(OptionError::new(format!(
                "Property '{driver}.{name}' not found"
            )));
        }
        self.0.extend(id);
        Ok(None)
    }

    /// The slot of a device that is to be at this place.
    pub(super) fn place(
        &self,
        bus: Option<&str>,
        address: Option<&str>,
    ) -> Result<Option<u8>, OptionError> {
        let is_port = bus.is_some_and(|bus| self.0.iter().any(|id| id == bus));
        match address {
            // The only place behind a port: any that is free.
            None | Some("0" | "0x0" | "00" | "0.0" | "0x0.0" | "0x0.0x0") if is_port => Ok(None),
            Some(address) if is_port => Err(OptionError::new(format!(
                "PCI: slot {address} is not valid for {}, parent device only allows plugging into slot 0.",
                bus.unwrap_or_default()
            ))),
            _ => {
                check_bus(bus)?;
                address.map(slot).transpose()
            }
        }
    }
}

fn check_bus(bus: Option<&str>) -> Result<(), OptionError> {
    match bus {
        Some(bus) if !BUSES.contains(&bus) => {
            Err(OptionError::new(format!("Bus '{bus}' not found")))
        }
        _ => Ok(()),
    }
}
