#![forbid(unsafe_code)]
//! RAM on its way into a state file and out of it.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use xxhash_rust::xxh3::Xxh3;

use crate::memory::guest::GuestRam;
use crate::memory::layout::PAGE_BYTES;

/// How much is copied at once.
const CHUNK_BYTES: u64 = 256 << 10;
/// The same as a length.
const CHUNK: usize = 256 << 10;

/// What a backend's memory is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Runs of pages that are not all zero: first page and how many.
    pub runs: Vec<(u64, u64)>,
    /// XXH3-64 of those pages, one behind the other.
    pub checksum: u64,
}

/// The answer to a save that somebody called off.
pub fn cancelled() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "cancelled")
}

fn check(cancel: &AtomicBool) -> io::Result<()> {
    if cancel.load(Ordering::Relaxed) {
        Err(cancelled())
    } else {
        Ok(())
    }
}

/// Reads `buffer.len()` bytes of a backend.
fn read(ram: &GuestRam, backend: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    each_piece(ram, backend, offset, buffer.len(), &mut |address, range| {
        ram.read(address, &mut buffer[range])
            .map_err(io::Error::other)
    })
}

/// Writes bytes of a backend.
fn write(ram: &GuestRam, backend: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
    each_piece(ram, backend, offset, bytes.len(), &mut |address, range| {
        ram.write(address, &bytes[range]).map_err(io::Error::other)
    })
}

/// Calls `visit` for each run of guest addresses that `length` bytes of a backend lie at.
fn each_piece(
    ram: &GuestRam,
    backend: usize,
    offset: u64,
    length: usize,
    visit: &mut dyn FnMut(u64, std::ops::Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        let at = offset + done as u64;
        let segment = ram
            .layout()
            .segments()
            .iter()
            .find(|s| {
                s.backend == backend
                    && (s.backend_offset_bytes..s.backend_offset_bytes + s.bytes).contains(&at)
            })
            .ok_or_else(|| io::Error::other("memory outside its backend"))?;
        let within = at - segment.backend_offset_bytes;
        let left = usize::try_from(segment.bytes - within).unwrap_or(usize::MAX);
        let count = left.min(length - done);
        visit(segment.guest_address + within, done..done + count)?;
        done += count;
    }
    Ok(())
}

/// Looks at all memory of a backend. The machine must be stopped.
pub fn contents(
    ram: &GuestRam,
    backend: usize,
    bytes: u64,
    cancel: &AtomicBool,
) -> io::Result<Contents> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    while offset < bytes {
        check(cancel)?;
        let length = usize::try_from((bytes - offset).min(CHUNK_BYTES)).unwrap_or(CHUNK);
        read(ram, backend, offset, &mut buffer[..length])?;
        let first = offset / PAGE_BYTES;
        let pages = buffer[..length].chunks(PAGE_LENGTH);
        for (page, content) in (first..).zip(pages) {
            if content.iter().all(|&byte| byte == 0) {
                continue;
            }
            hash.update(content);
            match runs.last_mut() {
                Some((begin, count)) if *begin + *count == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        offset += length as u64;
    }
    Ok(Contents {
        runs,
        checksum: hash.digest(),
    })
}

const PAGE_LENGTH: usize = 4096;
const _: () = assert!(PAGE_BYTES == 4096);

/// How pages lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// One behind the other.
    Packed,
    /// Each at its own place: the backend begins at this offset.
    Mapped(u64),
}

/// Writes the pages of `runs`.
pub fn save(
    ram: &GuestRam,
    backend: usize,
    runs: &[(u64, u64)],
    placement: Placement,
    file: &mut File,
    cancel: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut out = BufWriter::with_capacity(CHUNK, file);
    for &(first, count) in runs {
        if let Placement::Mapped(begin) = placement {
            out.seek(SeekFrom::Start(begin + first * PAGE_BYTES))?;
        }
        let (mut offset, end) = (first * PAGE_BYTES, (first + count) * PAGE_BYTES);
        while offset < end {
            check(cancel)?;
            let length = usize::try_from((end - offset).min(CHUNK_BYTES)).unwrap_or(CHUNK);
            read(ram, backend, offset, &mut buffer[..length])?;
            out.write_all(&buffer[..length])?;
            offset += length as u64;
        }
    }
    out.flush()
}

/// Brings the pages of `runs` into memory that is all zero, and proves them.
pub fn load(
    ram: &GuestRam,
    backend: usize,
    saved: &Contents,
    placement: Placement,
    file: &mut File,
) -> io::Result<()> {
    let bytes = ram
        .layout()
        .backend_bytes()
        .get(backend)
        .copied()
        .unwrap_or(0);
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; CHUNK];
    let packed = placement == Placement::Packed;
    let mut input = BufReader::with_capacity(if packed { 0 } else { CHUNK }, file);
    for &(first, count) in &saved.runs {
        let end = first.saturating_add(count).saturating_mul(PAGE_BYTES);
        if end > bytes {
            return Err(io::Error::other(format!(
                "page {first} and {count} more are outside the backend"
            )));
        }
        let mut offset = first * PAGE_BYTES;
        if let Placement::Mapped(begin) = placement {
            input.seek(SeekFrom::Start(begin + offset))?;
        }
        while offset < end {
            let length = usize::try_from((end - offset).min(CHUNK_BYTES)).unwrap_or(CHUNK);
            input.read_exact(&mut buffer[..length])?;
            hash.update(&buffer[..length]);
            write(ram, backend, offset, &buffer[..length])?;
            offset += length as u64;
        }
    }
    if hash.digest() == saved.checksum {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "its checksum is {:#018x}, saved was {:#018x}",
            hash.digest(),
            saved.checksum
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::guest::RamBacking;
    use crate::memory::layout::RamLayout;

    fn ram(bytes: u64) -> GuestRam {
        let backing = RamBacking::anonymous(bytes).unwrap();
        GuestRam::new(RamLayout::new(&[bytes]).unwrap(), vec![backing]).unwrap()
    }

    #[test]
    fn memory_comes_back_whichever_way_it_lay() {
        let bytes = 1 << 20;
        let source = ram(bytes);
        source.write(5, b"aspen").unwrap();
        source.write(3 * 4096, &[7; 9000]).unwrap();
        let go_on = AtomicBool::new(false);
        let found = contents(&source, 0, bytes, &go_on).unwrap();
        assert_eq!(found.runs, [(0, 1), (3, 3)]);
        for placement in [Placement::Packed, Placement::Mapped(8192)] {
            let mut file = tempfile::tempfile().unwrap();
            save(&source, 0, &found.runs, placement, &mut file, &go_on).unwrap();
            file.rewind().unwrap();
            let target = ram(bytes);
            load(&target, 0, &found, placement, &mut file).unwrap();
            assert_eq!(contents(&target, 0, bytes, &go_on).unwrap(), found);
            let wrong = Contents {
                checksum: 1,
                ..found.clone()
            };
            file.rewind().unwrap();
            assert!(load(&ram(bytes), 0, &wrong, placement, &mut file).is_err());
            let outside = Contents {
                runs: vec![(1 << 60, 1 << 60)],
                checksum: 0,
            };
            assert!(load(&ram(bytes), 0, &outside, placement, &mut file).is_err());
        }
        let stop = AtomicBool::new(true);
        contents(&source, 0, bytes, &stop).unwrap_err();
    }
}
