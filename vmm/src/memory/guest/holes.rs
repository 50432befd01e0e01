#![forbid(unsafe_code)]
//! Where memory that is a file has nothing.

use std::ops::Range;

use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;

use super::{GuestRam, RamBacking};

/// `TMPFS_MAGIC` of `linux/magic.h`, which memfds have as well.
const TMPFS: u64 = 0x0102_1994;

impl RamBacking {
    /// The first bytes from `offset_bytes` on that can be other than zero; `None` where there are none.
    ///
    /// Looked for only where to read a hole is to have memory for it from then on: in files that are memory
    /// (tmpfs, memfd). There the file knows at once what is written to its mapping, unlike elsewhere.
    fn next_data(&self, offset_bytes: u64) -> Option<Range<u64>> {
        let all = offset_bytes..self.bytes();
        let Self::Shared(shared) = self else {
            return Some(all);
        };
        let file = shared.file.file();
        let is_memory = fstatfs(file).is_ok_and(|facts| u64::try_from(facts.f_type) == Ok(TMPFS));
        if !is_memory {
            return Some(all);
        }
        let start = shared.file.start();
        let find = |from: SeekFrom| seek(file, from).map(|at| at.saturating_sub(start));
        match find(SeekFrom::Data(start.saturating_add(offset_bytes))) {
            Ok(first) => match find(SeekFrom::Hole(start.saturating_add(first))) {
                Ok(end) => Some(first..end),
                Err(_) => Some(first..all.end),
            },
            // Nothing but a hole to its end.
            Err(Errno::NXIO) => None,
            Err(_) => Some(all),
        }
    }
}

impl GuestRam {
    /// The first bytes of a backend from `offset_bytes` on that can be other than zero, without having memory
    /// for those before them; `None` where there are none. They may end behind the backend.
    pub fn next_data(&self, backend: usize, offset_bytes: u64) -> Option<Range<u64>> {
        let data = self
            .view()
            .backings()
            .get(backend)?
            .next_data(offset_bytes)?;
        (!data.is_empty()).then_some(data)
    }
}
