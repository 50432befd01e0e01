#![forbid(unsafe_code)]
//! This program's code, mapped once for all forks to come.
//!
//! fork(2) does not copy the page table entries of a file's pages unless the mapping also has a page
//! of its own: a child finds its own code unmapped, and faults some forty times on the way through a
//! start. One page of each mapping that was written (with what it held) makes fork(2) copy the
//! entries of all others, which costs a few microseconds in all.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// What one fault maps at most (`fault_around_bytes` of the kernel), in bytes.
const FAULT_AROUND_BYTES: u64 = 64 << 10;
/// Mappings that are longer than this are left alone, in bytes: no program of ours has any.
const MAX_MAPPING_BYTES: u64 = 256 << 20;

/// A mapping of a file that nobody writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
}

/// Maps all code and constants of this process. What the kernel refuses costs time later and is no
/// error.
pub fn map_for_forks() {
    if let Err(error) = try_map() {
        tracing::debug!(%error, "forks of this process fault their code in");
    }
}

fn try_map() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    // A debugger's way to memory: it writes a private copy of a page that is read-only.
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    for mapping in maps.lines().filter_map(parse) {
        let mut byte = [0];
        let mut at = mapping.start;
        while at < mapping.end {
            memory.read_exact_at(&mut byte, at)?;
            at = (at / FAULT_AROUND_BYTES + 1) * FAULT_AROUND_BYTES;
        }
        memory.read_exact_at(&mut byte, mapping.start)?;
        memory.write_all_at(&byte, mapping.start)?;
    }
    Ok(())
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
    }

    #[test]
    fn the_code_runs_as_before() {
        try_map().unwrap();
        assert_eq!(parse(""), None);
    }
}
