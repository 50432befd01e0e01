#![forbid(unsafe_code)]
//! The same numbers as the metrics, for the caller of one pager.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What one pager did so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl std::ops::AddAssign for Counts {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }

        /// Counters that the pager thread moves and others read.
        #[derive(Debug, Default)]
        pub(crate) struct Tally {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Tally {
            /// All numbers now; each is right, but not all of one moment.
            pub(crate) fn counts(&self) -> Counts {
                Counts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counts! {
    /// Fault messages.
    faults,
    /// Faults on pages that had to be read.
    faults_data,
    /// Faults on pages without data.
    faults_zero,
    /// Faults on pages that a read under way was going to bring.
    faults_joined,
    /// Faults on pages that were there already.
    faults_stale,
    /// Pages installed without I/O.
    pages_zero,
    /// Pages installed from reads that completed at once.
    pages_cache,
    /// Pages installed from reads that completed later.
    pages_disk,
    /// Pages that were there when they should be installed; their waiters were woken.
    pages_already_present,
    /// Reads of template files.
    reads,
    /// Bytes read.
    bytes_read,
    /// Pages ahead of a walk that the walk went through.
    prefetch_useful,
    /// Pages ahead of a walk that were asked for while they were read.
    prefetch_late,
    /// Pages ahead of a walk that was not seen behind them.
    prefetch_wasted,
    /// Tries repeated, reads and installs.
    retries,
    /// Pages that could not be had.
    poisoned,
    /// Chunks that are not what the index says.
    verify_failures,
    /// Faults that had to wait for a read buffer.
    waits_for_buffer,
    /// Times that the queue was full and messages were left in the kernel.
    waits_for_queue,
}

/// Adds to a counter that only the pager thread writes.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
