#![forbid(unsafe_code)]
//! What processes cost, as the kernel accounts it.

pub mod clone;
pub mod marginal;
pub mod ram;

use std::fs;

use serde::Serialize;

/// Memory of one process in bytes, from `/proc/PID/smaps_rollup` (proc(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ProcessMemory {
    /// Resident, whoever shares it.
    pub resident_bytes: u64,
    /// Resident, shared pages divided by their number of users.
    pub proportional_bytes: u64,
    /// Only this process has it, and it was written.
    pub private_dirty_bytes: u64,
    /// Only this process has it, and it equals what is on disk.
    pub private_clean_bytes: u64,
    /// Other processes have it too.
    pub shared_bytes: u64,
}

impl ProcessMemory {
    /// Measures a process; `None` when it is gone.
    pub fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        Some(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let bytes = |name: &str| field_bytes(text, name);
        Self {
            resident_bytes: bytes("Rss:"),
            proportional_bytes: bytes("Pss:"),
            private_dirty_bytes: bytes("Private_Dirty:"),
            private_clean_bytes: bytes("Private_Clean:"),
            shared_bytes: bytes("Shared_Clean:") + bytes("Shared_Dirty:"),
        }
    }
}

/// `MemAvailable` of `/proc/meminfo` in bytes.
pub fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    Some(field_bytes(&text, "MemAvailable:"))
}

/// `MemTotal` of `/proc/meminfo` in bytes.
pub fn total_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    Some(field_bytes(&text, "MemTotal:"))
}

fn field_bytes(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory() {
        let memory = ProcessMemory::of(std::process::id()).unwrap();
        assert!(memory.private_dirty_bytes > 0);
        assert!(memory.resident_bytes >= memory.private_dirty_bytes);
        assert!(available_bytes().unwrap() < total_bytes().unwrap());
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "Rss: 12 kB\nPss: 8 kB\nPss_Dirty: 4 kB\nPrivate_Dirty: 4 kB\nPrivate_Clean: 1 kB\n\
                    Shared_Clean: 2 kB\nShared_Dirty: 1 kB\n";
        let memory = ProcessMemory::parse(text);
        assert_eq!(memory.proportional_bytes, 8 << 10);
        assert_eq!(memory.shared_bytes, 3 << 10);
        assert_eq!(ProcessMemory::of(u32::MAX), None);
    }
}
