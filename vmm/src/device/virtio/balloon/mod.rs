//! Memory that the guest gives away and takes back (virtio 1.2, 5.5): a balloon, pages that are reported
//! free, and what the guest says of its memory.
//!
//! What is given away is discarded if the discard gate lets it: see [`crate::memory::discard`]. Where it does
//! not, as with a template's memory, the guest has given it away all the same, and nothing is freed.

pub mod backend;
pub mod device;
pub mod request;
pub mod state;
