#![forbid(unsafe_code)]
//! RAM on its way into a state file and out of it.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use xxhash_rust::xxh3::Xxh3;

use super::file::{LoadError, StateFile};
use super::state::{SavedContent, SavedMachine};
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
    let layout = ram.layout();
    let mut done = 0;
    while done < length {
        let at = offset + done as u64;
        let segment = layout
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
    // Memory that the guest has given back is not to come again by being looked at.
    while let Some(data) = ram.next_data(backend, offset) {
        offset = data.start - data.start % PAGE_BYTES;
        let end = data.end.next_multiple_of(PAGE_BYTES).min(bytes);
        if offset >= end {
            break;
        }
        check(cancel)?;
        let length = usize::try_from((end - offset).min(CHUNK_BYTES)).unwrap_or(CHUNK);
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

/// Reads the pages of `saved`, of a backend of so many bytes, and proves them; `take` gets them piece by
/// piece, each with its place in the backend, before that.
fn read_runs(
    saved: &Contents,
    bytes: u64,
    placement: Placement,
    file: &mut File,
    take: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let total: u64 = saved
        .runs
        .iter()
        .fold(0, |sum, run| sum.saturating_add(run.1));
    let mut pages = 0;
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; CHUNK];
    for &(first, count) in &saved.runs {
        let end = first.saturating_add(count).saturating_mul(PAGE_BYTES);
        if end > bytes {
            return Err(io::Error::other(format!(
                "page {first} and {count} more are outside the backend"
            )));
        }
        let mut offset = first * PAGE_BYTES;
        if let Placement::Mapped(begin) = placement {
            file.seek(SeekFrom::Start(begin + offset))?;
        }
        while offset < end {
            let length = usize::try_from((end - offset).min(CHUNK_BYTES)).unwrap_or(CHUNK);
            let piece = &mut buffer[..length];
            let there = read_until_end(file, piece)?;
            if there < length {
                let whole = there as u64 / PAGE_BYTES;
                return Err(io::Error::other(format!(
                    "the file is cut: it ends in page {}, the {}th of {total} that it is to have",
                    offset / PAGE_BYTES + whole,
                    pages + whole + 1,
                )));
            }
            hash.update(piece);
            take(offset, piece)?;
            offset += length as u64;
            pages += length as u64 / PAGE_BYTES;
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

/// Fills `buffer`, as far as there is something; how much that is.
fn read_until_end(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Brings the pages of `saved` into memory that is all zero, and proves them.
pub fn load(
    ram: &GuestRam,
    backend: usize,
    saved: &Contents,
    placement: Placement,
    file: &mut File,
) -> io::Result<()> {
    let layout = ram.layout();
    let bytes = layout.backend_bytes().get(backend).copied().unwrap_or(0);
    read_runs(saved, bytes, placement, file, &mut |offset, piece| {
        write(ram, backend, offset, piece)
    })
}

/// The RAM of one backend in a file.
struct Part {
    backend: usize,
    bytes: u64,
    contents: Contents,
    placement: Placement,
}

impl Part {
    fn read(
        &self,
        file: &mut File,
        take: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        read_runs(&self.contents, self.bytes, self.placement, file, take)
    }
}

/// Calls `read` for each backend whose RAM is in the file, which is at `place`.
fn each(
    saved: &SavedMachine,
    state: &mut StateFile,
    mut place: u64,
    read: &mut dyn FnMut(&Part, &mut File) -> io::Result<()>,
) -> Result<(), LoadError> {
    for (position, backend) in saved.backends.iter().enumerate() {
        let SavedContent::Here { runs, checksum } = &backend.content else {
            continue;
        };
        let placement = if saved.mapped_ram {
            Placement::Mapped(place)
        } else {
            Placement::Packed
        };
        let part = Part {
            backend: position,
            bytes: backend.bytes,
            contents: Contents {
                runs: runs.clone(),
                checksum: *checksum,
            },
            placement,
        };
        read(&part, &mut state.file).map_err(|error| {
            LoadError::io(format!(
                "RAM of \"{}\" in {} cannot be used: {error}",
                backend.id,
                state.path.display()
            ))
            .and("error while loading state section id 0(ram)")
        })?;
        place += backend.bytes;
    }
    Ok(())
}

/// Brings all RAM that is in the file into memory that is all zero, and proves it.
pub fn load_all(
    saved: &SavedMachine,
    state: &mut StateFile,
    place: u64,
    ram: &GuestRam,
) -> Result<(), LoadError> {
    each(saved, state, place, &mut |part, file| {
        load(ram, part.backend, &part.contents, part.placement, file)
    })
}

/// Proves all RAM that is in the file, and goes back to where it begins.
pub fn prove_all(saved: &SavedMachine, state: &mut StateFile, place: u64) -> Result<(), LoadError> {
    each(saved, state, place, &mut |part, file| {
        part.read(file, &mut |_, _| Ok(()))
    })?;
    let back = state.file.seek(SeekFrom::Start(place));
    back.map(drop).map_err(|error| {
        let name = state.path.display();
        LoadError::io(format!("{name} cannot be read twice: {error}"))
    })
}

/// Copies all RAM that is in the file, proven, to a file without a name: it can then be read again from
/// there, packed, from the beginning.
pub fn copy(
    saved: &SavedMachine,
    state: &mut StateFile,
    place: u64,
    directory: &Path,
) -> Result<StateFile, LoadError> {
    let cannot = |error: io::Error| {
        let name = directory.display();
        LoadError::io(format!("cannot keep RAM of the state in {name}: {error}"))
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let nameless = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR);
    let mut kept = File::from(nameless.map_err(|errno| cannot(errno.into()))?);
    each(saved, state, place, &mut |part, file| {
        part.read(file, &mut |_, piece| kept.write_all(piece))
    })?;
    kept.rewind().map_err(cannot)?;
    Ok(StateFile {
        file: kept,
        path: state.path.clone(),
        offset_bytes: 0,
        can_seek: true,
        is_regular: true,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory::discard::DiscardSource;
    use crate::memory::guest::RamBacking;
    use crate::memory::layout::RamLayout;

    fn ram(bytes: u64) -> GuestRam {
        let backing = RamBacking::anonymous(bytes).unwrap();
        GuestRam::new(RamLayout::new(&[bytes]).unwrap(), vec![backing]).unwrap()
    }

    #[test]
    fn a_look_at_memory_does_not_bring_what_was_given_back() {
        let (bytes, page) = (8 << 20, 4096);
        let file =
            File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes + 2 * page).unwrap();
        let backing = RamBacking::shared_from(&file, 2 * page, bytes).unwrap();
        let source = GuestRam::new(RamLayout::new(&[bytes]).unwrap(), vec![backing]).unwrap();
        source.write(0, b"root").unwrap();
        source.write(3 << 20, &[7; 9000]).unwrap();
        source.write(bytes - 1, b"!").unwrap();
        source.discard(DiscardSource::Balloon, 0, page).unwrap();
        let before = file.metadata().unwrap().blocks();
        let found = contents(&source, 0, bytes, &AtomicBool::new(false)).unwrap();
        assert_eq!(found.runs, [(768, 3), (2047, 1)]);
        assert_eq!(file.metadata().unwrap().blocks(), before);
        // The same of memory without a file, which has no pages after that for what nobody wrote.
        let own = ram(bytes);
        own.write(0, b"root").unwrap();
        own.write(3 << 20, &[7; 9000]).unwrap();
        own.write(bytes - 1, b"!").unwrap();
        own.discard(DiscardSource::Balloon, 0, page).unwrap();
        let again = contents(&own, 0, bytes, &AtomicBool::new(false)).unwrap();
        assert_eq!(again, found);
        let fresh = ram(bytes);
        for _ in 0..2 {
            assert_eq!(fresh.next_data(0, 0), None);
            let nothing = contents(&fresh, 0, bytes, &AtomicBool::new(false)).unwrap();
            assert_eq!(nothing.runs, []);
        }
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
            let begin = if placement == Placement::Packed {
                0
            } else {
                8192
            };
            let cut = file.try_clone().unwrap();
            cut.set_len(begin + 2 * 4096 + 7).unwrap();
            file.rewind().unwrap();
            let error = load(&ram(bytes), 0, &found, placement, &mut file).unwrap_err();
            let (page, number) = if begin == 0 { (4, 3) } else { (3, 2) };
            let text = format!("it ends in page {page}, the {number}th of 4 that it is to have");
            assert!(error.to_string().contains(&text), "{error}");
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
