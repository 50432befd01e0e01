#![forbid(unsafe_code)]
//! What a clone writes over an image that it shares with others: its own file, without a name, in
//! which a block is present once it was written. Everything else is the image's.
//!
//! The file is made by the first write, so a clone that only reads has none; it goes with the clone,
//! so nothing in it is ever made durable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use super::request::Extent;

/// What is present or not.
const BLOCK_BYTES: u64 = 4096;
/// Bits of a word of the map.
const WORD_BITS: u64 = 64;

/// An image that is only read, and what was written over it.
#[derive(Debug)]
pub struct Layered {
    base: Arc<File>,
    bytes: u64,
    /// Where the file of the layer is made.
    folder: PathBuf,
    layer: Option<Layer>,
}

#[derive(Debug)]
struct Layer {
    file: Arc<File>,
    /// A bit for each block that is here.
    present: Vec<u64>,
}

impl Layer {
    fn is_present(&self, block: u64) -> bool {
        let word = usize::try_from(block / WORD_BITS).unwrap_or(usize::MAX);
        self.present
            .get(word)
            .is_some_and(|word| word >> (block % WORD_BITS) & 1 != 0)
    }

    fn set_present(&mut self, block: u64) {
        let word = usize::try_from(block / WORD_BITS).unwrap_or(usize::MAX);
        if let Some(word) = self.present.get_mut(word) {
            *word |= 1 << (block % WORD_BITS);
        }
    }
}

impl Layered {
    /// An image of `bytes` bytes; what is written over it goes to a file in `folder`.
    pub fn new(base: File, bytes: u64, folder: &Path) -> Self {
        Self {
            base: Arc::new(base),
            bytes,
            folder: folder.to_owned(),
            layer: None,
        }
    }

    /// Fills `buffer` from `offset` on.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Some(layer) = &self.layer else {
            return self.base.read_exact_at(buffer, offset);
        };
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let is_present = layer.is_present(at / BLOCK_BYTES);
            // All blocks of one kind at once.
            let end = at + rest.len() as u64;
            let mut stop = (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
            while stop < end && layer.is_present(stop / BLOCK_BYTES) == is_present {
                stop += BLOCK_BYTES;
            }
            let length = usize::try_from(stop.min(end) - at).unwrap_or(rest.len());
            let (part, behind) = rest.split_at_mut(length.min(rest.len()));
            let file: &File = if is_present { &layer.file } else { &self.base };
            file.read_exact_at(part, at)?;
            at += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    /// The file that has all of an extent, where one has.
    pub fn file_of(&self, extent: Extent) -> Option<Arc<File>> {
        let Some(layer) = &self.layer else {
            return Some(Arc::clone(&self.base));
        };
        let end = extent.offset + extent.bytes;
        let mut blocks = extent.offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        let is_present = layer.is_present(blocks.start);
        let file = if is_present { &layer.file } else { &self.base };
        blocks
            .all(|block| layer.is_present(block) == is_present)
            .then(|| Arc::clone(file))
    }

    /// Writes `bytes` from `offset` on.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        self.bring_edges(offset, end)?;
        let layer = self.layer()?;
        layer.file.write_all_at(bytes, offset)?;
        for block in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            layer.set_present(block);
        }
        Ok(())
    }

    /// Makes an extent zero. Storage behind it is given back.
    pub fn zero(&mut self, extent: Extent) -> io::Result<()> {
        let end = extent.offset + extent.bytes;
        if extent.bytes == 0 {
            return Ok(());
        }
        self.bring_edges(extent.offset, end)?;
        let layer = self.layer()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&layer.file, flags, extent.offset, extent.bytes) {
            Ok(()) => (),
            Err(rustix::io::Errno::OPNOTSUPP) => {
                super::backend::write_zeros(&layer.file, extent)?;
            }
            Err(errno) => return Err(errno.into()),
        }
        for block in extent.offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            layer.set_present(block);
        }
        Ok(())
    }

    /// Brings the blocks of which only a part will be written.
    fn bring_edges(&mut self, offset: u64, end: u64) -> io::Result<()> {
        if !offset.is_multiple_of(BLOCK_BYTES) {
            self.bring(offset / BLOCK_BYTES)?;
        }
        if !end.is_multiple_of(BLOCK_BYTES) {
            self.bring(end / BLOCK_BYTES)?;
        }
        Ok(())
    }

    /// Copies a block of the image into the layer, if it is not there.
    fn bring(&mut self, block: u64) -> io::Result<()> {
        if self.layer()?.is_present(block) {
            return Ok(());
        }
        let offset = block * BLOCK_BYTES;
        let length = self.bytes.saturating_sub(offset).min(BLOCK_BYTES);
        let mut content = vec![0; usize::try_from(length).unwrap_or_default()];
        self.base.read_exact_at(&mut content, offset)?;
        let layer = self.layer()?;
        layer.file.write_all_at(&content, offset)?;
        layer.set_present(block);
        Ok(())
    }

    /// Whether anything was written.
    pub fn has_layer(&self) -> bool {
        self.layer.is_some()
    }

    /// The layer; made by the first who needs it.
    fn layer(&mut self) -> io::Result<&mut Layer> {
        if self.layer.is_none() {
            let file = tempfile::tempfile_in(&self.folder).map_err(|error| {
                let folder = self.folder.display();
                io::Error::other(format!(
                    "cannot make a file in {folder} for what the guest writes: {error}"
                ))
            })?;
            file.set_len(self.bytes)?;
            let words = self.bytes.div_ceil(BLOCK_BYTES).div_ceil(WORD_BITS);
            let words = usize::try_from(words).map_err(|_| io::ErrorKind::OutOfMemory)?;
            let mut present = Vec::new();
            present
                .try_reserve_exact(words)
                .map_err(|_| io::ErrorKind::OutOfMemory)?;
            present.resize(words, 0);
            self.layer = Some(Layer {
                file: Arc::new(file),
                present,
            });
        }
        self.layer
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: u64 = 10 * BLOCK_BYTES + 1536;

    #[test]
    fn a_map_that_memory_has_no_room_for_is_an_error() {
        let (_dir, base, _) = image();
        // As long as a sparse image can claim to be.
        let mut layered = Layered::new(base, u64::MAX / 2, &std::env::temp_dir());
        assert!(!layered.has_layer());
        layered.write_at(0, &[1; 512]).unwrap_err();
        assert!(!layered.has_layer());
    }

    fn image() -> (tempfile::TempDir, File, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..BYTES)
            .map(|at| (at / 512 + 1).to_le_bytes()[0])
            .collect();
        let path = dir.path().join("base");
        std::fs::write(&path, &content).unwrap();
        // Writing it fails: nothing here can.
        let base = File::open(&path).unwrap();
        (dir, base, content)
    }

    #[test]
    fn a_disk_that_is_only_read_has_no_file_of_its_own() {
        let (dir, base, content) = image();
        let disk = Layered::new(base, BYTES, &dir.path().join("nowhere"));
        let mut buffer = vec![0; content.len()];
        disk.read_at(0, &mut buffer).unwrap();
        assert!(buffer == content && disk.layer.is_none());
    }

    #[test]
    fn a_folder_that_cannot_be_written_fails_the_write_by_name() {
        let (dir, base, _) = image();
        let mut disk = Layered::new(base, BYTES, &dir.path().join("nowhere"));
        let error = disk.write_at(0, &[1; 512]).unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64, u64, u8),
        Zero(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let sectors = BYTES / 512;
        let range = (0..sectors).prop_flat_map(move |from| (Just(from), 1..=sectors - from));
        let step = (range, any::<u8>(), any::<bool>()).prop_map(|((from, count), byte, zero)| {
            if zero {
                Step::Zero(from * 512, count * 512)
            } else {
                Step::Write(from * 512, count * 512, byte)
            }
        });
        proptest::collection::vec(step, 0..12)
    }

    proptest! {
        #[test]
        fn it_reads_as_a_disk_that_was_written_and_the_image_stays(steps in steps()) {
            let (dir, base, mut model) = image();
            let before = std::fs::read(dir.path().join("base")).unwrap();
            let mut disk = Layered::new(base, BYTES, dir.path());
            for step in steps {
                let (offset, bytes, byte) = match step {
                    Step::Write(offset, bytes, byte) => (offset, bytes, byte),
                    Step::Zero(offset, bytes) => (offset, bytes, 0),
                };
                let at = usize::try_from(offset).unwrap();
                let length = usize::try_from(bytes).unwrap();
                model[at..at + length].fill(byte);
                match step {
                    Step::Write(..) => disk.write_at(offset, &vec![byte; length]).unwrap(),
                    Step::Zero(..) => disk.zero(Extent { offset, bytes }).unwrap(),
                }
                let mut all = vec![0; model.len()];
                disk.read_at(0, &mut all).unwrap();
                prop_assert!(all == model);
                let mut part = vec![0; length];
                disk.read_at(offset, &mut part).unwrap();
                prop_assert!(part == model[at..at + length]);
            }
            prop_assert!(std::fs::read(dir.path().join("base")).unwrap() == before);
        }
    }
}
