#![forbid(unsafe_code)]
//! The guest RAM of one clone, each page in exactly one class.
//!
//! | class | a page that |
//! |---|---|
//! | `private_dirty` | this clone alone has, and wrote |
//! | `private_clean` | this clone alone has, and that equals the template |
//! | `shared` | other processes have too: inherited from a root, or in the page cache |
//! | `zero` | is the kernel's page of zeros |
//! | `absent` | is not in memory: its first touch brings it |
//! | `swapped` | is in swap, under migration, or poisoned |

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::sys::pagemap::{Categories, Entry, PAGE_BYTES, PageRun, Pagemap, Query};

/// Most ranges of RAM that a clone may report; a machine has one for each of its backends.
pub const MAX_PLACES: usize = 64;
/// Runs of pages taken from the kernel at once.
const RUNS: usize = 512;
/// Entries of the page map read at once.
const ENTRIES: usize = 4096;

/// Memory of a process that is guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlace {
    /// First address in that process.
    pub address: u64,
    /// Length.
    pub bytes: u64,
}

/// How exactly the classes are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accuracy {
    /// Page by page.
    Exact,
    /// Page by page, but written pages cannot be told from others that the clone has alone: those
    /// count as `private_dirty`. Give-back brings the write tracking that it takes.
    WrittenUnknown,
    /// From the kernel's sums for mappings, for want of PAGEMAP_SCAN: as before, and `zero` counts as
    /// `absent`.
    Sums,
}

/// Guest RAM by class, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RamMemory {
    /// The clone alone has it, and wrote it.
    pub private_dirty_bytes: u64,
    /// The clone alone has it, and it equals the template.
    pub private_clean_bytes: u64,
    /// Others have it too.
    pub shared_bytes: u64,
    /// The kernel's page of zeros.
    pub zero_bytes: u64,
    /// Not in memory.
    pub absent_bytes: u64,
    /// In swap, under migration, or poisoned.
    pub swapped_bytes: u64,
}

impl RamMemory {
    /// Measures the RAM that process `pid` has at `ranges`. Where no pager fills it (`is_paged`), private
    /// anonymous pages can come from its own writes alone.
    pub fn of(pid: u32, ranges: &[MemoryPlace], is_paged: bool) -> io::Result<(Self, Accuracy)> {
        let map = Pagemap::of(pid)?;
        if map.can_scan()? {
            exact(&map, ranges, is_paged)
        } else {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
            Ok((sums(&text, ranges), Accuracy::Sums))
        }
    }

    /// What only this clone has.
    pub fn private_bytes(&self) -> u64 {
        self.private_dirty_bytes + self.private_clean_bytes
    }

    /// The classes and their names, as in the metrics.
    pub fn classes(&self) -> [(&'static str, u64); 6] {
        [
            ("private_dirty", self.private_dirty_bytes),
            ("private_clean", self.private_clean_bytes),
            ("shared", self.shared_bytes),
            ("zero", self.zero_bytes),
            ("absent", self.absent_bytes),
            ("swapped", self.swapped_bytes),
        ]
    }

    fn in_memory_bytes(&self) -> u64 {
        self.private_bytes() + self.shared_bytes + self.zero_bytes + self.swapped_bytes
    }

    fn with_the_rest_absent(mut self, ranges: &[MemoryPlace]) -> Self {
        let total: u64 = ranges.iter().map(|range| range.bytes).sum();
        self.absent_bytes = total.saturating_sub(self.in_memory_bytes());
        self
    }
}

fn exact(
    map: &Pagemap,
    ranges: &[MemoryPlace],
    is_paged: bool,
) -> io::Result<(RamMemory, Accuracy)> {
    let query = Query {
        any: Categories::PRESENT.and(Categories::SWAPPED),
        tell: Categories::PRESENT
            .and(Categories::SWAPPED)
            .and(Categories::ZERO)
            .and(Categories::FILE)
            .and(Categories::WRITTEN)
            .and(Categories::WRITE_TRACKED),
        ..Query::default()
    };
    let mut ram = RamMemory::default();
    let mut accuracy = Accuracy::Exact;
    let mut runs = vec![PageRun::default(); RUNS];
    let mut entries = vec![Entry::default(); ENTRIES];
    for range in ranges {
        let end = range.address.saturating_add(range.bytes);
        let mut at = range.address;
        while at < end {
            let (found, next) = map.scan(at..end, query, &mut runs)?;
            for run in &runs[..found] {
                let is = |category| run.categories.has(category);
                if is(Categories::ZERO) {
                    ram.zero_bytes += run.bytes();
                } else if !is(Categories::PRESENT) {
                    ram.swapped_bytes += run.bytes();
                } else {
                    let exclusive = exclusive_bytes(map, run, &mut entries)?;
                    ram.shared_bytes += run.bytes() - exclusive;
                    if is(Categories::FILE)
                        || is(Categories::WRITE_TRACKED) && !is(Categories::WRITTEN)
                    {
                        ram.private_clean_bytes += exclusive;
                    } else {
                        ram.private_dirty_bytes += exclusive;
                        if is_paged && exclusive > 0 && !is(Categories::WRITE_TRACKED) {
                            accuracy = Accuracy::WrittenUnknown;
                        }
                    }
                }
            }
            // A kernel that says nothing new must not keep us here.
            if next <= at {
                break;
            }
            at = next;
        }
    }
    Ok((ram.with_the_rest_absent(ranges), accuracy))
}

/// How much of a run of present pages no other process has.
fn exclusive_bytes(map: &Pagemap, run: &PageRun, entries: &mut [Entry]) -> io::Result<u64> {
    let mut exclusive = 0;
    let mut at = run.start;
    while at < run.end {
        let left = usize::try_from((run.end - at) / PAGE_BYTES).unwrap_or(usize::MAX);
        let room = left.min(entries.len());
        let read = map.entries(at, &mut entries[..room])?;
        if read == 0 {
            break;
        }
        let alone = entries[..read].iter().filter(|entry| entry.is_exclusive());
        exclusive += alone.count() as u64 * PAGE_BYTES;
        at += read as u64 * PAGE_BYTES;
    }
    Ok(exclusive)
}

/// Adds up what `/proc/PID/smaps` says of mappings that begin in `ranges`.
fn sums(text: &str, ranges: &[MemoryPlace]) -> RamMemory {
    let mut ram = RamMemory::default();
    let mut is_ram = false;
    for line in text.lines() {
        let Some((name, rest)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        if let Some((start, _)) = name.split_once('-') {
            // A mapping: START-END, in hexadecimal.
            is_ram = u64::from_str_radix(start, 16).is_ok_and(|start| {
                let within = |range: &MemoryPlace| {
                    start
                        .checked_sub(range.address)
                        .is_some_and(|at| at < range.bytes)
                };
                ranges.iter().any(within)
            });
        } else if is_ram {
            let kib = rest
                .split_whitespace()
                .next()
                .and_then(|kib| kib.parse::<u64>().ok());
            let bytes = kib.map_or(0, |kib| kib.saturating_mul(1024));
            match name {
                "Private_Dirty:" => ram.private_dirty_bytes += bytes,
                "Private_Clean:" => ram.private_clean_bytes += bytes,
                "Shared_Clean:" | "Shared_Dirty:" => ram.shared_bytes += bytes,
                "Swap:" => ram.swapped_bytes += bytes,
                _ => (),
            }
        }
    }
    ram.with_the_rest_absent(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_count_mappings_of_ram_alone() {
        let text = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \n\
Size:               1024 kB\nRss: 100 kB\nShared_Clean: 8 kB\nShared_Dirty: 4 kB\n\
Private_Clean: 16 kB\nPrivate_Dirty: 32 kB\nSwap: 12 kB\nVmFlags: rd wr um uw\n\
7f0000200000-7f0000300000 r-xp 00000000 08:01 42 /usr/bin/pando\n\
Private_Dirty: 500 kB\n";
        let range = |address, bytes| MemoryPlace { address, bytes };
        let ram = sums(text, &[range(0x7f00_0000_0000, 1 << 20)]);
        let kib: Vec<u64> = ram.classes().iter().map(|(_, bytes)| bytes >> 10).collect();
        assert_eq!(kib, [32, 16, 12, 0, 1024 - 72, 12]);
        assert_eq!(sums("garbage\n-\n7g-8 x\n", &[]), RamMemory::default());
    }
}
