#![forbid(unsafe_code)]
//! What a kernel's userfaultfd can do.

/// Feature bits of `UFFDIO_API`, as the kernel reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UffdFeatures(pub(super) u64);

impl UffdFeatures {
    pub(super) const MOVE: u64 = 1 << 16;
    pub(super) const WP_ASYNC: u64 = 1 << 15;
    pub(super) const POISON: u64 = 1 << 14;
    const EXACT_ADDRESS: u64 = 1 << 11;
    const MINOR_SHMEM: u64 = 1 << 10;
    const THREAD_ID: u64 = 1 << 8;

    /// All bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// UFFDIO_POISON: an unreadable page raises SIGBUS.
    pub fn poison(self) -> bool {
        self.0 & Self::POISON != 0
    }

    /// UFFDIO_MOVE.
    pub fn move_pages(self) -> bool {
        self.0 & Self::MOVE != 0
    }

    /// Asynchronous write protection, to find written pages without messages.
    pub fn wp_async(self) -> bool {
        self.0 & Self::WP_ASYNC != 0
    }

    /// Minor faults on shared memory, for CONTINUE.
    pub fn minor_shmem(self) -> bool {
        self.0 & Self::MINOR_SHMEM != 0
    }

    /// Fault messages can carry the exact address.
    pub fn exact_address(self) -> bool {
        self.0 & Self::EXACT_ADDRESS != 0
    }

    /// Fault messages can carry the faulting thread.
    pub fn thread_id(self) -> bool {
        self.0 & Self::THREAD_ID != 0
    }
}
