// UNSAFETY: pages are put in place by raw address. Source and destination are mappings that the
// functions own or borrow for the call, and every range is checked against their lengths.
#![expect(unsafe_code, reason = "userfaultfd ioctls and memcpy by raw address")]
//! The most that memory can be filled at: what a pager is compared with.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memmap2::{Mmap, MmapMut, MmapOptions, MmapRaw};
use userfaultfd::{Uffd, UffdBuilder};

/// Bytes that one call copies: from here on larger calls gain next to nothing.
pub(crate) const COPY_BYTES: usize = 64 << 10;
/// Bytes that one call fills with the zero page.
pub(crate) const ZERO_BYTES: usize = 256 << 10;

/// A range registered with a userfaultfd; nothing of it is present.
struct Missing {
    // Before the descriptor: it is unmapped first.
    range: MmapRaw,
    uffd: Uffd,
}

impl Missing {
    fn new(bytes: usize) -> Result<Self> {
        let mapping = MmapOptions::new().len(bytes).map_anon()?;
        mapping.advise(memmap2::Advice::NoHugePage)?;
        let range = MmapRaw::from(mapping);
        // Nothing faults here: the right to the kernel's faults is not needed.
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .create()
            .context("cannot get a userfaultfd")?;
        uffd.register(range.as_mut_ptr().cast(), bytes)
            .context("cannot register memory with the userfaultfd")?;
        Ok(Self { range, uffd })
    }
}

/// Time to fill as much memory as `source` has by UFFDIO_COPY.
pub(crate) fn copy(source: &Mmap) -> Result<Duration> {
    let bytes = source.len();
    ensure!(
        bytes.is_multiple_of(COPY_BYTES),
        "{bytes} bytes are no whole calls"
    );
    let missing = Missing::new(bytes)?;
    let begun = Instant::now();
    for offset in (0..bytes).step_by(COPY_BYTES) {
        let from = source.as_ptr().wrapping_add(offset).cast();
        let to = missing.range.as_mut_ptr().wrapping_add(offset).cast();
        // SAFETY: both ranges lie in their mappings, as `offset + COPY_BYTES <= bytes`; the
        // destination is missing, so no reference into it exists.
        unsafe { missing.uffd.copy(from, to, COPY_BYTES, true) }.context("UFFDIO_COPY failed")?;
    }
    Ok(begun.elapsed())
}

/// Time to map the zero page at `bytes` of memory by UFFDIO_ZEROPAGE.
pub(crate) fn zero(bytes: usize) -> Result<Duration> {
    ensure!(
        bytes.is_multiple_of(ZERO_BYTES),
        "{bytes} bytes are no whole calls"
    );
    let missing = Missing::new(bytes)?;
    let begun = Instant::now();
    for offset in (0..bytes).step_by(ZERO_BYTES) {
        let at = missing.range.as_mut_ptr().wrapping_add(offset).cast();
        // SAFETY: the range lies in the mapping, as `offset + ZERO_BYTES <= bytes`, and is missing.
        unsafe { missing.uffd.zeropage(at, ZERO_BYTES, true) }.context("UFFDIO_ZEROPAGE failed")?;
    }
    Ok(begun.elapsed())
}

/// Time to copy all of `source` to memory that is present.
pub(crate) fn memcpy(source: &Mmap, destination: &mut MmapMut) -> Duration {
    let begun = Instant::now();
    for (from, to) in source
        .chunks(COPY_BYTES)
        .zip(destination.chunks_mut(COPY_BYTES))
    {
        to.copy_from_slice(from);
    }
    begun.elapsed()
}

/// Filled, present memory that does not change any more, to copy from.
pub(crate) fn source(bytes: usize) -> Result<Mmap> {
    let mut mapping = MmapOptions::new().len(bytes).map_anon()?;
    mapping.fill(0xa5);
    Ok(mapping.make_read_only()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_fills_memory() {
        let source = source(512 << 10).unwrap();
        assert!(copy(&source).unwrap() > Duration::ZERO);
        assert!(zero(512 << 10).unwrap() > Duration::ZERO);
        let mut destination = MmapMut::map_anon(512 << 10).unwrap();
        assert!(memcpy(&source, &mut destination) > Duration::ZERO);
        assert_eq!(destination[..], source[..]);
        zero(4096).unwrap_err();
    }
}
