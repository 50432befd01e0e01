#![forbid(unsafe_code)]
//! A machine as a file, TOML or JSON: what is typed there, and the same machine printed again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

mod bytes;
mod device;
mod identity;
mod port;
mod print;

pub use bytes::Bytes;
pub use device::{DeviceTable, limits};
pub use identity::{SystemTable, UuidWord};
pub use port::PortTable;

/// More than any machine needs; a bound on what is read into memory.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a machine file cannot be read.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("cannot read machine file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is far too long.
    #[error("machine file {} has more than {MAX_FILE_BYTES} bytes: is it the right file?", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It says something that it cannot say.
    #[error("machine file {} is not right: {reason}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// The machine cannot be written as a file.
    #[error("the machine cannot be printed: {reason}")]
    Print {
        /// Why not.
        reason: String,
    },
}

/// A machine of Pando. Paths are relative to the directory in which the program runs. What is left out
/// has a default; flags of the command line count more than the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineFile {
    /// A bzImage, or an ELF vmlinux (PVH or 64-bit entry); `embedded` is the built-in guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; `console=ttyS0 panic=-1` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Number of vCPUs, 1 to 8; 1 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 8))]
    pub cpus: Option<u32>,
    /// Where COM1 goes: `stdio`, `null`, `file:PATH`, `pty` or `unix:PATH`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Whether it has a PCI bus even if no device is on it: one may be plugged while the machine runs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pci: bool,
    /// A name, which monitors tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The UUID, which SMBIOS tells the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<UuidWord>,
    /// What else SMBIOS tells the guest of the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<SystemTable>,
    /// Whether it has a VM generation ID, by which a guest sees that it was cloned. If left out, a template
    /// of any kernel but the built-in guest has one, and a VM that is run has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmgenid: Option<bool>,
    /// Sizes.
    #[serde(default, skip_serializing_if = "MemoryTable::is_default")]
    pub memory: MemoryTable,
    /// Memory backends. Each is used once: as all RAM, by a node, or by a module.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backend: Vec<BackendTable>,
    /// NUMA nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node: Vec<NodeTable>,
    /// Distances of nodes; 10 within a node and 20 between two if left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub distance: Vec<DistanceTable>,
    /// Memory modules that are plugged before the machine starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dimm: Vec<DimmTable>,
    /// Devices on the PCI bus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device: Vec<DeviceTable>,
}

/// Sizes of memory in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryTable {
    /// RAM without modules; what the backends add up to if left out, or 512M without backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Bytes>,
    /// The backend that is all RAM. Without it and without nodes that have memory, RAM is anonymous.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Slots for memory modules.
    #[serde(default, skip_serializing_if = "is_default")]
    pub slots: u32,
    /// RAM and modules together, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<Bytes>,
}

impl MemoryTable {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where the bytes of a backend are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KindWord {
    /// In a file: QEMU's memory-backend-file.
    File,
    /// In memory without a name: memory-backend-ram.
    #[default]
    Ram,
    /// In a file that exists in memory only: memory-backend-memfd.
    Memfd,
}

/// A switch with a default that depends on other switches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RomWord {
    /// The guest can only read the memory.
    On,
    /// The guest can write the memory.
    Off,
    /// As readonly says.
    #[default]
    Auto,
}

/// One memory backend. A template has `share = true`; a clone of its file has `readonly = true` and
/// `rom = "off"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackendTable {
    /// What it is called: letters, digits, `-`, `_`, `.`.
    pub id: String,
    /// Where its bytes are.
    #[serde(default)]
    pub kind: KindWord,
    /// Its size.
    pub size: Bytes,
    /// The file, of kind file only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether what the guest writes goes to the file; only a memfd does so if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<bool>,
    /// Whether the file is opened for reading only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub readonly: bool,
    /// Whether the guest can only read it; if left out, where the file is opened for reading only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rom: RomWord,
    /// Where in the file it begins.
    #[serde(default, skip_serializing_if = "is_default")]
    pub offset: Bytes,
    /// What its addresses are a multiple of; 0 is the default.
    #[serde(default, skip_serializing_if = "is_default")]
    pub align: Bytes,
    /// Whether every page is allocated before the guest runs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub prealloc: bool,
    /// Whether the kernel may merge equal pages. Memory that a pager serves is never merged.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub merge: bool,
    /// Whether a core dump has it.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub dump: bool,
    /// Whether the content of a shared file is dropped when the machine ends.
    #[serde(default, skip_serializing_if = "is_default", rename = "discard-data")]
    pub discard_data: bool,
    /// What becomes of a clone's memory that a balloon or the like discards.
    #[serde(default, skip_serializing_if = "is_default")]
    pub discard: DiscardWord,
}

/// What becomes of a clone's memory that is discarded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiscardWord {
    /// It is refused: what would be read afterwards are the template's bytes.
    #[default]
    Off,
    /// It goes back to the host and reads as zero.
    Zero,
}

/// One NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeTable {
    /// Its number; the first free one if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// Numbers of its vCPUs. A vCPU that no node names belongs to node 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u32>,
    /// Its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
}

/// How far one node is from another, both ways unless the other way is given too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DistanceTable {
    /// From this node.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// 10 is local, 255 out of reach.
    #[schemars(range(min = 10, max = 255))]
    pub distance: u32,
}

/// One memory module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DimmTable {
    /// What it is called.
    pub id: String,
    /// Its memory.
    pub backend: String,
    /// The node that it belongs to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub node: u32,
    /// Its slot; the first free one if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u32>,
    /// Its guest physical address; the first that fits if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn yes() -> bool {
    true
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_yes(value: &bool) -> bool {
    *value
}

impl MachineFile {
    /// Reads a file: JSON where its name ends so or its text begins so, else TOML.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let read = |source| FileError::Read {
            path: path.to_owned(),
            source,
        };
        let facts = fs::metadata(path).map_err(read)?;
        if !facts.is_file() {
            return Err(read(io::Error::other("it is not a regular file")));
        }
        if facts.len() > MAX_FILE_BYTES {
            return Err(FileError::TooLong {
                path: path.to_owned(),
            });
        }
        let text = fs::read_to_string(path).map_err(read)?;
        let is_json =
            path.extension().is_some_and(|end| end == "json") || text.trim_start().starts_with('{');
        let parsed = if is_json {
            Self::from_json(&text)
        } else {
            Self::from_toml(&text)
        };
        parsed.map_err(|reason| FileError::Wrong {
            path: path.to_owned(),
            reason,
        })
    }

    /// Reads TOML; the reason with its line where it is wrong.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())
    }

    /// Reads JSON; the reason with its line where it is wrong.
    pub fn from_json(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    /// The machine as TOML.
    pub fn to_toml(&self) -> Result<String, FileError> {
        toml::to_string(self).map_err(|error| FileError::Print {
            reason: error.to_string(),
        })
    }

    /// What such a file may say, as a JSON Schema.
    pub fn schema() -> String {
        let schema = schemars::schema_for!(Self);
        let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests;
