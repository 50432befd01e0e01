#![forbid(unsafe_code)]
//! A machine that was checked, as the file that would make it again.

use super::{
    BackendTable, Bytes, DeviceTable, DimmTable, DiscardWord, DistanceTable, KindWord, MachineFile,
    MemoryTable, NodeTable, RomWord, UuidWord,
};
use crate::arch::x86_64::boot::{BootSource, KernelImage};
use crate::config::EMBEDDED_KERNEL;
use crate::spec::{BackendKind, BackendSpec, FileAccess, FileSource, MachineSpec};

impl MachineFile {
    /// The file of a machine; `boot` is what it starts, where it starts anything.
    pub fn of(spec: &MachineSpec, boot: Option<&BootSource>, serial: Option<&str>) -> Self {
        let parts = spec.to_parts();
        Self {
            kernel: boot.map(|boot| match &boot.kernel {
                KernelImage::File(path) => path.clone(),
                KernelImage::Embedded { .. } => EMBEDDED_KERNEL.into(),
            }),
            initrd: boot.and_then(|boot| boot.initrd.clone()),
            append: boot.map(|boot| boot.append.clone()),
            cpus: Some(parts.cpus.get().into()),
            serial: serial.map(str::to_owned),
            name: parts.identity.name,
            uuid: parts.identity.uuid.map(UuidWord),
            system: parts.identity.system.map(Into::into),
            vmgenid: spec.has_generation_id().then_some(true),
            // A device says so too.
            pci: parts.pci && parts.devices.is_empty(),
            memory: MemoryTable {
                size: parts.memory.bytes.map(Bytes),
                backend: parts.ram_backend,
                slots: parts.memory.slots,
                max: parts.memory.max_bytes.map(Bytes),
            },
            backend: parts.backends.iter().map(backend).collect(),
            node: parts
                .nodes
                .into_iter()
                .map(|node| NodeTable {
                    id: node.id,
                    cpus: node.cpus,
                    backend: node.backend,
                })
                .collect(),
            distance: parts
                .distances
                .into_iter()
                .map(|distance| DistanceTable {
                    from: distance.from,
                    to: distance.to,
                    distance: distance.distance,
                })
                .collect(),
            dimm: parts
                .dimms
                .into_iter()
                .map(|dimm| DimmTable {
                    id: dimm.id,
                    backend: dimm.backend,
                    node: dimm.node,
                    slot: dimm.slot,
                    address: dimm.guest_address,
                })
                .collect(),
            device: spec.devices().iter().map(DeviceTable::from).collect(),
        }
    }
}

fn backend(spec: &BackendSpec) -> BackendTable {
    let file = spec.file();
    BackendTable {
        id: spec.id().to_owned(),
        kind: match spec.kind() {
            BackendKind::File => KindWord::File,
            BackendKind::Ram => KindWord::Ram,
            BackendKind::Memfd => KindWord::Memfd,
        },
        size: Bytes(spec.bytes()),
        path: file.map(|file| file.path().to_owned()),
        share: Some(spec.is_shared()),
        readonly: spec.is_readonly(),
        rom: match file.map(FileSource::access) {
            Some(FileAccess::Rom { .. }) => RomWord::On,
            Some(FileAccess::Clone) => RomWord::Off,
            Some(FileAccess::Template | FileAccess::Private) | None => RomWord::Auto,
        },
        offset: Bytes(file.map_or(0, FileSource::offset_bytes)),
        align: Bytes(spec.align_bytes()),
        prealloc: spec.prealloc(),
        merge: spec.merge(),
        dump: spec.dump(),
        discard_data: file.is_some_and(FileSource::discard_data),
        discard: if spec.discards_to_zero() {
            DiscardWord::Zero
        } else {
            DiscardWord::Off
        },
    }
}
