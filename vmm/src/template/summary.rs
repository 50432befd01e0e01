#![forbid(unsafe_code)]
//! What a template is, in a form for tables and programs.

use pando_pager::image::PageKind;
use serde::Serialize;

use super::identity_entry::IdentityEntry;
use super::load::Template;
use super::map::ImageMap;
use super::picture::Panel;
use super::touched::{TouchMap, WorkingSetSummary};
use super::working_set::Found;

/// A template.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Its directory.
    pub template: String,
    /// Format of its manifest.
    pub format: u32,
    /// Who made it.
    pub tool: String,
    /// When, in seconds since 1970.
    pub created_unix_s: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Who the machine is, and each clone of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentityEntry>,
    /// RAM of all backends in bytes.
    pub memory_bytes: u64,
    /// Size of the saved state in bytes.
    pub state_bytes: u64,
    /// Size of the page index in bytes.
    pub index_bytes: u64,
    /// Memory backends in the machine's order.
    pub backends: Vec<BackendSummary>,
    /// Devices on the PCI bus.
    pub devices: Vec<DeviceSummary>,
    /// What clones were seen to touch.
    pub working_set: WorkingSetSummary,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceSummary {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: String,
    /// Its device number on the bus.
    pub slot: u8,
    /// The image of a disk.
    pub disk: Option<DiskSummary>,
}

/// The image of a disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DiskSummary {
    /// Its file.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Whether clones cannot write it.
    pub readonly: bool,
    /// Digest of the file.
    pub digest: String,
}

/// One memory backend.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BackendSummary {
    /// Its name.
    pub id: String,
    /// Its RAM file.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Where the guest sees its first byte.
    pub guest_address: u64,
    /// Bytes in pages that hold something.
    pub data_bytes: u64,
    /// Bytes in pages that are on disk and all zero.
    pub zero_bytes: u64,
    /// Bytes in pages that are not on disk.
    pub hole_bytes: u64,
    /// Digest of the RAM file.
    pub digest: String,
}

impl Summary {
    /// Sums up a template that has this for a working set.
    pub fn of(template: &Template, found: &Found) -> Self {
        let file = template.manifest().file();
        let backends = file
            .backends
            .iter()
            .zip(template.index().backends())
            .map(|(entry, (_, index))| {
                let bytes = |kind| index.count(kind).get() * pando_pager::PAGE_BYTES;
                BackendSummary {
                    id: entry.id.clone(),
                    file: template.dir().join(&entry.file).display().to_string(),
                    bytes: entry.bytes,
                    guest_address: entry.guest_address,
                    data_bytes: bytes(PageKind::Data),
                    zero_bytes: bytes(PageKind::Zero),
                    hole_bytes: bytes(PageKind::Hole),
                    digest: entry.digest.clone(),
                }
            })
            .collect();
        Self {
            template: template.dir().display().to_string(),
            format: file.format,
            tool: file.tool.clone(),
            created_unix_s: file.created_unix_s,
            cpus: file.cpus,
            identity: file.identity.clone(),
            memory_bytes: template.spec().layout().total_bytes(),
            state_bytes: file.state.seal.bytes,
            index_bytes: file.index.seal.bytes,
            backends,
            devices: devices(template),
            working_set: WorkingSetSummary::of(found, template.index()),
        }
    }
}

fn devices(template: &Template) -> Vec<DeviceSummary> {
    let entries = template.manifest().file().devices.iter();
    let summary = entries.map(|device| DeviceSummary {
        id: device.id.clone(),
        kind: device.kind.clone(),
        slot: device.slot,
        disk: device.disk.as_ref().map(|disk| DiskSummary {
            file: template.dir().join(&disk.file).display().to_string(),
            bytes: disk.bytes,
            readonly: disk.readonly,
            digest: disk.digest.clone(),
        }),
    });
    summary.collect()
}

/// The image of each backend as a map of at most `columns` times `rows` cells.
pub fn maps(template: &Template, columns: usize, rows: usize) -> Vec<ImageMap> {
    template
        .index()
        .backends()
        .iter()
        .map(|(_, index)| ImageMap::new(index, columns, rows))
        .collect()
}

/// What clones touch of each backend, as maps of at most `columns` times `rows` cells; none
/// without a working set.
pub fn touch_maps(
    template: &Template,
    found: &Found,
    columns: usize,
    rows: usize,
) -> Vec<TouchMap> {
    let sets = found.set().into_iter().flat_map(|set| {
        let backends = set.backends().iter().zip(template.index().backends());
        backends.map(move |(backend, (_, index))| (set, backend, index.pages().get()))
    });
    sets.map(|(set, backend, pages)| TouchMap::new(set, backend, pages, columns, rows))
        .collect()
}

/// All maps as panels of a picture, with titles made by `title`.
pub fn panels(
    template: &Template,
    found: &Found,
    columns: usize,
    rows: usize,
    title: impl Fn(usize) -> String,
) -> Vec<Panel> {
    let images = maps(template, columns, rows);
    let touched = touch_maps(template, found, columns, rows);
    let mut panels = Vec::new();
    for (backend, image) in images.iter().enumerate() {
        panels.push(image.panel(title(backend)));
        if let Some(map) = touched.get(backend) {
            panels.extend(map.panels(&title(backend)));
        }
    }
    panels
}
