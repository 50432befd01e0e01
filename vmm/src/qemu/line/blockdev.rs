#![forbid(unsafe_code)]
//! `-blockdev`: images that devices name, and images made of others.

use std::path::PathBuf;

use super::pci::{Image, only};
use crate::qemu::error::OptionError;
use crate::qemu::words::Props;
use crate::spec::{DiskAccess, DiskParts};

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
