//! Entropy from the host (virtio 1.2, 5.4): buffers in, random bytes out.
//!
//! It has no state: a clone asks the host like any other machine, so no two clones get the same.

pub mod backend;
pub mod device;
