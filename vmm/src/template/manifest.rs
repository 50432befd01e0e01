#![forbid(unsafe_code)]
//! `manifest.json`: what the template is, in a form that people and programs read.
//!
//! [`ManifestFile`] is what the JSON says and proves nothing; [`Manifest`] is one whose format,
//! checksum and every field were checked.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::WORKING_SET_FILE;
use super::device_entry::{self, DeviceEntry};
use super::digest;
use super::error::TemplateError;
use super::identity_entry::{self, IdentityEntry};
use super::limits_entry;
use super::machine_entry::{self, MachineEntry};
use super::seal::Seal;
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::report::one_line;
use crate::spec::{BackendSpec, CpuCount, DeviceKind, DeviceSpec, MachineSpec};

/// The newest format that this version reads. It writes the oldest one that can say what there is.
pub const FORMAT: u32 = 5;

/// The JSON document, field by field, unproven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Version of this document; read first and by itself.
    pub format: u32,
    /// Name and version of the program that made the template.
    pub tool: String,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Nodes and memory modules, where the machine has any: formats from 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineEntry>,
    /// Who the machine is, where it says so: formats from 3 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentityEntry>,
    /// Whether the machine has a PCI bus although no device is on it: formats from 4 on.
    #[serde(default, skip_serializing_if = "is_false")]
    pub pci: bool,
    /// Devices on the PCI bus, where the machine has any: formats from 4 on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceEntry>,
    /// Whether the machine has a VM generation ID: formats from 4 on.
    #[serde(default, skip_serializing_if = "is_false")]
    pub generation_id: bool,
    /// Memory backends in the machine's order.
    pub backends: Vec<BackendEntry>,
    /// `state.bin`.
    pub state: FileEntry,
    /// `pages.idx`.
    pub index: FileEntry,
    /// What a host must offer.
    pub host: HostEntry,
    /// SHA-256 of this document in compact form with this field empty.
    pub checksum: String,
}

/// One memory backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendEntry {
    /// Its name, unique in the machine.
    pub id: String,
    /// Its RAM file, a plain name inside the template.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where the guest sees its first byte.
    pub guest_address: u64,
    /// Sparse digest of the RAM file.
    pub digest: String,
    /// Identity of the RAM file.
    pub seal: Seal,
}

/// A file other than RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// A plain name inside the template.
    pub file: String,
    /// SHA-256 of all its bytes.
    pub digest: String,
    /// Identity of the file.
    pub seal: Seal,
}

/// What the host must offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostEntry {
    /// CPUID as vCPU 0 sees it: function, index, flags, eax, ebx, ecx, edx.
    pub cpuid: Vec<[u32; 7]>,
    /// Numbers of the model-specific registers in the state.
    pub msrs: Vec<u32>,
    /// Frequency of the guest's time stamp counter in kHz, if the host had a stable one.
    pub tsc_khz: Option<u32>,
}

/// Just the version, so that a later format is named as such whatever else it holds.
#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

/// A manifest that was proven: format known, checksum right, names plain, machine valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    file: ManifestFile,
    spec: MachineSpec,
}

impl Manifest {
    /// Parses and proves the bytes of `path`.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, TemplateError> {
        let damaged = |error: serde_json::Error| TemplateError::damaged(path, error.to_string());
        let FormatOnly { format } = serde_json::from_slice(bytes).map_err(damaged)?;
        if format > FORMAT {
            return Err(TemplateError::NewerFormat {
                path: path.to_owned(),
                found: format,
                supported: FORMAT,
            });
        }
        if format == 0 {
            return Err(TemplateError::damaged(
                path,
                "it has format 0, which never was",
            ));
        }
        let file: ManifestFile = serde_json::from_slice(bytes).map_err(damaged)?;
        let expected = checksum(&file);
        if file.checksum != expected {
            return Err(TemplateError::damaged(
                path,
                format!(
                    "its checksum is {}, its content gives {expected}",
                    file.checksum
                ),
            ));
        }
        Self::prove(path, file)
    }

    /// Fills in the checksum of a new document and proves it.
    pub fn seal(path: &Path, mut file: ManifestFile) -> Result<Self, TemplateError> {
        file.checksum = checksum(&file);
        Self::prove(path, file)
    }

    fn prove(path: &Path, file: ManifestFile) -> Result<Self, TemplateError> {
        let damaged = |reason: String| TemplateError::damaged(path, reason);
        let disks = file
            .devices
            .iter()
            .filter_map(|device| device.disk.as_ref());
        let names = file.backends.iter().map(|backend| &backend.file);
        let names = names.chain(disks.map(|disk| &disk.file));
        for name in names.chain([&file.state.file, &file.index.file]) {
            if !is_plain_name(name) {
                return Err(damaged(format!("{name:?} is not a plain file name")));
            }
            // It would be replaced by the first clone that teaches anything.
            if name == WORKING_SET_FILE {
                return Err(damaged(format!("{name:?} is the name of another file")));
            }
        }
        let cpus = CpuCount::new(file.cpus.into()).map_err(|error| damaged(one_line(&error)))?;
        let backends = file
            .backends
            .iter()
            .map(|backend| BackendSpec::new(&*backend.id, backend.bytes))
            .collect::<Result<_, _>>()
            .map_err(|error| damaged(one_line(&error)))?;
        let format = file.format;
        if file.machine.is_some() && format < machine_entry::FIRST_FORMAT {
            return Err(damaged(format!("format {format} has no nodes and modules")));
        }
        if file.identity.is_some() && format < identity_entry::FIRST_FORMAT {
            return Err(damaged(format!("format {format} has no identity")));
        }
        let identity = file.identity.as_ref().map(IdentityEntry::identity);
        let identity = identity.transpose().map_err(damaged)?.unwrap_or_default();
        if !file.devices.is_empty() && format < device_entry::FIRST_FORMAT {
            return Err(damaged(format!("format {format} has no devices")));
        }
        if file.pci && format < device_entry::FIRST_FORMAT {
            return Err(damaged(format!("format {format} has no PCI bus")));
        }
        if file.generation_id && format < device_entry::FIRST_FORMAT {
            return Err(damaged(format!("format {format} has no generation id")));
        }
        let has_limits = file.devices.iter().any(|device| device.limits.is_some());
        if has_limits && format < limits_entry::FIRST_FORMAT {
            return Err(damaged(format!("format {format} has no limits")));
        }
        let devices = file.devices.iter().map(DeviceEntry::parts);
        let devices = devices.collect::<Result<Vec<_>, _>>().map_err(damaged)?;
        let spec = match &file.machine {
            None => MachineSpec::new(cpus, backends),
            Some(machine) => MachineSpec::from_parts(machine.parts(cpus, backends)),
        }
        .and_then(|spec| spec.with_pci(file.pci).with_devices(devices))
        .map(|spec| spec.with_generation_id(file.generation_id))
        .and_then(|spec| spec.with_identity(identity))
        .map_err(|error| damaged(one_line(&error)))?;
        let order = spec.backends().iter().map(BackendSpec::id);
        if !order.eq(file.backends.iter().map(|entry| entry.id.as_str())) {
            return Err(damaged(
                "its backends are not in the order of the machine's".to_owned(),
            ));
        }
        for (position, entry) in file.backends.iter().enumerate() {
            let placed = spec
                .layout()
                .segments()
                .iter()
                .find(|segment| segment.backend == position)
                .map(|segment| segment.guest_address);
            if placed != Some(entry.guest_address) {
                let placed = placed.map_or("no address".into(), |at| format!("{at:#x}"));
                return Err(damaged(format!(
                    "backend {} is at {:#x}, the machine has it at {placed}",
                    entry.id, entry.guest_address
                )));
            }
            if entry.seal.bytes != entry.bytes {
                return Err(damaged(format!(
                    "backend {} has {} bytes, its sealed file has {}",
                    entry.id, entry.bytes, entry.seal.bytes
                )));
            }
        }
        Ok(Self { file, spec })
    }

    /// The document, for reading.
    pub fn file(&self) -> &ManifestFile {
        &self.file
    }

    /// The machine that the template holds.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// The document as it is written: indented JSON and a line end.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(&self.file).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// CPUID that the host must offer.
    pub fn cpuid(&self) -> Vec<CpuidEntry> {
        self.file
            .host
            .cpuid
            .iter()
            .map(|&[function, index, flags, eax, ebx, ecx, edx]| CpuidEntry {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
            })
            .collect()
    }
}

/// The oldest format that can say what there is.
pub fn format_of(
    spec: &MachineSpec,
    machine: &Option<MachineEntry>,
    identity: &Option<IdentityEntry>,
) -> u32 {
    let is_later = |device: &DeviceSpec| {
        let is_new = matches!(
            device.kind(),
            DeviceKind::Console(_) | DeviceKind::Document | DeviceKind::Balloon(_)
        );
        is_new || device.limits().is_any()
    };
    if spec.devices().iter().any(is_later) {
        return limits_entry::FIRST_FORMAT;
    }
    if spec.has_pci() || spec.has_generation_id() {
        return device_entry::FIRST_FORMAT;
    }
    match (machine, identity) {
        (_, Some(_)) => identity_entry::FIRST_FORMAT,
        (Some(_), None) => machine_entry::FIRST_FORMAT,
        (None, None) => 1,
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes what it asks about by reference"
)]
fn is_false(value: &bool) -> bool {
    !value
}

fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    ) && !name.ends_with('/')
        && !name.contains('\0')
}

fn checksum(file: &ManifestFile) -> String {
    let blank = ManifestFile {
        checksum: String::new(),
        ..file.clone()
    };
    // Serialising integers, strings and lists of them into memory has no way to fail.
    digest::of_bytes(&serde_json::to_vec(&blank).unwrap_or_default())
}

#[cfg(test)]
mod tests;
