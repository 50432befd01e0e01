#![forbid(unsafe_code)]
//! The machine itself: `-machine`, `-accel`, `-cpu`.

use super::refused::MULTI_PROCESS;
use crate::qemu::error::{OptionError, expects, not_accepted};
use crate::qemu::words::{Form, Props};

/// Names of the machine, with what QEMU's states call them.
const KINDS: &[(&str, &str)] = &[
    ("q35", "pc-q35-10.0"),
    ("pc", "pc-i440fx-10.0"),
    ("microvm", "microvm"),
];

/// Properties of `-machine` that only say what is so.
const AS_IT_IS: &[(&str, &[&str])] = &[
    ("usb", &["off"]),
    ("vmport", &["off"]),
    ("smm", &["off"]),
    ("hpet", &["off"]),
    ("sata", &["off"]),
    ("smbus", &["off"]),
    ("hmat", &["off"]),
    ("nvdimm", &["off"]),
    ("graphics", &["off"]),
    ("kernel-irqchip", &["on"]),
    ("acpi", &["on"]),
    ("pit", &["on"]),
    ("pic", &["on"]),
    ("i8042", &["on"]),
    ("suppress-vmdesc", &["on", "off"]),
];

/// What `-machine` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineOption {
    /// The machine in QEMU's full words.
    pub kind: String,
    /// The backend that is its RAM.
    pub memory_backend: Option<String>,
    /// Whether memory may be merged where its backend does not say.
    pub merge: bool,
    /// The same for whether a core dump has it.
    pub dump: bool,
}

impl Default for MachineOption {
    fn default() -> Self {
        Self {
            kind: "pc-q35-10.0".to_owned(),
            memory_backend: None,
            merge: true,
            dump: true,
        }
    }
}

impl MachineOption {
    /// Whether such a machine has a PCI bus even if no device is on it: with QEMU's microvm there is none.
    pub fn has_pci(&self) -> bool {
        self.kind != "microvm"
    }

    /// Reads `-machine`; several are one.
    pub fn read(&mut self, text: &str) -> Result<(), OptionError> {
        let mut props = Props::parse(text, Some("type"), Form::KeyValue)?;
        if let Some(kind) = props.text("type")? {
            self.kind = full_kind(&kind)?;
        }
        if let Some(backend) = props.backend("memory-backend")? {
            self.memory_backend = Some(backend).filter(|id| !id.is_empty());
        }
        self.merge = props.switch("mem-merge")?.unwrap_or(self.merge);
        self.dump = props.switch("dump-guest-core")?.unwrap_or(self.dump);
        if let Some(accel) = props.text("accel")? {
            accelerator(&accel)?;
        }
        for (name, values) in AS_IT_IS {
            if props.has(name) {
                let value = match props.text(name) {
                    Ok(value) => value.unwrap_or_default(),
                    Err(_) => continue,
                };
                let value = match value.as_str() {
                    "yes" | "true" | "y" => "on".to_owned(),
                    "no" | "false" | "n" => "off".to_owned(),
                    _ => value,
                };
                if !matches!(value.as_str(), "on" | "off" | "auto" | "split") {
                    return Err(match *name {
                        "smm" | "vmport" | "acpi" => not_accepted(name, &value),
                        _ => expects(name, "'on' or 'off'"),
                    });
                }
                if !values.contains(&value.as_str()) {
                    return Err(OptionError::new(format!(
                        "{name}={value} cannot be had: on this machine {name} is {}",
                        values[0]
                    )));
                }
            }
        }
        match props.names().next() {
            Some(name) => Err(OptionError::new(format!(
                "Property '{}-machine.{name}' not found",
                self.kind
            ))),
            None => Ok(()),
        }
    }
}

/// Versions of its machines that QEMU has.
const VERSIONS: &[&str] = &[
    "2.4", "2.5", "2.6", "2.7", "2.8", "2.9", "2.10", "2.11", "2.12", "3.0", "3.1", "4.0", "4.0.1",
    "4.1", "4.2", "5.0", "5.1", "5.2", "6.0", "6.1", "6.2", "7.0", "7.1", "7.2", "8.0", "8.1",
    "8.2", "9.0", "9.1", "9.2", "10.0",
];

fn version(kind: &str) -> Option<&str> {
    kind.strip_prefix("pc-q35-")
        .or_else(|| kind.strip_prefix("pc-i440fx-"))
}

impl MachineOption {
    /// QEMU's warning of an old machine.
    pub fn warning(&self) -> Option<String> {
        let mut numbers = version(&self.kind)?.split('.');
        let mut number = || numbers.next()?.parse::<u32>().ok();
        let (major, minor) = (number()?, number()?);
        ((major, minor) <= (7, 0)).then(|| {
            format!(
                "warning: Machine type '{}' is deprecated: machines more than 3 years old are subject to \
                 deletion after 6 years",
                self.kind
            )
        })
    }
}

fn full_kind(kind: &str) -> Result<String, OptionError> {
    if let Some((_, full)) = KINDS.iter().find(|(name, _)| *name == kind) {
        return Ok((*full).to_owned());
    }
    if kind == "x-remote" {
        return Err(OptionError::new(format!(
            "machine type 'x-remote' cannot be had: {MULTI_PROCESS}"
        )));
    }
    let version = version(kind).filter(|version| VERSIONS.contains(version));
    if version.is_some_and(|version| version != "4.0.1" || kind.starts_with("pc-q35-")) {
        return Ok(kind.to_owned());
    }
    Err(OptionError::new(format!(
        "unsupported machine type: \"{kind}\""
    ))
    .hint("Use -machine help to list supported machines")
    .hint("Pando has one machine, by the names q35, pc, microvm, pc-q35-VERSION and pc-i440fx-VERSION"))
}

/// Reads `-accel`.
pub fn accel(text: &str) -> Result<(), OptionError> {
    let mut props = Props::parse(text, Some("accel"), Form::Switches)?;
    if let Some(name) = props.text("accel")? {
        accelerator(&name)?;
    }
    if props.has("kernel-irqchip") && props.switch("kernel-irqchip")? == Some(false) {
        return Err(OptionError::new(
            "kernel-irqchip=off cannot be had: interrupt chips are KVM's",
        ));
    }
    match props.names().next() {
        Some(name) => Err(OptionError::new(format!(
            "Property 'kvm-accel.{name}' not found"
        ))),
        None => Ok(()),
    }
}

/// A list of accelerators is tried in its order; KVM is the one that there is.
fn accelerator(list: &str) -> Result<(), OptionError> {
    if list.split(':').any(|name| name == "kvm") {
        return Ok(());
    }
    Err(OptionError::new(format!(
        "invalid accelerator {list}: guests run on KVM alone; use -accel kvm"
    )))
}

/// Reads `-cpu`.
pub fn cpu(text: &str) -> Result<(), OptionError> {
    let (model, features) = text.split_once(',').unwrap_or((text, ""));
    if !matches!(model, "host" | "max") {
        return Err(OptionError::new(format!(
            "unable to find CPU model '{model}' here: a guest has the host's CPU as far as KVM offers it; \
             use -cpu host"
        )));
    }
    match features
        .split(',')
        .find(|feature| !feature.is_empty() && *feature != "migratable=on")
    {
        Some(feature) => Err(OptionError::new(format!(
            "-cpu feature {feature} cannot be had: features are what KVM offers"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_have_qemus_names() {
        let mut machine = MachineOption::default();
        machine
            .read("q35,memory-backend=pc.ram,accel=kvm:tcg,usb=off")
            .unwrap();
        assert_eq!(machine.memory_backend.as_deref(), Some("pc.ram"));
        machine.read("pc-q35-7.0,mem-merge=off").unwrap();
        assert!(machine.warning().unwrap().contains("deprecated"));
        assert!(!machine.merge && machine.dump);
        machine.read("pc-q35-9.2").unwrap();
        assert_eq!(machine.kind, "pc-q35-9.2");
        assert_eq!(machine.warning(), None);
        let mut message = |text| machine.read(text).unwrap_err().to_string();
        assert_eq!(
            message("q35,foo=1"),
            "Property 'pc-q35-10.0-machine.foo' not found"
        );
        assert!(message("q35,usb=on").starts_with("usb=on cannot be had"));
        assert!(message("pc-q35-1.0").starts_with("unsupported machine type"));
        assert!(message("q35,usb=x").contains("expects 'on' or 'off'"));
        assert!(message("q35,smm=x").contains("does not accept value 'x'"));
        assert!(message("isapc").starts_with("unsupported machine type"));
        assert!(message("q35,accel=tcg").contains("use -accel kvm"));
    }

    #[test]
    fn the_cpu_is_the_hosts() {
        assert!(cpu("host").is_ok() && cpu("max,migratable=on").is_ok());
        assert!(cpu("Nehalem").is_err() && cpu("host,+x2apic").is_err());
        assert!(accel("kvm").is_ok() && accel("tcg,thread=multi").is_err());
    }
}
