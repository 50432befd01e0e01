#![forbid(unsafe_code)]
//! Opening a template: nothing is believed before it is proven, nothing is opened for writing.

use std::fs::File;
use std::path::{Path, PathBuf};

use pando_pager::image::{BackendIndex, Image, Index};

use super::digest::{self, SparseDigest};
use super::disk::{self, TemplateDisk};
use super::error::TemplateError;
use super::manifest::{FileEntry, Manifest, ManifestFile};
use super::seal::Seal;
use super::{MANIFEST_FILE, files, staging, state_file};
use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::block::backend::Disk;
use crate::machine::state::MachineState;
use crate::machine::{Connections, Marks, scratch_folder};
use crate::spec::MachineSpec;

/// More than any manifest needs; a bound on what is read into memory.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// More than the index of 1 TiB needs; a bound on what is read into memory.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// A template whose manifest, seals, index and state were proven.
#[derive(Debug)]
pub struct Template {
    dir: PathBuf,
    manifest: Manifest,
    /// One RAM file per backend, in the machine's order. Open from the moment the seal was
    /// checked, so that a file that is replaced later is never served.
    ram: Vec<File>,
    index: Index,
    state: MachineState,
    disks: Vec<TemplateDisk>,
}

impl Template {
    /// Opens the template in `dir`.
    pub fn open(dir: &Path) -> Result<Self, TemplateError> {
        let manifest = read_manifest(dir)?;
        let ram = open_ram(dir, &manifest)?;
        let index_path = dir.join(&manifest.file().index.file);
        let index = read_sealed(dir, &manifest.file().index, MAX_INDEX_BYTES)?;
        let index = decode_index(&index_path, &index, &manifest)?;
        let state_path = dir.join(&manifest.file().state.file);
        let bytes = read_sealed(dir, &manifest.file().state, state_file::MAX_FILE_BYTES)?;
        let state = state_file::decode(&state_path, &bytes)?;
        // Small, and another template's state would pass every other check. The index is as long
        // as the RAM is large: its own checksum must do here, its digest waits for `verify`.
        check_digest(&state_path, &manifest.file().state, &bytes)?;
        check_cpus(&state_path, &manifest, &state)?;
        Ok(Self {
            dir: dir.to_owned(),
            disks: disk::open_all(dir, &manifest)?,
            manifest,
            ram,
            index,
            state,
        })
    }

    /// How much RAM the guest of the template in `dir` has, modules included; nothing else is read.
    pub fn ram_bytes_in(dir: &Path) -> Result<u64, TemplateError> {
        Ok(read_manifest(dir)?.spec().layout().total_bytes())
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A short name for tables and metric labels: the directory's last part.
    pub fn name(&self) -> String {
        let dir = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        dir.file_name().map_or_else(
            || "template".into(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The machine that it holds.
    pub fn spec(&self) -> &MachineSpec {
        self.manifest.spec()
    }

    /// The machine's state but for RAM.
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// What each page of each backend is, in the machine's order.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Path of a backend's RAM file.
    pub fn ram_path(&self, backend: usize) -> PathBuf {
        let name = self
            .manifest
            .file()
            .backends
            .get(backend)
            .map_or("", |entry| &entry.file);
        self.dir.join(name)
    }

    /// The RAM files, open for reading only.
    pub fn ram_files(&self) -> &[File] {
        &self.ram
    }

    /// The images that a pager serves, one per backend, in the machine's order.
    pub fn images(&self) -> Result<Vec<Image>, TemplateError> {
        self.ram
            .iter()
            .zip(self.index.backends())
            .enumerate()
            .map(|(position, (file, (id, index)))| {
                let path = self.ram_path(position);
                let file = file
                    .try_clone()
                    .map_err(TemplateError::io("open again", &path))?;
                Image::from_file(file, &path, id, index.clone())
                    .map_err(|source| TemplateError::Image { path, source })
            })
            .collect()
    }

    /// What a clone's devices are connected to: COM1 as it is told, and disks whose images it shares
    /// with all others and never writes.
    pub fn connections(&self, serial: SerialTarget) -> Result<Connections, TemplateError> {
        let disks = self.spec().devices().iter();
        let disks = disks.filter_map(|device| Some((device.id(), device.disk()?.access)));
        let disks = disks.zip(&self.disks).map(|((id, access), disk)| {
            let file = disk.file.try_clone();
            let file = file.map_err(TemplateError::io("open again", &disk.path))?;
            let made = Disk::from_file(file, &disk.path, access, &scratch_folder());
            Ok((id.to_owned(), made.map_err(TemplateError::Disk)?))
        });
        Ok(Connections {
            serial,
            disks: disks.collect::<Result<_, TemplateError>>()?,
            vsock: None,
            nets: Vec::new(),
            consoles: Vec::new(),
            plugged: Vec::new(),
            generation_id: None,
            marks: Marks::default(),
        })
    }

    /// The digests of the RAM files as they are now, in the machine's order: reads all data.
    pub fn ram_digests(&self) -> Result<Vec<String>, TemplateError> {
        (0..self.ram.len())
            .map(|backend| self.scan(backend, &mut |_| ()).map(|(_, digest)| digest))
            .collect()
    }

    /// Reads every byte of the template and compares it with index and digests. `progress` gets
    /// the offset reached in each RAM file.
    pub fn verify(&self, progress: &mut dyn FnMut(usize, u64)) -> Result<(), TemplateError> {
        let index = &self.manifest.file().index;
        let bytes = read_sealed(&self.dir, index, MAX_INDEX_BYTES)?;
        check_digest(&self.dir.join(&index.file), index, &bytes)?;
        disk::verify_all(&self.disks, &self.manifest)?;
        for (backend, entry) in self.manifest.file().backends.iter().enumerate() {
            let path = self.ram_path(backend);
            let (found, digest) = self.scan(backend, &mut |offset| progress(backend, offset))?;
            if let Some((_, sealed)) = self.index.backends().get(backend)
                && let Some(page) = first_difference(sealed, &found)
            {
                return Err(TemplateError::damaged(
                    &path,
                    format!(
                        "page {page} (byte offset {:#x}) is not what the index has for it",
                        page * pando_pager::PAGE_BYTES
                    ),
                ));
            }
            if digest != entry.digest {
                return Err(TemplateError::damaged(
                    &path,
                    format!("its digest is {digest}, sealed was {}", entry.digest),
                ));
            }
        }
        Ok(())
    }

    fn scan(
        &self,
        backend: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(BackendIndex, String), TemplateError> {
        let path = self.ram_path(backend);
        let bytes = self.manifest.file().backends[backend].bytes;
        scan_ram(&self.ram[backend], &path, bytes, progress)
    }
}

/// One pass over a RAM file: its index and its digest.
pub fn scan_ram(
    file: &File,
    path: &Path,
    bytes: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<(BackendIndex, String), TemplateError> {
    let mut digest = SparseDigest::default();
    let index = BackendIndex::scan(file, bytes, &mut |offset, chunk| {
        digest.chunk(offset, chunk);
        progress(offset.get());
    })
    .map_err(|source| TemplateError::Image {
        path: path.to_owned(),
        source,
    })?;
    Ok((index, digest.finish(bytes)))
}

/// Checks every digest of a template whose files were copied on purpose, and writes a manifest
/// with their new seals. Nothing is changed when anything differs.
pub fn reseal(dir: &Path, progress: &mut dyn FnMut(usize, u64)) -> Result<(), TemplateError> {
    let old = read_manifest(dir)?;
    let mut file: ManifestFile = old.file().clone();
    for entry in &mut file.backends {
        let path = dir.join(&entry.file);
        entry.seal = Seal::of(&files::open(&path)?, &path)?;
    }
    for disk in file.devices.iter_mut().filter_map(|d| d.disk.as_mut()) {
        disk.seal = disk::seal_now(dir, &disk.file)?;
    }
    let state = read_and_seal(dir, &mut file.state, state_file::MAX_FILE_BYTES)?;
    let index = read_and_seal(dir, &mut file.index, MAX_INDEX_BYTES)?;
    let path = dir.join(MANIFEST_FILE);
    let manifest = Manifest::seal(&path, file)?;
    let index_path = dir.join(&manifest.file().index.file);
    let state_path = dir.join(&manifest.file().state.file);
    let template = Template {
        dir: dir.to_owned(),
        ram: open_ram(dir, &manifest)?,
        index: decode_index(&index_path, &index, &manifest)?,
        state: state_file::decode(&state_path, &state)?,
        disks: disk::open_all(dir, &manifest)?,
        manifest,
    };
    check_cpus(&state_path, &template.manifest, &template.state)?;
    template.verify(progress)?;
    staging::replace(&path, &template.manifest.to_json())
}

fn first_difference(sealed: &BackendIndex, found: &BackendIndex) -> Option<u64> {
    use pando_pager::PageIndex;
    use pando_pager::image::{ChunkIndex, PageKind};
    let pages = sealed.pages().get().min(found.pages().get());
    // A hole and zeros read the same; whether blocks are allocated is the file system's affair.
    let is_data = |index: &BackendIndex, page| index.kind(PageIndex::new(page)) == PageKind::Data;
    let checksum =
        |index: &BackendIndex, page| index.checksum(ChunkIndex::containing(PageIndex::new(page)));
    (0..pages).find(|&page| {
        is_data(sealed, page) != is_data(found, page)
            || (is_data(sealed, page) && checksum(sealed, page) != checksum(found, page))
    })
}

fn read_manifest(dir: &Path) -> Result<Manifest, TemplateError> {
    let path = dir.join(MANIFEST_FILE);
    let file = files::open_if_there(&path)?.map_err(|source| TemplateError::NotATemplate {
        dir: dir.to_owned(),
        source,
    })?;
    let bytes = files::read(&file, &path, MAX_MANIFEST_BYTES)?;
    Manifest::parse(&path, &bytes)
}

fn open_ram(dir: &Path, manifest: &Manifest) -> Result<Vec<File>, TemplateError> {
    manifest
        .file()
        .backends
        .iter()
        .map(|entry| {
            let path = dir.join(&entry.file);
            let file = files::open(&path)?;
            entry.seal.check(dir, &file, &path)?;
            Ok(file)
        })
        .collect()
}

fn read_sealed(dir: &Path, entry: &FileEntry, max_bytes: u64) -> Result<Vec<u8>, TemplateError> {
    let path = dir.join(&entry.file);
    let file = files::open(&path)?;
    entry.seal.check(dir, &file, &path)?;
    files::read(&file, &path, max_bytes)
}

/// Gives an entry the seal that its file has now, and reads the file if its digest is right.
fn read_and_seal(
    dir: &Path,
    entry: &mut FileEntry,
    max_bytes: u64,
) -> Result<Vec<u8>, TemplateError> {
    let path = dir.join(&entry.file);
    let file = files::open(&path)?;
    entry.seal = Seal::of(&file, &path)?;
    let bytes = files::read(&file, &path, max_bytes)?;
    check_digest(&path, entry, &bytes)?;
    Ok(bytes)
}

fn check_cpus(path: &Path, manifest: &Manifest, state: &MachineState) -> Result<(), TemplateError> {
    let (saved, cpus) = (state.cpus.len(), manifest.file().cpus);
    if saved == usize::from(cpus) {
        return Ok(());
    }
    Err(TemplateError::damaged(
        path,
        format!("it has the state of {saved} vCPUs, the manifest has {cpus}"),
    ))
}

fn check_digest(path: &Path, entry: &FileEntry, bytes: &[u8]) -> Result<(), TemplateError> {
    let found = digest::of_bytes(bytes);
    if found == entry.digest {
        return Ok(());
    }
    Err(TemplateError::damaged(
        path,
        format!("its digest is {found}, sealed was {}", entry.digest),
    ))
}

fn decode_index(path: &Path, bytes: &[u8], manifest: &Manifest) -> Result<Index, TemplateError> {
    let index = Index::decode(bytes).map_err(|source| TemplateError::Image {
        path: path.to_owned(),
        source,
    })?;
    let backends = &manifest.file().backends;
    let matches = index.backends().len() == backends.len()
        && index
            .backends()
            .iter()
            .zip(backends)
            .all(|((id, index), entry)| {
                *id == entry.id && index.pages().get() * pando_pager::PAGE_BYTES == entry.bytes
            });
    if matches {
        Ok(index)
    } else {
        let found: Vec<String> = index
            .backends()
            .iter()
            .map(|(id, index)| format!("{id} of {} pages", index.pages().get()))
            .collect();
        Err(TemplateError::damaged(
            path,
            format!(
                "it describes {}, the manifest has other backends",
                found.join(", ")
            ),
        ))
    }
}
