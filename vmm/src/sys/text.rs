// UNSAFETY: madvise(2) takes the mapping by address; what is dropped is mapped again by the next access.
#![expect(unsafe_code, reason = "MADV_DONTNEED on mappings of files")]
//! This program's code and constants, mapped for its forks: what they need of it, and no more.
//!
//! fork(2) does not copy the page table entries of a file's pages unless the mapping also has a page
//! of its own: a child finds its own code unmapped, and takes some forty faults on the way through a
//! start. One page of each mapping that was written (with what it held) makes fork(2) copy the
//! entries of all others. An entry costs it about 0.1 us, so that all of the program is as dear as the faults
//! are: 2500 entries, of which a clone needs a quarter. So the parent begins with none, looks at
//! what its forks have mapped after their start, and maps the same.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use super::pagemap::{Entry, PAGE_BYTES, Pagemap};

/// Mappings that are longer than this are left alone, in bytes: no program of ours has any.
const MAX_MAPPING_BYTES: u64 = 256 << 20;
/// After so many forks in a row that needed nothing more, no other is looked at.
const LOOKS_IN_VAIN: u32 = 8;
/// Nor after so many in all.
const LOOKS: u32 = 256;

/// A mapping of a file that nobody writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
}

impl Mapping {
    fn pages(self) -> u64 {
        (self.end - self.start) / PAGE_BYTES
    }

    /// The pages of it, as `map`'s process has them.
    fn entries(self, map: &Pagemap) -> io::Result<Vec<Entry>> {
        let pages = usize::try_from(self.pages()).unwrap_or_default();
        let mut entries = vec![Entry::default(); pages];
        let found = map.entries(self.start, &mut entries)?;
        entries.truncate(found);
        Ok(entries)
    }
}

/// What forks of this process inherit of its code.
#[derive(Debug, Default)]
pub struct Text {
    mappings: Vec<Mapping>,
    looks_in_vain: u32,
    looks: u32,
}

impl Text {
    /// Has forks inherit what this process has mapped, which from now on is what they need: so far
    /// nothing. What the kernel refuses costs time later and is no error.
    pub fn for_forks() -> Self {
        let mut text = Self::default();
        if let Err(error) = text.find() {
            tracing::debug!(%error, "forks of this process fault their code in");
        }
        text
    }

    fn find(&mut self) -> io::Result<()> {
        let maps = fs::read_to_string("/proc/self/maps")?;
        let (map, memory) = (Pagemap::of_self()?, own_memory()?);
        for mapping in maps.lines().filter_map(parse) {
            let entries = mapping.entries(&map)?;
            let is_known = entries.len() as u64 == mapping.pages();
            if !is_known || entries.iter().any(|page| page.is_own_copy()) {
                // Relocated when the program was loaded: forks copy its entries already.
                continue;
            }
            let mut byte = [0];
            memory.read_exact_at(&mut byte, mapping.start)?;
            memory.write_all_at(&byte, mapping.start)?;
            drop_entries(mapping)?;
            self.mappings.push(mapping);
        }
        Ok(())
    }

    /// Whether a fork should be looked at.
    pub fn is_learning(&self) -> bool {
        !self.mappings.is_empty() && self.looks_in_vain < LOOKS_IN_VAIN && self.looks < LOOKS
    }

    /// Maps what a fork has mapped. One that has ended teaches nothing, and one that is not
    /// whole, because it has not run all that a clone runs, does not show that there is nothing left to learn.
    pub fn learn(&mut self, pid: u32, is_whole: bool) {
        self.looks += 1;
        match self.map_as(pid) {
            Ok(0) if is_whole => self.looks_in_vain += 1,
            Ok(0) => (),
            Ok(pages) => {
                self.looks_in_vain = 0;
                tracing::debug!(pid, pages, "forks to come have more of their code mapped");
            }
            Err(error) => tracing::debug!(pid, %error, "cannot see what code a fork needs"),
        }
    }

    /// Returns how many pages of the fork's were missing here.
    fn map_as(&self, pid: u32) -> io::Result<u64> {
        let (theirs, ours, memory) = (Pagemap::of(pid)?, Pagemap::of_self()?, own_memory()?);
        let mut missing = 0;
        for &mapping in &self.mappings {
            let pages = mapping.entries(&theirs)?;
            for (number, page) in (0..).zip(pages) {
                let at = mapping.start + number * PAGE_BYTES;
                let mut own = [Entry::default()];
                // Asked one by one: each access maps its neighbours too.
                if page.is_present() && ours.entries(at, &mut own)? == 1 && !own[0].is_present() {
                    memory.read_exact_at(&mut [0], at)?;
                    missing += 1;
                }
            }
        }
        Ok(missing)
    }
}

/// A debugger's way to memory: it writes a private copy of a page that is read-only.
fn own_memory() -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open("/proc/self/mem")
}

/// Has each page of a mapping mapped anew by the next access.
fn drop_entries(mapping: Mapping) -> io::Result<()> {
    let number = |number: u64| usize::try_from(number).map_err(io::Error::other);
    let (address, bytes) = (number(mapping.start)?, number(mapping.end - mapping.start)?);
    // SAFETY: the range is one mapping of a file of this process, private and read-only (`parse`), of which no
    // page was this process's own, in memory or swapped out (`Text::find` asked, and wrote back what it read):
    // all are the file's. Whoever reads or runs it finds the same bytes again, which the kernel maps by a fault.
    let done = unsafe { libc::madvise(address as *mut libc::c_void, bytes, libc::MADV_DONTNEED) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A line of proc_pid_maps(5), if it is a private read-only mapping of a file.
fn parse(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let inode = fields.nth(2)?;
    if !matches!(permissions, "r-xp" | "r--p") || inode == "0" {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let mapping = Mapping {
        start: number(start)?,
        end: number(end)?,
    };
    let length = mapping.end.checked_sub(mapping.start)?;
    (length <= MAX_MAPPING_BYTES).then_some(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_read_only_mappings_of_files_are_mapped() {
        let line = "7f0000001000-7f0000003000 r-xp 00001000 fe:00 1234      /usr/lib/libc.so.6";
        let expected = Mapping {
            start: 0x7f00_0000_1000,
            end: 0x7f00_0000_3000,
        };
        assert_eq!(parse(line), Some(expected));
        for other in [
            "7f0000001000-7f0000003000 rw-p 00001000 fe:00 1234      /usr/lib/libc.so.6",
            "7f0000001000-7f0000003000 r--p 00000000 00:00 0",
            "7fff00000000-7fff00002000 r-xp 00000000 00:00 0          [vdso]",
            "7f0000001000-7f1000003000 r-xp 00001000 fe:00 1234      /big",
            "nonsense",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
        assert_eq!(parse(""), None);
    }

    #[test]
    fn own_copies_are_seen_wherever_they_are() {
        let (present, swapped, of_file) = (1_u64 << 63, 1 << 62, 1 << 61);
        for (bits, expected) in [
            (0, false),
            (present | of_file, false),
            // On its way to another place.
            (swapped | of_file, false),
            (present, true),
            (swapped, true),
        ] {
            assert_eq!(Entry::new(bits).is_own_copy(), expected, "{bits:#x}");
        }
    }

    /// Entries that are present, of all mappings.
    fn present(text: &Text, map: &Pagemap) -> usize {
        let entries = |mapping: &Mapping| mapping.entries(map).unwrap();
        let all = text.mappings.iter().flat_map(entries);
        all.filter(|page| page.is_present()).count()
    }

    /// This process is its own fork here: the code runs on, and what it needs is what is mapped.
    #[test]
    fn what_a_fork_has_mapped_is_mapped() {
        let mut text = Text::for_forks();
        assert!(text.is_learning());
        let map = Pagemap::of_self().unwrap();
        let all: u64 = text.mappings.iter().map(|mapping| mapping.pages()).sum();
        let few = present(&text, &map);
        assert!(few > 0 && (few as u64) < all, "{few} of {all}");
        for _ in 0..LOOKS_IN_VAIN {
            assert!(text.is_learning());
            text.learn(std::process::id(), false);
            assert!(text.is_learning(), "it may have run little");
            text.learn(std::process::id(), true);
        }
        assert!(
            !text.is_learning(),
            "a process that is as this one teaches nothing"
        );
        // No such process.
        text.learn(u32::MAX, true);
    }
}
