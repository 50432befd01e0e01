#![forbid(unsafe_code)]
//! `-device vhost-vsock-pci`: connections between guest and host, of which QEMU's are the kernel's and
//! Pando's are Unix sockets.

use std::path::PathBuf;

use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::{FIRST_CID, VsockParts};

/// Drivers of `-device`, each with its other name.
pub const DRIVERS: [&str; 2] = ["vhost-vsock-pci", "vhost-vsock-pci-non-transitional"];

/// Reads what only this device has.
pub fn parts(props: &mut Props) -> Result<VsockParts, OptionError> {
    let cid = props.number("guest-cid")?.unwrap_or_default();
    if cid < FIRST_CID.into() {
        return Err(OptionError::new(
            "guest-cid property must be greater than 2",
        ));
    }
    let cid = u32::try_from(cid)
        .map_err(|_| OptionError::new("guest-cid property must be a 32-bit number"))?;
    if props.has("vhostfd") {
        return Err(OptionError::new(
            "vhostfd cannot be had: connections go to Unix sockets, at x-uds-path",
        ));
    }
    let path = props.text("x-uds-path")?.map(PathBuf::from);
    Ok(VsockParts { cid, path })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::words::Form;

    fn read(text: &str) -> Result<VsockParts, String> {
        let mut props = Props::parse(text, None, Form::KeyValue).unwrap();
        parts(&mut props).map_err(|error| error.to_string())
    }

    #[test]
    fn a_context_id_is_the_guests() {
        assert_eq!(
            read("guest-cid=3").unwrap(),
            VsockParts { cid: 3, path: None }
        );
        let given = read("guest-cid=77,x-uds-path=/a").unwrap();
        assert_eq!((given.cid, given.path), (77, Some("/a".into())));
        for (text, word) in [
            ("id=a", "greater than 2"),
            ("guest-cid=2", "greater than 2"),
            ("guest-cid=4294967296", "32-bit"),
            ("guest-cid=x", "uint64"),
            ("guest-cid=3,vhostfd=4", "vhostfd cannot be had"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
