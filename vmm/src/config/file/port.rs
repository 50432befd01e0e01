#![forbid(unsafe_code)]
//! Ports of a console device in a machine file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::is_default;
use crate::spec::{PortParts, PortTarget};

/// A port of a console device. Without `uds_path` and `file` what the guest writes is gone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortTable {
    /// Its number, by which the guest's driver calls it. If left out, the first console is 0, and others have the
    /// first that is free from 1 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 15))]
    pub number: Option<u8>,
    /// What it is called: in guests with udev `/dev/virtio-ports/NAME`, and the socket of clone K is
    /// `clone-K.NAME.sock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it is a console (`/dev/hvc0`) or a serial port.
    #[serde(default, skip_serializing_if = "is_default")]
    pub console: bool,
    /// The Unix socket to which programs of the host connect, one at a time. A clone's is where `pando clone` is
    /// told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uds_path: Option<PathBuf>,
    /// The file to which what the guest writes is appended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl TryFrom<&PortTable> for PortParts {
    type Error = String;

    fn try_from(table: &PortTable) -> Result<Self, String> {
        let target = match (table.uds_path.clone(), table.file.clone()) {
            (None, None) => PortTarget::Null,
            (Some(path), None) => PortTarget::Socket(path),
            (None, Some(path)) => PortTarget::File(path),
            (Some(_), Some(_)) => {
                return Err("a port has a uds_path or a file: leave one out".to_owned());
            }
        };
        Ok(Self {
            number: table.number,
            name: table.name.clone(),
            is_console: table.console,
            target,
        })
    }
}

impl From<&PortParts> for PortTable {
    fn from(port: &PortParts) -> Self {
        let (uds_path, file) = match port.target.clone() {
            PortTarget::Null => (None, None),
            PortTarget::Socket(path) => (Some(path), None),
            PortTarget::File(path) => (None, Some(path)),
        };
        Self {
            number: port.number,
            name: port.name.clone(),
            console: port.is_console,
            uds_path,
            file,
        }
    }
}
