#![forbid(unsafe_code)]
//! Images that monitors and command lines name: `-blockdev` and `blockdev-add`.

use std::path::PathBuf;

use super::pci::{Image, only};
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::{DiskAccess, DiskParts};

/// Why a device cannot have a drive: another has it, or there is none.
pub fn no_drive(drive: &str, is_known: bool) -> OptionError {
    OptionError::new(if is_known {
        format!("Drive '{drive}' is already in use by another block device")
    } else {
        format!("Property 'virtio-blk-device.drive' can't find value '{drive}'")
    })
}

/// Whether one of these images has another one as its file.
pub fn is_file_node(images: &[Image], id: &str) -> bool {
    let mut files = images.iter().filter_map(|image| image.file_node.as_deref());
    files.any(|file| file == id)
}

/// Reads a blockdev, which may have another one of `images` as its file.
pub fn blockdev(mut props: Props, images: &[Image]) -> Result<Image, OptionError> {
    let driver = props.required("driver")?;
    let node = props
        .text("node-name")?
        .ok_or_else(|| OptionError::new("'node-name' must be specified for the root node"))?;
    if images.iter().any(|image| image.id == node) {
        return Err(OptionError::new(format!(
            "Duplicate nodes with node-name='{node}'"
        )));
    }
    let read_only = props.switch("read-only")?.unwrap_or(false);
    only(&mut props, "discard", &["unmap"])?;
    only(&mut props, "cache.direct", &["off"])?;
    only(&mut props, "cache.no-flush", &["off"])?;
    only(&mut props, "auto-read-only", &["off"])?;
    let asked = if read_only {
        DiskAccess::Read
    } else {
        DiskAccess::Write
    };
    let image = |path: PathBuf, access, file_node| Image {
        id: node.clone(),
        disk: DiskParts {
            path,
            access,
            ..DiskParts::default()
        },
        file_node,
        is_drive: false,
    };
    match driver.as_str() {
        "file" => {
            let path = props.required("filename")?;
            only(&mut props, "aio", &["threads"])?;
            props.finish()?;
            Ok(image(path.into(), asked, None))
        }
        "raw" => {
            if let Some(file) = props.text("file")? {
                props.finish()?;
                let inner = images.iter().find(|image| image.id == file);
                let inner = inner.ok_or_else(|| {
                    OptionError::new(format!("Cannot find device='' nor node-name='{file}'"))
                })?;
                // Never more than what it is made of may be asked for.
                let access = match inner.disk.access {
                    DiskAccess::Write => asked,
                    narrow if asked == DiskAccess::Write => narrow,
                    _ => DiskAccess::Read,
                };
                return Ok(image(inner.disk.path.clone(), access, Some(file)));
            }
            only(&mut props, "file.driver", &["file"])?;
            let path = props.required("file.filename")?;
            props.finish()?;
            Ok(image(path.into(), asked, None))
        }
        other => Err(OptionError::new(format!(
            "driver '{other}' cannot be had: images are raw files, so say driver=file or driver=raw"
        ))),
    }
}
