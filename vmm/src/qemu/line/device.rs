#![forbid(unsafe_code)]
//! `-device`: the memory module, and what is refused. Devices on the PCI bus are [`super::pci`]'s.

use super::refused;
use crate::qemu::error::{OptionError, missing};
use crate::qemu::words::Props;
use crate::spec::DimmParts;

/// A memory module from its properties. `anonymous` numbers modules without an id.
pub fn dimm(mut props: Props, anonymous: usize) -> Result<DimmParts, OptionError> {
    let driver = props.text("driver")?.ok_or_else(|| missing("driver"))?;
    if driver != "pc-dimm" {
        return Err(OptionError::new(refused::device(&driver)));
    }
    let small = |value: Option<u64>| value.map(|v| u32::try_from(v).unwrap_or(u32::MAX));
    let parts = DimmParts {
        id: props
            .text("id")?
            .unwrap_or_else(|| format!("dimm-{anonymous}")),
        backend: props
            .text("memdev")?
            .ok_or_else(|| OptionError::new("'memdev' property must be set"))?,
        node: small(props.number("node")?).unwrap_or(0),
        slot: small(props.number("slot")?),
        guest_address: props.number("addr")?.filter(|&address| address != 0),
    };
    match props.names().next() {
        Some(name) => Err(OptionError::new(format!(
            "Property 'pc-dimm.{name}' not found"
        ))),
        None => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::words::Form;

    fn device(text: &str, anonymous: usize) -> Result<DimmParts, OptionError> {
        dimm(
            Props::parse(text, Some("driver"), Form::KeyValue)?,
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
