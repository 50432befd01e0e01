// UNSAFETY: one anonymous mapping is lent out in pieces that the kernel, a reading thread or the
// pager fill. The pool is the only place that makes a `Lease`, and it never lends a chunk twice.
#![expect(unsafe_code, reason = "hands out disjoint slices of one mapping")]
//! The buffers that template reads land in: one mapping, lent in runs of whole chunks.

use std::fmt;
use std::io;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use crate::image::CHUNK_PAGES;
use crate::page::PAGE_BYTES;

/// Bytes of one chunk, the unit of lending.
#[expect(clippy::cast_possible_truncation, reason = "16384 fits")]
const CHUNK_BYTES: usize = (CHUNK_PAGES * PAGE_BYTES) as usize;

/// The memory behind all leases; lives as long as any of them.
struct Arena(MmapRaw);

/// A run of chunks, owned: while it exists nobody else reads or writes those bytes.
pub(crate) struct Lease {
    arena: Arc<Arena>,
    first_chunk: usize,
    chunks: usize,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({}+{} chunks)", self.first_chunk, self.chunks)
    }
}

impl Lease {
    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.chunks * CHUNK_BYTES
    }

    /// First address: for the kernel to write to while the lease is kept.
    pub(super) fn address(&self) -> *mut u8 {
        let offset = self.first_chunk * CHUNK_BYTES;
        self.arena.0.as_mut_ptr().wrapping_add(offset)
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the pool lends chunks inside the arena, each to one lease at a time, and the
        // arena outlives the lease. Whoever gives the address to the kernel keeps the lease to
        // itself until the read is done, so nothing writes while this slice lives.
        unsafe { std::slice::from_raw_parts(self.address(), self.len()) }
    }

    /// The bytes, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; `&mut self` makes the slice the only one.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len()) }
    }
}

/// Lends chunks of one arena; bounded by its size.
pub(crate) struct BufferPool {
    arena: Arc<Arena>,
    lent: Vec<bool>,
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lent = self.lent.iter().filter(|&&lent| lent).count();
        write!(f, "BufferPool({lent} of {} chunks lent)", self.lent.len())
    }
}

impl BufferPool {
    /// Maps room for `chunks` chunks, at least one.
    pub(crate) fn new(chunks: usize) -> io::Result<Self> {
        let chunks = chunks.max(1);
        let memory = MmapOptions::new().len(chunks * CHUNK_BYTES).map_anon()?;
        Ok(Self {
            arena: Arc::new(Arena(MmapRaw::from(memory))),
            lent: vec![false; chunks],
        })
    }

    /// Most chunks that one lease can have.
    pub(crate) fn capacity(&self) -> usize {
        self.lent.len()
    }

    /// The longest free run of at most `chunks`, at least one; `None` when all are lent.
    pub(crate) fn lend(&mut self, chunks: usize) -> Option<Lease> {
        let (mut best, mut run) = ((0, 0), 0);
        for (at, &lent) in self.lent.iter().enumerate() {
            run = if lent { 0 } else { run + 1 };
            if run > best.1 {
                best = (at + 1 - run, run);
            }
            if run >= chunks {
                break;
            }
        }
        let (first_chunk, chunks) = best;
        self.lent
            .get_mut(first_chunk..first_chunk + chunks)?
            .fill(true);
        (chunks > 0).then(|| Lease {
            arena: Arc::clone(&self.arena),
            first_chunk,
            chunks,
        })
    }

    /// Takes a lease back.
    #[expect(clippy::needless_pass_by_value, reason = "the lease must end here")]
    pub(crate) fn take_back(&mut self, lease: Lease) {
        if Arc::ptr_eq(&lease.arena, &self.arena) {
            let end = lease.first_chunk + lease.chunks;
            if let Some(lent) = self.lent.get_mut(lease.first_chunk..end) {
                lent.fill(false);
            }
        }
    }

    /// Whole arena for registration with a ring.
    pub(super) fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.arena.0.as_mut_ptr().cast(),
            iov_len: self.arena.0.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn leases_never_overlap(steps in prop::collection::vec((1usize..6, any::<bool>()), 1..60)) {
            let mut pool = BufferPool::new(12).unwrap();
            let mut held: Vec<(u8, Lease)> = Vec::new();
            for (mark, (chunks, give)) in (0u8..).zip(steps) {
                if give && !held.is_empty() {
                    let (mark, lease) = held.swap_remove(0);
                    prop_assert!(lease.bytes().iter().all(|&byte| byte == mark));
                    pool.take_back(lease);
                } else if let Some(mut lease) = pool.lend(chunks) {
                    prop_assert!(lease.len() <= chunks * CHUNK_BYTES);
                    lease.bytes_mut().fill(mark);
                    held.push((mark, lease));
                }
            }
            let lent: usize = held.iter().map(|(_, lease)| lease.chunks).sum();
            prop_assert_eq!(pool.lent.iter().filter(|&&lent| lent).count(), lent);
        }
    }

    #[test]
    fn a_full_pool_lends_nothing_and_a_short_run_is_better_than_none() {
        let mut pool = BufferPool::new(4).unwrap();
        let first = pool.lend(3).unwrap();
        let second = pool.lend(3).unwrap();
        assert_eq!((first.chunks, second.chunks), (3, 1));
        assert!(pool.lend(1).is_none());
        pool.take_back(first);
        assert_eq!(pool.lend(9).unwrap().chunks, 3);
    }
}
