#![forbid(unsafe_code)]
//! `-device`: the memory module, and what is refused. Devices on the PCI bus are [`super::pci`]'s.

use super::refused;
use crate::qemu::error::{OptionError, expects, missing, no_identifier};
use crate::qemu::line::memory::is_identifier;
use crate::qemu::words::Props;
use crate::spec::DimmParts;

/// What a module can be told.
const PROPERTIES: [&str; 4] = ["memdev", "node", "slot", "addr"];

/// A memory module from its properties. `anonymous` numbers modules without an id.
pub fn dimm(mut props: Props, anonymous: usize) -> Result<DimmParts, OptionError> {
    let driver = props.text("driver")?.ok_or_else(|| missing("driver"))?;
    if driver != "pc-dimm" {
        return Err(OptionError::new(refused::device(&driver)));
    }
    let id = props.text("id")?;
    if id.as_deref().is_some_and(|id| !is_identifier(id)) {
        return Err(no_identifier());
    }
    if let Some(name) = props.names().find(|name| !PROPERTIES.contains(name)) {
        let why = match name {
            "size" | "hotplugged" | "hotpluggable" => "is not writable",
            _ => "not found",
        };
        return Err(OptionError::new(format!("Property 'pc-dimm.{name}' {why}")));
    }
    let node = match props.integer("node", "node")? {
        Some(node) => u32::try_from(node).map_err(|_| expects("node", "uint32_t"))?,
        None => 0,
    };
    let slot = match props.integer("slot", "slot")? {
        // Any that is free.
        Some(-1) | None => None,
        Some(slot) => Some(i32::try_from(slot).map_err(|_| expects("slot", "int32_t"))?),
    };
    let address = props.integer("addr", "addr")?.map(i64::cast_unsigned);
    Ok(DimmParts {
        id: id.unwrap_or_else(|| format!("dimm-{anonymous}")),
        backend: props
            .backend("memdev")?
            .filter(|id| !id.is_empty())
            .ok_or_else(|| OptionError::new("'memdev' property must be set"))?,
        node,
        slot: slot.map(i32::cast_unsigned),
        guest_address: address.filter(|&address| address != 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::words::Form;

    fn device(text: &str, anonymous: usize) -> Result<DimmParts, OptionError> {
        dimm(
            Props::parse(text, Some("driver"), Form::SwitchesOrJson)?,
            anonymous,
        )
    }

    #[test]
    fn a_dimm_is_read_and_nothing_else() {
        let dimm = device("pc-dimm,id=d,memdev=m,node=1,slot=2,addr=0x100000000", 0).unwrap();
        assert_eq!((dimm.node, dimm.slot), (1, Some(2)));
        assert_eq!(dimm.guest_address, Some(1 << 32));
        let message = |text| device(text, 0).unwrap_err().to_string();
        assert_eq!(message("pc-dimm,id=d"), "'memdev' property must be set");
        assert_eq!(
            message("pc-dimm,memdev=m,x=1"),
            "Property 'pc-dimm.x' not found"
        );
        assert!(message("e1000,netdev=n").contains("network devices are virtio-net-pci"));
        assert!(message("nope").starts_with("'nope' is not a valid device model name"));
    }
}
