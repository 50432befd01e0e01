// UNSAFETY: one ioctl that no crate has, PAGEMAP_SCAN. It only reads the page tables of a process
// and writes what it found to two buffers that are borrowed for the call.
#![expect(unsafe_code, reason = "raw ioctl on /proc/PID/pagemap")]
//! `/proc/PID/pagemap`: what each page of a process is.
//!
//! PAGEMAP_SCAN (Linux 6.7) finds runs of pages by category and knows the zero page; the file's own
//! entries (all kernels) know whether a page is mapped by this process alone. Neither changes
//! anything: the flag that write-protects what it finds is never set.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

/// Size of a page.
pub const PAGE_BYTES: u64 = 4096;
const ENTRY_BYTES: usize = 8;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    runs: u64,
    runs_length: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A run of pages of the same categories; `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first page.
    pub start: u64,
    /// Address behind the last page.
    pub end: u64,
    /// What the pages are.
    pub categories: Categories,
}

impl PageRun {
    /// Length.
    pub fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: u64 = 3 << 30 | (size_of::<ScanArgs>() as u64) << 16 | 0x66 << 8 | 16;

const _: () = assert!(size_of::<ScanArgs>() == 96);
const _: () = assert!(size_of::<PageRun>() == 24);
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// What pages are, as PAGEMAP_SCAN says it.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The range is registered for asynchronous write protection: [`Self::WRITTEN`] means something.
    pub const WRITE_TRACKED: Self = Self(1 << 0);
    /// Not write-protected: written since it was protected, or never protected.
    pub const WRITTEN: Self = Self(1 << 1);
    /// Backed by a file.
    pub const FILE: Self = Self(1 << 2);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// In swap, under migration, or poisoned.
    pub const SWAPPED: Self = Self(1 << 4);
    /// The zero page.
    pub const ZERO: Self = Self(1 << 5);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in it.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Which pages a scan is to find.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// They are all of this.
    pub all: Categories,
    /// And none of this.
    pub none: Categories,
    /// And at least one of this, if it has any.
    pub any: Categories,
    /// What is told about them.
    pub tell: Categories,
}

/// One page as an entry of the file says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    #[cfg(test)]
    pub(super) fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// In memory.
    pub fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// Not in memory, and not nothing: in swap space, or on its way to another place.
    pub fn is_swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// This process's own, and not a file's: whatever holds it now.
    pub fn is_own_copy(self) -> bool {
        (self.is_present() || self.is_swapped()) && !self.is_of_file()
    }

    /// Mapped by this process and no other.
    pub fn is_exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// Of a file, or shared memory: not this process's own copy.
    pub fn is_of_file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }
}

/// The page map of one process, open.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens that of a process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { file })
    }

    /// Opens that of this process.
    pub fn of_self() -> io::Result<Self> {
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self { file })
    }

    /// Whether this kernel has PAGEMAP_SCAN: asked by scanning nothing.
    pub fn can_scan(&self) -> io::Result<bool> {
        let query = Query {
            all: Categories::PRESENT,
            tell: Categories::PRESENT,
            ..Query::default()
        };
        match self.scan(0..PAGE_BYTES, query, &mut [PageRun::default()]) {
            Ok(_) => Ok(true),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NOTTY | Errno::INVAL) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Puts what it finds in `range`, in ascending order, into `runs`. Returns how many it found
    /// and the address at which to go on: the end of the range, unless `runs` was too short.
    pub fn scan(
        &self,
        range: Range<u64>,
        query: Query,
        runs: &mut [PageRun],
    ) -> io::Result<(usize, u64)> {
        let mut args = ScanArgs {
            size: size_of::<ScanArgs>() as u64,
            flags: 0,
            start: range.start,
            end: range.end,
            walk_end: 0,
            runs: runs.as_mut_ptr() as u64,
            runs_length: runs.len() as u64,
            max_pages: 0,
            category_inverted: query.none.0,
            category_mask: query.all.0 | query.none.0,
            category_anyof_mask: query.any.0,
            return_mask: query.tell.0,
        };
        // SAFETY: `args` has the layout of `struct pm_scan_arg` (asserted above) and lives through
        // the call. The kernel writes at most `runs.len()` regions to `runs`, whose elements have
        // the layout of `struct page_region` (asserted above) and are plain integers. Without
        // PM_SCAN_WP_MATCHING it changes no page.
        let found = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut args) };
        match usize::try_from(found) {
            Ok(found) => Ok((found.min(runs.len()), args.walk_end)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Reads the entries of the pages from `address` on; returns how many there are, which is fewer
    /// than `entries` has room for at the end of the address space.
    pub fn entries(&self, address: u64, entries: &mut [Entry]) -> io::Result<usize> {
        let mut bytes = vec![0_u8; entries.len() * ENTRY_BYTES];
        let offset = address / PAGE_BYTES * ENTRY_BYTES as u64;
        let mut filled = 0;
        while filled < bytes.len() {
            match self
                .file
                .read_at(&mut bytes[filled..], offset + filled as u64)
            {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
        let whole = bytes[..filled].chunks_exact(ENTRY_BYTES);
        let count = whole.len();
        for (entry, chunk) in entries.iter_mut().zip(whole) {
            let mut number = [0; ENTRY_BYTES];
            number.copy_from_slice(chunk);
            *entry = Entry(u64::from_ne_bytes(number));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    const ANY: Query = Query {
        all: Categories::NONE,
        none: Categories::NONE,
        any: Categories::PRESENT.and(Categories::SWAPPED),
        tell: Categories::PRESENT.and(Categories::ZERO),
    };

    #[test]
    fn written_zero_and_absent_pages_are_told_apart() {
        let map = Pagemap::of_self().unwrap();
        if !map.can_scan().unwrap() {
            return;
        }
        let mut memory = MmapMut::map_anon(8 * 4096).unwrap();
        // Without huge pages, one touch is one page.
        memory.advise(memmap2::Advice::NoHugePage).unwrap();
        memory[4096] = 1;
        memory[2 * 4096] = 1;
        assert_eq!(std::hint::black_box(memory[5 * 4096]), 0);
        let start = memory.as_ptr() as u64;
        let mut runs = [PageRun::default(); 4];
        let (found, end) = map.scan(start..start + 8 * 4096, ANY, &mut runs).unwrap();
        let seen: Vec<_> = runs[..found]
            .iter()
            .map(|run| {
                let page = (run.start - start) / PAGE_BYTES;
                (
                    page,
                    run.bytes() / PAGE_BYTES,
                    run.categories.has(Categories::ZERO),
                )
            })
            .collect();
        assert_eq!(seen, [(1, 2, false), (5, 1, true)]);
        assert_eq!(end, start + 8 * 4096);
        let end = start + 8 * 4096;
        let (found, next) = map.scan(start..end, ANY, &mut runs[..1]).unwrap();
        assert_eq!(found, 1);
        let (found, next) = map.scan(next..end, ANY, &mut runs[..1]).unwrap();
        assert_eq!((found, next), (1, end), "it said where to go on");
        assert_eq!(runs[0].start, start + 5 * 4096);
        let mut entries = [Entry::default(); 8];
        assert_eq!(map.entries(start, &mut entries).unwrap(), 8);
        assert!(entries[1].is_present() && entries[1].is_exclusive());
        assert!(!entries[0].is_present());
        assert!(!entries[5].is_exclusive(), "the zero page is everybody's");
    }

    #[test]
    fn a_process_that_is_gone_has_no_map() {
        Pagemap::of(u32::MAX).unwrap_err();
    }
}
