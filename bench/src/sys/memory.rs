// UNSAFETY: guest memory is advised by raw address (`madvise` has no safe wrapper for
// MADV_COLLAPSE). The range is always the one mapping that `GuestMemory` owns.
#![expect(unsafe_code, reason = "advises its own mapping by raw address")]
//! Anonymous memory for a guest, aligned to huge pages.

use std::io;

use anyhow::{Context, Result};
use memmap2::MmapMut;

/// Size and alignment of a huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Anonymous private memory; a fork shares it copy-on-write.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    mapping: MmapMut,
    offset: usize,
    bytes: usize,
}

impl GuestMemory {
    /// Maps memory; nothing of it is present yet.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let bytes = usize::try_from(bytes)?;
        let mapping = bytes
            .checked_add(HUGE_PAGE_BYTES)
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
            .and_then(MmapMut::map_anon)
            .with_context(|| format!("cannot map {bytes} bytes of guest memory"))?;
        let offset = mapping.as_ptr().align_offset(HUGE_PAGE_BYTES);
        Ok(Self {
            mapping,
            offset,
            bytes,
        })
    }

    /// The bytes, while no guest runs on them.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.mapping[self.offset..self.offset + self.bytes]
    }

    /// Makes huge pages of what is filled. Where the kernel cannot, small pages stay, and the error
    /// says why.
    pub(crate) fn collapse(&mut self) -> io::Result<()> {
        let bytes = self.bytes;
        let address = self.as_mut_slice().as_mut_ptr();
        // SAFETY: the range is ours; collapsing changes how it is mapped, not what it holds.
        let done = unsafe { libc::madvise(address.cast(), bytes, libc::MADV_COLLAPSE) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// First address in this process.
    pub(crate) fn host_address(&self) -> u64 {
        self.mapping[self.offset..].as_ptr() as u64
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zero_and_survives_a_collapse() {
        let mut memory = GuestMemory::new(4 << 20).unwrap();
        assert_eq!(memory.host_address() % HUGE_PAGE_BYTES as u64, 0);
        assert!(memory.as_mut_slice().iter().all(|&byte| byte == 0));
        memory.as_mut_slice().fill(7);
        // Whether the kernel has huge pages to give is its affair; the bytes must stay.
        let _ = memory.collapse();
        assert!(memory.as_mut_slice().iter().all(|&byte| byte == 7));
        GuestMemory::new(u64::MAX).unwrap_err();
    }
}
