//! The kernel's interfaces, each behind a type that cannot be misused: the only unsafe code here.

pub(crate) mod adopt;
pub(crate) mod buffers;
pub(crate) mod discard_map;
pub(crate) mod features;
pub(crate) mod mmap;
pub(crate) mod uring;
pub(crate) mod userfaultfd;
