#![forbid(unsafe_code)]
//! `-device virtio-mem-pci`: memory that grows and shrinks.

use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::MemParts;

/// Drivers of `-device`.
pub(super) const DRIVERS: [&str; 2] = ["virtio-mem-pci", "virtio-mem"];

/// Reads what only this device has.
pub(super) fn parts(props: &mut Props) -> Result<MemParts, OptionError> {
    let backend = props.backend("memdev")?.filter(|id| !id.is_empty());
    let requested_bytes = props.size("requested-size")?.unwrap_or(0);
    let block_bytes = props.size("block-size")?.filter(|&bytes| bytes != 0);
    let node = props.number_to("node", u32::MAX, "uint32_t")?.unwrap_or(0);
    let prealloc = props.switch("prealloc")?.unwrap_or(false);
    let guest_address = props.number("memaddr")?.filter(|&address| address != 0);
    // It is always on: guests that do not know it have no other.
    let inaccessible = props.text("unplugged-inaccessible")?;
    if let Some(word) = inaccessible.filter(|word| !matches!(word.as_str(), "on" | "auto")) {
        return Err(OptionError::new(format!(
            "unplugged-inaccessible={word} cannot be had: on is what there is"
        )));
    }
    Ok(MemParts {
        backend: backend.ok_or_else(|| OptionError::new("'memdev' property must be set"))?,
        requested_bytes,
        block_bytes,
        node,
        prealloc,
        guest_address,
        bytes: 0,
    })
}
