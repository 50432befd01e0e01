//! What the benchmarks need of the kernel by hand: memory of a given shape, a VM of the smallest
//! kind, processes, memory that faults.

pub(crate) mod bulk;
pub(crate) mod guest;
pub(crate) mod memory;
pub(crate) mod page_cache;
pub(crate) mod process;
pub(crate) mod touch;
