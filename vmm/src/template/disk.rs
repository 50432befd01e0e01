#![forbid(unsafe_code)]
//! Images of disks in a template: copied when it is made, so that whatever becomes of the original, the
//! disk is as the frozen machine knows it; then only read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pando_pager::ByteOffset;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::digest::SparseDigest;
use super::error::TemplateError;
use super::files;
use super::manifest::Manifest;
use super::seal::Seal;
use crate::device::virtio::block::backend::hold;
use crate::sys::lock::LockKind;

/// What is copied and looked at at once.
const CHUNK_BYTES: u64 = 64 << 10;

/// Copies the first `bytes` bytes of an image to an empty file: by sharing its blocks where the file
/// system can, else what is not zero.
pub(super) fn copy(from: &Path, bytes: u64, to: &File) -> Result<(), TemplateError> {
    let source = files::open(from)?;
    if rustix::fs::ioctl_ficlone(to, &source).is_err() {
        each_data_chunk(&source, from, bytes, &mut |offset, chunk| {
            to.write_all_at(chunk, offset)
                .map_err(TemplateError::io("copy", from))
        })?;
    }
    rustix::fs::ftruncate(to, bytes).map_err(TemplateError::errno("copy", from))
}

/// The digest of an image.
pub(super) fn digest(file: &File, path: &Path, bytes: u64) -> Result<String, TemplateError> {
    let mut digest = SparseDigest::default();
    each_data_chunk(file, path, bytes, &mut |offset, chunk| {
        digest.chunk(ByteOffset::new(offset), chunk);
        Ok(())
    })?;
    Ok(digest.finish(bytes))
}

/// What is done with a chunk, given its offset.
type Visit<'a> = dyn FnMut(u64, &[u8]) -> Result<(), TemplateError> + 'a;

/// Gives every chunk that is not zero to `visit`, in ascending order.
fn each_data_chunk(
    file: &File,
    path: &Path,
    bytes: u64,
    visit: &mut Visit<'_>,
) -> Result<(), TemplateError> {
    let mut buffer = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or_default()];
    let mut at = 0;
    while at < bytes {
        match seek(file, SeekFrom::Data(at)) {
            Ok(data) => at = at.max(data - data % CHUNK_BYTES),
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => return Ok(()),
            // A file system that knows no holes.
            Err(Errno::INVAL) => (),
            Err(errno) => return Err(TemplateError::errno("look through", path)(errno)),
        }
        if at >= bytes {
            return Ok(());
        }
        let length = usize::try_from(CHUNK_BYTES.min(bytes - at)).unwrap_or_default();
        let chunk = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(chunk, at)
            .map_err(TemplateError::io("read", path))?;
        if chunk.iter().any(|&byte| byte != 0) {
            visit(at, chunk)?;
        }
        at += CHUNK_BYTES;
    }
    Ok(())
}

/// A disk of a template, open for reading.
#[derive(Debug)]
pub(super) struct TemplateDisk {
    /// Where the file is.
    pub path: PathBuf,
    /// The image.
    pub file: File,
}

/// Opens all disks of a template; each must be as it was sealed.
pub(super) fn open_all(
    dir: &Path,
    manifest: &Manifest,
) -> Result<Vec<TemplateDisk>, TemplateError> {
    let mut disks = Vec::new();
    for device in &manifest.file().devices {
        if let Some(disk) = &device.disk {
            let path = dir.join(&disk.file);
            let file = files::open(&path)?;
            // Before it is looked at: nobody writes it while clones have it.
            hold(&file, &path, LockKind::Shared).map_err(TemplateError::Disk)?;
            disk.seal.check(dir, &file, &path)?;
            disks.push(TemplateDisk { path, file });
        }
    }
    Ok(disks)
}

/// Reads every disk and compares it with its digest.
pub(super) fn verify_all(disks: &[TemplateDisk], manifest: &Manifest) -> Result<(), TemplateError> {
    let entries = manifest.file().devices.iter();
    let entries = entries.filter_map(|device| device.disk.as_ref());
    for (entry, disk) in entries.zip(disks) {
        let digest = digest(&disk.file, &disk.path, entry.bytes)?;
        if digest != entry.digest {
            let expected = &entry.digest;
            let reason = format!("its digest is {digest}, sealed was {expected}");
            return Err(TemplateError::damaged(&disk.path, reason));
        }
    }
    Ok(())
}

/// The seal that a file of a template has now.
pub(super) fn seal_now(dir: &Path, name: &str) -> Result<Seal, TemplateError> {
    let path = dir.join(name);
    Seal::of(&files::open(&path)?, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_same_content_and_digest_and_no_zeros_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("image");
        let bytes = 3 * CHUNK_BYTES + 512;
        let image = File::create(&from).unwrap();
        image.set_len(bytes).unwrap();
        image.write_all_at(b"aspen", CHUNK_BYTES + 7).unwrap();
        image.write_all_at(b"end", bytes - 3).unwrap();
        let to = dir.path().join("copy");
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&to)
        };
        copy(&from, bytes, &open().unwrap()).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), std::fs::read(&from).unwrap());
        let of = |path: &Path| digest(&File::open(path).unwrap(), path, bytes).unwrap();
        assert_eq!(of(&to), of(&from));
        std::fs::write(&to, vec![0; usize::try_from(bytes).unwrap()]).unwrap();
        assert_ne!(of(&to), of(&from));
    }
}
