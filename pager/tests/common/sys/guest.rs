// UNSAFETY: the tests play another VMM: they map memory, register it with a userfaultfd of their
// own and touch it by raw address.
#![expect(
    unsafe_code,
    reason = "volatile access to memory that somebody else serves"
)]
//! Memory whose owner is not the pager: as a client of a shared pager has it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use memmap2::{Advice, MmapOptions, MmapRaw};
use pando_pager::{ClientRegion, ClientSpec, ImageId, PageCount, PageIndex, PageRange};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

const PAGE: usize = 4096;
const POISON: u64 = 1 << 14;
const WP_ASYNC: u64 = 1 << 15;

/// Registered memory and its userfaultfd. The memory goes first.
pub(crate) struct Guest {
    memory: MmapRaw,
    uffd: Uffd,
}

impl Guest {
    pub(crate) fn new(pages: u64) -> Self {
        Self::with(pages, POISON)
    }

    /// One whose writes are tracked.
    pub(crate) fn tracked(pages: u64) -> Self {
        Self::with(pages, POISON | WP_ASYNC)
    }

    fn with(pages: u64, features: u64) -> Self {
        let length = usize::try_from(pages).unwrap() * PAGE;
        let memory = MmapOptions::new().len(length).map_anon().unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        let memory = MmapRaw::from(memory);
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(FeatureFlags::from_bits_retain(features))
            .create()
            .unwrap();
        let mode = if features & WP_ASYNC == 0 {
            RegisterMode::MISSING
        } else {
            RegisterMode::from_bits_retain(3)
        };
        uffd.register_with_mode(memory.as_mut_ptr().cast(), length, mode)
            .unwrap();
        Self { memory, uffd }
    }

    pub(crate) fn pages(&self) -> u64 {
        (self.memory.len() / PAGE) as u64
    }

    pub(crate) fn base(&self) -> u64 {
        self.memory.as_mut_ptr() as u64
    }

    /// A second descriptor of its userfaultfd.
    pub(crate) fn uffd(&self) -> OwnedFd {
        self.uffd.as_fd().try_clone_to_owned().unwrap()
    }

    /// All of its memory as the first pages of `image`.
    pub(crate) fn region(&self, image: ImageId) -> ClientRegion {
        ClientRegion {
            image,
            address: self.base(),
            pages: PageRange::new(PageIndex::default(), PageCount::new(self.pages())),
        }
    }

    pub(crate) fn spec(&self, image: ImageId) -> ClientSpec {
        ClientSpec::new(self.uffd(), vec![self.region(image)])
    }

    /// Faults that are not answered: what the kernel says of the userfaultfd.
    pub(crate) fn waiting(&self) -> u64 {
        let path = format!("/proc/self/fdinfo/{}", self.uffd.as_raw_fd());
        let text = std::fs::read_to_string(path).unwrap();
        let total = text.lines().find_map(|line| line.strip_prefix("total:"));
        total.unwrap().trim().parse().unwrap()
    }

    fn at(&self, page: u64) -> *mut u8 {
        assert!(page < self.pages());
        let offset = usize::try_from(page).unwrap() * PAGE;
        self.memory.as_mut_ptr().wrapping_add(offset)
    }

    /// All bytes of a page; faults it in.
    pub(crate) fn read_page(&self, page: u64) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        // SAFETY: `at` asserts that the page lies in the mapping; no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(self.at(page), bytes.as_mut_ptr(), PAGE) };
        bytes
    }

    /// Writes the first word of a page; faults it in.
    pub(crate) fn write_word(&self, page: u64, word: u64) {
        // SAFETY: as in `read_page`; pages are aligned for a word.
        unsafe { std::ptr::write_volatile(self.at(page).cast(), word) };
    }

    /// The first byte of a page as a system call reads it: one that cannot be had is an error.
    pub(crate) fn try_read(&self, page: u64) -> io::Result<u8> {
        let mut byte = 0_u8;
        let of = |base: *mut libc::c_void| libc::iovec {
            iov_base: base,
            iov_len: 1,
        };
        let (own, remote) = (of((&raw mut byte).cast()), of(self.at(page).cast()));
        // SAFETY: getpid() cannot fail. The kernel writes one byte to `byte`, which outlives the
        // call, and only reads a byte of this mapping.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &own, 1, &remote, 1, 0) };
        if read == 1 {
            Ok(byte)
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Gives a page back to the kernel.
    pub(crate) fn discard(&self, page: u64) {
        let start = self.at(page).cast();
        // SAFETY: the page lies in the mapping and no reference to it exists.
        let result = unsafe { libc::madvise(start, PAGE, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// Whether a page is there.
    pub(crate) fn is_present(&self, page: u64) -> bool {
        page_map(self.at(page) as u64) >> 63 != 0
    }

    /// Whether a page is there and write-protected: nobody wrote it since it was installed.
    pub(crate) fn is_protected(&self, page: u64) -> bool {
        page_map(self.at(page) as u64) >> 57 & 1 != 0
    }
}

/// What /proc/self/pagemap says of an address.
pub(crate) fn page_map(address: u64) -> u64 {
    let map = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    map.read_exact_at(&mut entry, address / 4096 * 8).unwrap();
    u64::from_le_bytes(entry)
}
