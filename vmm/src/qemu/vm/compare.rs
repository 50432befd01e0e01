#![forbid(unsafe_code)]
//! A state beside the machine that is to go on with it: what differs is named, and nothing was made yet.

use std::path::Path;

use pando_pager::image::{BackendIndex, Index};

use super::Vm;
use crate::qemu::migration::file::LoadError;
use crate::qemu::migration::state::{SavedBackend, SavedContent, SavedMachine, SavedTopology};
use crate::qemu::migration::topology;
use crate::report::one_line;
use crate::spec::Uuid;
use crate::template::seal::Seal;

impl Vm {
    /// Refuses a state of another machine. Nothing was read or made yet.
    pub(super) fn compare(
        &mut self,
        saved: &SavedMachine,
        takes_capabilities: bool,
    ) -> Result<(), LoadError> {
        if takes_capabilities {
            self.migration.capabilities.ignore_shared = saved.ignore_shared;
            self.migration.capabilities.mapped_ram = saved.mapped_ram;
        }
        let ours = self.migration.capabilities;
        for (name, here, there) in [
            ("x-ignore-shared", ours.ignore_shared, saved.ignore_shared),
            ("mapped-ram", ours.mapped_ram, saved.mapped_ram),
        ] {
            if here != there {
                let word = |on| if on { "on" } else { "off" };
                return Err(LoadError::invalid(format!(
                    "Capability {name} is {}, but received capability is {}",
                    word(here),
                    word(there)
                )));
            }
        }
        let kind = &self.plan.wanted.machine.kind;
        if saved.kind != *kind {
            return Err(LoadError::invalid(format!(
                "Machine type received is '{}' and local is '{kind}'",
                saved.kind
            )));
        }
        if let (true, Some(there)) = (ours.validate_uuid, saved.uuid) {
            let here = self.plan.spec.identity().uuid.unwrap_or_default();
            if here.0 != there {
                return Err(LoadError::invalid(format!(
                    "UUID received is {} and local is {here}",
                    Uuid(there)
                )));
            }
        }
        let cpus = self.plan.spec.cpus().get();
        if saved.cpus != cpus {
            return Err(LoadError::invalid(format!(
                "the state has {} vCPUs, this machine {cpus}: give it -smp {}",
                saved.cpus, saved.cpus
            )));
        }
        self.compare_backends(saved)
    }

    fn compare_backends(&self, saved: &SavedMachine) -> Result<(), LoadError> {
        let ours = self.plan.spec.backends();
        let of_ram = |line: String| {
            LoadError::invalid(line)
                .and("error while loading state for instance 0x0 of device 'ram'")
        };
        for there in &saved.backends {
            let Some(here) = ours.iter().find(|backend| backend.id() == there.id) else {
                return Err(of_ram(format!(
                    "Unknown ramblock \"{}\", cannot accept migration",
                    there.id
                )));
            };
            if here.bytes() != there.bytes {
                return Err(of_ram(format!(
                    "Size mismatch: {}: {:#x} != {:#x}: Invalid argument",
                    there.id,
                    there.bytes,
                    here.bytes()
                )));
            }
            if here.is_rom() != there.is_rom {
                let (word, how) = if there.is_rom {
                    ("read-only memory", "readonly=on alone")
                } else {
                    (
                        "memory that the guest writes",
                        "share=off,readonly=on,rom=off",
                    )
                };
                return Err(of_ram(format!(
                    "memory backend \"{}\" is {word} in the state, and not here: give it {how}",
                    there.id
                )));
            }
        }
        if let Some(more) = ours
            .iter()
            .find(|here| saved.backends.iter().all(|there| there.id != here.id()))
        {
            return Err(of_ram(format!(
                "memory backend \"{}\" is not in the state: leave it out, or save the template again with it",
                more.id()
            )));
        }
        let topology = SavedTopology::of(&self.plan.spec);
        topology::compare_modules(&saved.topology, &topology)?;
        let layout = self.plan.spec.layout();
        for (position, (here, there)) in ours.iter().zip(&saved.backends).enumerate() {
            let address = layout.guest_address(position, 0).unwrap_or(0);
            if here.id() != there.id || address != there.guest_address {
                let at = |id: &str| {
                    let position = ours.iter().position(|backend| backend.id() == id);
                    position.and_then(|position| layout.guest_address(position, 0))
                };
                return Err(of_ram(format!(
                    "memory backend \"{}\" is at {:#x} in the state and at {:#x} here: give the backends in \
                     the same order",
                    there.id,
                    there.guest_address,
                    at(&there.id).unwrap_or(0)
                )));
            }
        }
        let ids: Vec<&str> = ours.iter().map(|backend| backend.id()).collect();
        topology::compare_nodes(&saved.topology, &topology, &ids)
    }

    /// For each backend that is left out, its index, once its file is known to be the one that was
    /// saved.
    pub(super) fn prove_files(
        &self,
        saved: &SavedMachine,
    ) -> Result<Vec<Option<BackendIndex>>, LoadError> {
        saved
            .backends
            .iter()
            .enumerate()
            .map(|(position, there)| match &there.content {
                SavedContent::Here { .. } => Ok(None),
                SavedContent::LeftOut {
                    offset_bytes,
                    seal,
                    index,
                } => self
                    .prove_file(position, there, (*offset_bytes, *seal), index)
                    .map(Some),
            })
            .collect()
    }

    fn prove_file(
        &self,
        position: usize,
        there: &SavedBackend,
        (offset_bytes, seal): (u64, Seal),
        index: &[u8],
    ) -> Result<BackendIndex, LoadError> {
        let id = &there.id;
        let here = &self.plan.spec.backends()[position];
        let (Some(source), Some(file)) = (here.file(), self.memory.file(position)) else {
            return Err(LoadError::invalid(format!(
                "memory backend \"{id}\" is left out of the state, and here it has no file that could have its \
                 content: give it memory-backend-file with share=off,readonly=on,rom=off"
            )));
        };
        let path = source.path();
        if source.offset_bytes() != offset_bytes {
            return Err(LoadError::invalid(format!(
                "memory backend \"{id}\" begins at offset {offset_bytes:#x} of its file in the state, and at {:#x} \
                 here",
                source.offset_bytes()
            )));
        }
        let damaged = |why: String| {
            LoadError::invalid(format!(
                "the index of memory backend \"{id}\" in the state is damaged: {why}"
            ))
        };
        let decoded = Index::decode(index).map_err(|error| damaged(error.to_string()))?;
        let index = match decoded.into_backends().pop() {
            Some((name, index)) if name == *id && index.pages().bytes() == there.bytes => index,
            _ => return Err(damaged("it is another backend's".to_owned())),
        };
        let now = Seal::of(file, path).map_err(|error| LoadError::invalid(one_line(&error)))?;
        // The same file, not written since: its pages are proven as they are read.
        if now != seal && !holds(file, &index)? {
            return Err(LoadError::invalid(changed(id, path, now, seal)));
        }
        Ok(index)
    }
}

/// Whether a file holds what an index says, whatever file it is.
fn holds(file: &std::fs::File, index: &BackendIndex) -> Result<bool, LoadError> {
    use pando_pager::image::{ChunkIndex, PageKind};
    let found = BackendIndex::scan(file, index.pages().bytes(), &mut |_, _| ())
        .map_err(|error| LoadError::io(one_line(&error)))?;
    // A hole and zeros read the same.
    let data = |index: &BackendIndex| {
        let runs = index.runs().filter(|(_, kind)| *kind == PageKind::Data);
        runs.map(|(pages, _)| pages).collect::<Vec<_>>()
    };
    let chunks = index
        .pages()
        .get()
        .div_ceil(pando_pager::image::CHUNK_PAGES);
    Ok(data(&found) == data(index)
        && (0..chunks)
            .map(ChunkIndex::new)
            .all(|chunk| found.checksum(chunk) == index.checksum(chunk)))
}

fn changed(id: &str, path: &Path, now: Seal, seal: Seal) -> String {
    let how = if now.inode != seal.inode {
        "it is another file, with other content"
    } else {
        "it was written since"
    };
    format!(
        "memory backend \"{id}\": {} does not hold what it held when the state was saved: {how}; give each backend \
         the file of its template, and save the state again if the template ran on",
        path.display()
    )
}
