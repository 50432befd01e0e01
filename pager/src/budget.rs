#![forbid(unsafe_code)]
//! Every limit of a pager that a caller can choose, by name. The fixed ones stand where they are
//! enforced: [`crate::install`] (tries of one install), [`crate::retry`] (tries of one read).

/// What one shard of a pager may use. Each limit has a counter or a gauge that shows when it is reached; see
/// `pando_pager_limit_hits_total`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Read buffers in chunks of 16 KiB, and with that the most reads in flight. The memory is
    /// pinned once a shard has made some reads. Reached: faults wait for a buffer (`limit="buffers"`).
    pub read_chunks: usize,
    /// Faults of one client that wait for bytes; at least 64, as many as one read takes. Reached:
    /// further ones stay in the kernel's queue until there is room (`limit="queue"`); their
    /// deadline starts when they are taken from there.
    pub waiting_faults: usize,
    /// Pages that one fault of a walk through data may install, the one asked for included.
    pub data_window_pages: u64,
    /// The same for pages without data. They cost no memory but their page tables.
    pub zero_window_pages: u64,
    /// Most clients of one shard.
    pub clients: usize,
    /// Most reads in flight for one client: the others find a buffer whatever it does.
    pub client_reads: usize,
    /// Most reads in flight for pages that nobody asked for yet. None is started while anybody waits
    /// for a read to start.
    pub ahead_reads: usize,
    /// Most pages that one client has brought by plan.
    pub ahead_pages: u64,
    /// Threads that read what is not in the page cache, where io_uring is refused.
    pub read_threads: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            read_chunks: 16,
            waiting_faults: 1024,
            data_window_pages: 16,
            zero_window_pages: 64,
            clients: 1,
            client_reads: usize::MAX,
            ahead_reads: 4,
            ahead_pages: 1 << 18,
            read_threads: 2,
        }
    }
}

impl Budget {
    /// What a shard of a shared pager may use, unless it is told otherwise.
    pub fn shared() -> Self {
        Self {
            read_chunks: 64,
            waiting_faults: 128,
            clients: 4096,
            client_reads: 32,
            ahead_reads: 16,
            ..Self::default()
        }
    }
}
