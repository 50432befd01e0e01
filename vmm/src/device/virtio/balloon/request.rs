#![forbid(unsafe_code)]
//! What the guest puts into a balloon's queues (virtio 1.2, 5.5.6). All of it is the guest's word.

use super::backend::{STATS, Stats};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;
use crate::memory::layout::PAGE_BYTES;

/// Most pages of one request that are looked at: 64 MiB. Linux names 256 at once.
pub(super) const MAX_PAGES: usize = 16 << 10;
/// Bytes of a page's number.
const NUMBER_BYTES: usize = 4;
/// Bytes of one statistic: a tag and a value, without padding.
const STAT_BYTES: usize = 10;
/// Most statistics of one request that are looked at.
const MAX_STATS: usize = 64;

/// A run of guest memory, whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First guest physical address.
    pub(super) guest_address: u64,
    /// How many pages.
    pub(super) pages: u64,
}

impl Run {
    /// Length in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }
}

/// The pages that a request names by number, as runs in ascending order, each page once.
pub(super) fn pages(request: &Chain, ram: &GuestRam) -> Vec<Run> {
    let most = MAX_PAGES * NUMBER_BYTES;
    let length = usize::try_from(request.readable_bytes()).map_or(most, |length| length.min(most));
    let mut bytes = vec![0; length];
    if request.read(ram, 0, &mut bytes).is_err() {
        // Memory that the guest has not: nothing was named.
        return Vec::new();
    }
    let (numbers, _) = bytes.as_chunks::<NUMBER_BYTES>();
    let mut numbers: Vec<u32> = numbers
        .iter()
        .map(|number| u32::from_le_bytes(*number))
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<Run> = Vec::new();
    for number in numbers {
        let guest_address = u64::from(number) * PAGE_BYTES;
        match runs.last_mut() {
            Some(run) if run.guest_address + run.bytes() == guest_address => run.pages += 1,
            _ => runs.push(Run {
                guest_address,
                pages: 1,
            }),
        }
    }
    runs
}

/// The whole pages of the memory that a request has for the device: those are free. In ascending order, and what
/// is named twice once: a request is never more work than there is memory.
pub(super) fn free(request: &Chain) -> Vec<Run> {
    let named = request.writable().filter_map(|(address, bytes)| {
        let start = address.checked_next_multiple_of(PAGE_BYTES)?;
        let end = address.checked_add(bytes.into())? / PAGE_BYTES * PAGE_BYTES;
        let pages = end.checked_sub(start)? / PAGE_BYTES;
        (pages > 0).then_some(Run {
            guest_address: start,
            pages,
        })
    });
    let mut all: Vec<Run> = named.collect();
    all.sort_unstable_by_key(|run| run.guest_address);
    let mut runs: Vec<Run> = Vec::new();
    for run in all {
        let end = run.guest_address + run.bytes();
        match runs.last_mut() {
            Some(last) if run.guest_address < last.guest_address + last.bytes() => {
                let last_end = last.guest_address + last.bytes();
                last.pages = (last_end.max(end) - last.guest_address) / PAGE_BYTES;
            }
            _ => runs.push(run),
        }
    }
    runs
}

/// What a request says of the guest's memory; a statistic that nobody knows is left out.
pub(super) fn stats(request: &Chain, ram: &GuestRam) -> Option<Stats> {
    let most = MAX_STATS * STAT_BYTES;
    let length = usize::try_from(request.readable_bytes()).map_or(most, |length| length.min(most));
    let mut bytes = vec![0; length];
    request.read(ram, 0, &mut bytes).ok()?;
    let mut stats = Stats::default();
    let (all, _) = bytes.as_chunks::<STAT_BYTES>();
    for [a, b, value @ ..] in all {
        let tag = usize::from(u16::from_le_bytes([*a, *b]));
        if let Some(stat) = stats.values.get_mut(tag).filter(|_| tag < STATS.len()) {
            *stat = Some(u64::from_le_bytes(*value));
        }
    }
    Some(stats)
}
