#![forbid(unsafe_code)]
//! Everything that one clone takes: its RAM by class, the rest of its process, page tables, and the
//! kernel's objects.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::ram::{Accuracy, MemoryPlace, RamMemory};
use super::{ProcessMemory, field_bytes};

/// What one clone takes of this host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CloneMemory {
    /// Its RAM, page by page.
    pub ram: RamMemory,
    /// How exactly that is known.
    pub accuracy: Accuracy,
    /// What the rest of its process has alone.
    pub process_private_bytes: u64,
    /// What the rest of its process shares with others: the program, its libraries.
    pub process_shared_bytes: u64,
    /// Page tables of its process.
    pub page_tables_bytes: u64,
    /// What the kernel holds for it: KVM's tables and structures, descriptors, stacks, and the page
    /// tables again. Known of a clone in a cgroup of its own with the memory controller; `None`
    /// otherwise, never a guess.
    pub kernel_bytes: Option<u64>,
}

impl CloneMemory {
    /// Measures process `pid`, whose RAM is at `ranges`, which a pager fills or not, and whose cgroup is `cgroup`, if it has one of
    /// its own. An error when it is gone or may not be looked at.
    pub fn of(
        pid: u32,
        ranges: &[MemoryPlace],
        is_paged: bool,
        cgroup: Option<&Path>,
    ) -> io::Result<Self> {
        let (ram, accuracy) = RamMemory::of(pid, ranges, is_paged)?;
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let all = ProcessMemory::of(pid).ok_or_else(gone)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let all_private = all.private_dirty_bytes + all.private_clean_bytes;
        Ok(Self {
            // Read one after the other while the clone runs: neither difference is below zero.
            process_private_bytes: all_private.saturating_sub(ram.private_bytes()),
            process_shared_bytes: all.shared_bytes.saturating_sub(ram.shared_bytes),
            page_tables_bytes: field_bytes(&status, "VmPTE:"),
            kernel_bytes: cgroup.and_then(kernel_bytes),
            ram,
            accuracy,
        })
    }

    /// What would be free again without this clone, as far as it is known.
    pub fn own_bytes(&self) -> u64 {
        // The kernel's figure has the page tables in it.
        let kernel = self.kernel_bytes.unwrap_or(self.page_tables_bytes);
        self.ram.private_bytes() + self.process_private_bytes + kernel
    }
}

/// `kernel` of a cgroup's memory.stat (Linux 5.18).
fn kernel_bytes(cgroup: &Path) -> Option<u64> {
    let text = fs::read_to_string(cgroup.join("memory.stat")).ok()?;
    stat_field(&text, "kernel")
}

fn stat_field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(field, _)| *field == name)
        .and_then(|(_, value)| value.trim().parse().ok())
}

/// The sum over clones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryTotal {
    /// How many were measured.
    pub clones: u64,
    /// Their RAM.
    pub ram: RamMemory,
    /// What the rest of their processes has alone.
    pub process_private_bytes: u64,
    /// What the rest of their processes shares.
    pub process_shared_bytes: u64,
    /// Their page tables.
    pub page_tables_bytes: u64,
    /// What the kernel holds for them; `None` unless it is known of each.
    pub kernel_bytes: Option<u64>,
    /// The least exact of them; `None` for no clones.
    pub accuracy: Option<Accuracy>,
}

impl MemoryTotal {
    /// Adds up.
    pub fn of<'a>(clones: impl Iterator<Item = &'a CloneMemory>) -> Self {
        let mut total = Self {
            kernel_bytes: Some(0),
            ..Self::default()
        };
        for clone in clones {
            total.clones += 1;
            total.ram.private_dirty_bytes += clone.ram.private_dirty_bytes;
            total.ram.private_clean_bytes += clone.ram.private_clean_bytes;
            total.ram.shared_bytes += clone.ram.shared_bytes;
            total.ram.zero_bytes += clone.ram.zero_bytes;
            total.ram.absent_bytes += clone.ram.absent_bytes;
            total.ram.swapped_bytes += clone.ram.swapped_bytes;
            total.process_private_bytes += clone.process_private_bytes;
            total.process_shared_bytes += clone.process_shared_bytes;
            total.page_tables_bytes += clone.page_tables_bytes;
            total.kernel_bytes = total
                .kernel_bytes
                .zip(clone.kernel_bytes)
                .map(|(a, b)| a + b);
            total.accuracy = total.accuracy.max(Some(clone.accuracy));
        }
        total.kernel_bytes = total.kernel_bytes.filter(|_| total.clones > 0);
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    const MIB: u64 = 1 << 20;

    #[test]
    fn this_process_is_accounted_page_by_page() {
        let mut memory = MmapMut::map_anon(8 << 20).unwrap();
        memory.advise(memmap2::Advice::NoHugePage).unwrap();
        memory[..2 << 20].fill(1);
        for page in 1024..1280 {
            assert_eq!(std::hint::black_box(memory[page * 4096]), 0);
        }
        let range = MemoryPlace {
            address: memory.as_ptr() as u64,
            bytes: 8 * MIB,
        };
        let clone = CloneMemory::of(std::process::id(), &[range], false, None).unwrap();
        assert_eq!(clone.ram.private_dirty_bytes, 2 * MIB);
        assert_eq!(clone.ram.shared_bytes, 0);
        assert_eq!(clone.ram.swapped_bytes, 0);
        match clone.accuracy {
            Accuracy::Sums => assert_eq!(clone.ram.absent_bytes, 6 * MIB),
            _ => {
                assert_eq!(clone.ram.zero_bytes, MIB);
                assert_eq!(clone.ram.absent_bytes, 5 * MIB);
            }
        }
        assert!(clone.process_private_bytes > 0 && clone.page_tables_bytes > 0);
        assert_eq!(clone.kernel_bytes, None, "said to be unknown");
        assert!(clone.own_bytes() >= 2 * MIB);
        CloneMemory::of(u32::MAX, &[range], false, None).unwrap_err();
    }

    #[test]
    fn the_kernels_share_is_the_sum_or_unknown() {
        let text = "anon 4096\nfile 0\nkernel 262144\nkernel_stack 65536\n";
        assert_eq!(stat_field(text, "kernel"), Some(262_144));
        assert_eq!(stat_field("kernel_stack 5\n", "kernel"), None);
        let known = CloneMemory {
            ram: RamMemory::default(),
            accuracy: Accuracy::Exact,
            process_private_bytes: 1,
            process_shared_bytes: 2,
            page_tables_bytes: 3,
            kernel_bytes: Some(4),
        };
        let unknown = CloneMemory {
            kernel_bytes: None,
            accuracy: Accuracy::WrittenUnknown,
            ..known
        };
        assert_eq!(MemoryTotal::of([known, known].iter()).kernel_bytes, Some(8));
        let total = MemoryTotal::of([known, unknown].iter());
        assert_eq!((total.clones, total.kernel_bytes), (2, None));
        assert_eq!(total.accuracy, Some(Accuracy::WrittenUnknown));
        let none = MemoryTotal::of([].iter());
        assert_eq!((none.kernel_bytes, none.accuracy), (None, None));
    }
}
