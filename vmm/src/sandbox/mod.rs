//! What protects this process from its guest, and the guest's neighbours from this process.

pub mod sigbus;
