#![forbid(unsafe_code)]
//! `-device virtio-balloon-pci`.

use super::pci::only;
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::BalloonParts;

/// Names of the device.
pub(super) const DRIVERS: [&str; 3] = [
    "virtio-balloon-pci",
    "virtio-balloon",
    "virtio-balloon-pci-non-transitional",
];

/// Reads what is said of a balloon.
pub(super) fn parts(props: &mut Props) -> Result<BalloonParts, OptionError> {
    if props.switch("free-page-hint")? == Some(true) {
        return Err(OptionError::new(
            "free-page-hint=on cannot be had: hints are for a migration that copies memory while the guest \
             runs, which Pando has not; say free-page-reporting=on to have free memory go back to the host",
        ));
    }
    // Nothing that a guest could tell from its absence.
    only(props, "page-poison", &["on", "true", "yes"])?;
    only(props, "qemu-4-0-config-size", &["on", "off"])?;
    Ok(BalloonParts {
        deflate_on_oom: props.switch("deflate-on-oom")?.unwrap_or(false),
        free_page_reporting: props.switch("free-page-reporting")?.unwrap_or(false),
    })
}
