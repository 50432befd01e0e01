#![forbid(unsafe_code)]
//! Builds the index of a RAM file in one pass.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;

use super::ImageError;
use super::index::{BackendIndex, Builder, CHUNK_PAGES, PageKind};
use crate::page::{ByteOffset, PAGE_BYTES, PageCount};

const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;
#[expect(clippy::cast_possible_truncation, reason = "16384 and 4096 fit")]
const CHUNK: usize = CHUNK_BYTES as usize;
#[expect(clippy::cast_possible_truncation, reason = "4096 fits")]
const PAGE: usize = PAGE_BYTES as usize;

impl BackendIndex {
    /// Reads the `bytes` bytes of `file` once and says what every page is. Holes are found with
    /// SEEK_DATA and SEEK_HOLE and not read. `visit` gets each whole chunk that has a data page,
    /// in order: for a digest, or to show progress.
    ///
    /// Moves the file's cursor. A file that another process writes meanwhile gives an index that
    /// fits no state of it: freeze first.
    pub fn scan(
        file: &File,
        bytes: u64,
        visit: &mut dyn FnMut(ByteOffset, &[u8]),
    ) -> Result<Self, ImageError> {
        let pages = PageCount::from_bytes(bytes).ok_or(ImageError::PartialPage { bytes })?;
        let length = file
            .metadata()
            .map_err(|source| ImageError::Read { offset: 0, source })?
            .len();
        if length < bytes {
            return Err(ImageError::Truncated {
                offset: length,
                bytes,
            });
        }
        let mut builder = Builder::default();
        let mut buffer = vec![0; CHUNK];
        let mut extents = Extents::new(file, bytes);
        let mut at = 0;
        while at < bytes {
            let chunk = at..(at + CHUNK_BYTES).min(bytes);
            let data = extents.next_data(at)?;
            if data >= chunk.end {
                // Whole chunks up to the next data are holes.
                let until = (data - data % CHUNK_BYTES).max(chunk.end).min(bytes);
                builder.holes((until - at) / PAGE_BYTES);
                at = until;
                continue;
            }
            let buffer = &mut buffer[..usize::try_from(chunk.end - at).unwrap_or(CHUNK)];
            file.read_exact_at(buffer, at).map_err(|source| {
                if source.kind() == io::ErrorKind::UnexpectedEof {
                    ImageError::Truncated { offset: at, bytes }
                } else {
                    ImageError::Read { offset: at, source }
                }
            })?;
            let mut any_data = false;
            for (page, offset) in buffer.chunks(PAGE).zip((at..).step_by(PAGE)) {
                let kind = if page.iter().any(|&byte| byte != 0) {
                    any_data = true;
                    PageKind::Data
                } else if extents.next_data(offset)? >= offset + PAGE_BYTES {
                    PageKind::Hole
                } else {
                    PageKind::Zero
                };
                builder.page(kind);
            }
            if any_data {
                builder.checksum(xxh3_64(buffer));
                visit(ByteOffset::new(at), buffer);
            }
            at = chunk.end;
        }
        debug_assert_eq!(at, pages.bytes());
        builder
            .build()
            .map_err(|reason| ImageError::Body { offset: 0, reason })
    }
}

impl BackendIndex {
    /// The index of `bytes` bytes of `file` from `offset_bytes` on, of a file that has none: what the
    /// file system has is data, the rest holes. Nothing is read, so nothing can be proven when it is.
    ///
    /// Moves the file's cursor.
    pub fn unsummed(file: &File, offset_bytes: u64, bytes: u64) -> Result<Self, ImageError> {
        let pages = PageCount::from_bytes(bytes).ok_or(ImageError::PartialPage { bytes })?;
        let end = offset_bytes.checked_add(bytes);
        let end = end.ok_or(ImageError::PartialPage { bytes })?;
        let mut builder = Builder::default();
        let mut extents = Extents::new(file, end);
        let mut done = 0;
        while done < pages.get() {
            let at = offset_bytes + done * PAGE_BYTES;
            let holes = (extents.next_data(at)? - at) / PAGE_BYTES;
            let holes = holes.min(pages.get() - done);
            builder.holes(holes);
            done += holes;
            let rest = pages.get() - done;
            let at = offset_bytes + done * PAGE_BYTES;
            let data = (extents.hole.saturating_sub(at)).div_ceil(PAGE_BYTES);
            // Where there is no hole behind, nothing has changed: one page goes on.
            let data = data.max(1).min(rest);
            builder.data(data);
            done += data;
        }
        builder
            .build_unsummed()
            .map_err(|reason| ImageError::Body { offset: 0, reason })
    }
}

/// The data extents of a file, asked for from front to back.
struct Extents<'a> {
    file: &'a File,
    bytes: u64,
    data: u64,
    hole: u64,
}

impl<'a> Extents<'a> {
    fn new(file: &'a File, bytes: u64) -> Self {
        Self {
            file,
            bytes,
            data: 0,
            hole: 0,
        }
    }

    /// The first byte at or behind `offset` that is allocated; `bytes` when there is none.
    fn next_data(&mut self, offset: u64) -> Result<u64, ImageError> {
        while offset >= self.hole && self.data < self.bytes {
            self.data = self.seek(SeekFrom::Data(offset.max(self.hole)))?;
            self.hole = if self.data < self.bytes {
                self.seek(SeekFrom::Hole(self.data))?.max(self.data + 1)
            } else {
                self.bytes
            };
        }
        Ok(self.data.max(offset).min(self.bytes))
    }

    fn seek(&self, to: SeekFrom) -> Result<u64, ImageError> {
        match seek(self.file, to) {
            Ok(offset) => Ok(offset.min(self.bytes)),
            // Nothing but hole up to the end.
            Err(Errno::NXIO) => Ok(self.bytes),
            Err(errno) => Err(ImageError::Read {
                offset: self.hole,
                source: errno.into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ChunkIndex;
    use crate::page::PageIndex;

    #[test]
    fn data_zero_and_holes_are_told_apart() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * PAGE_BYTES).unwrap();
        file.write_all_at(&[7; PAGE], 5 * PAGE_BYTES).unwrap();
        file.write_all_at(&[0; PAGE], 6 * PAGE_BYTES).unwrap();
        file.write_all_at(&[1], 63 * PAGE_BYTES + 9).unwrap();
        let mut seen = Vec::new();
        let index = BackendIndex::scan(&file, 64 * PAGE_BYTES, &mut |offset, bytes| {
            seen.push((offset.get(), bytes.len()));
        })
        .unwrap();
        assert_eq!(index.pages().get(), 64);
        let kind = |page| index.kind(PageIndex::new(page));
        assert_eq!(kind(4), PageKind::Hole);
        assert_eq!(kind(5), PageKind::Data);
        assert_eq!(kind(6), PageKind::Zero);
        assert_eq!(kind(7), PageKind::Hole);
        assert_eq!(kind(62), PageKind::Hole);
        assert_eq!(kind(63), PageKind::Data);
        assert_eq!(index.count(PageKind::Data).get(), 2);
        assert_eq!(index.count(PageKind::Zero).get(), 1);
        assert_eq!(seen, [(4 * PAGE_BYTES, CHUNK), (60 * PAGE_BYTES, CHUNK)]);
        let mut chunk = vec![0; CHUNK];
        file.read_exact_at(&mut chunk, 4 * PAGE_BYTES).unwrap();
        assert_eq!(index.checksum(ChunkIndex::new(1)), Some(xxh3_64(&chunk)));
        assert_eq!(index.checksum(ChunkIndex::new(2)), None);
    }

    #[test]
    fn an_empty_file_and_a_short_last_chunk_work() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(
            BackendIndex::scan(&file, 0, &mut |_, _| ())
                .unwrap()
                .pages()
                .get(),
            0
        );
        file.write_all_at(&[3; 5 * PAGE], 0).unwrap();
        let index = BackendIndex::scan(&file, 5 * PAGE_BYTES, &mut |_, _| ()).unwrap();
        assert_eq!(index.count(PageKind::Data).get(), 5);
        assert_eq!(
            index.checksum(ChunkIndex::new(1)),
            Some(xxh3_64(&[3; PAGE]))
        );
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_by_number() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let text = |bytes| {
            BackendIndex::scan(&file, bytes, &mut |_, _| ())
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            text(4097),
            "4097 bytes of memory are no whole number of 4096-byte pages"
        );
        assert_eq!(
            text(8192),
            "memory file ended at byte 4096 while it was scanned, 8192 were expected"
        );
    }

    #[test]
    fn a_file_without_an_index_is_data_where_it_has_blocks() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let unit = 1 << 20;
        for (at, bytes) in [
            (unit, 5000_usize),
            (8 * unit, 1 << 20),
            (63 * unit, 1 << 20),
        ] {
            file.write_all_at(&vec![7; bytes], at).unwrap();
        }
        for offset in [0, unit, unit + 4096, 2 * unit, 8 * unit + 4096] {
            let bytes = (64 << 20) - offset;
            let index = BackendIndex::unsummed(&file, offset, bytes).unwrap();
            assert!(!index.is_summed());
            assert_eq!(index.pages().bytes(), bytes);
            let mut page = [0; PAGE];
            for number in 0..index.pages().get() {
                let kind = index.kind(PageIndex::new(number));
                file.read_exact_at(&mut page, offset + number * PAGE_BYTES)
                    .unwrap();
                let is_zero = page.iter().all(|&byte| byte == 0);
                assert!(is_zero || kind == PageKind::Data, "page {number}");
            }
            let holes = index.count(PageKind::Hole).get();
            assert!(holes > index.pages().get() / 2, "{holes} holes");
        }
        BackendIndex::unsummed(&file, 0, 100).unwrap_err();
        BackendIndex::unsummed(&file, u64::MAX - 4095, 8192).unwrap_err();
    }
}
