//! A disk (virtio 1.2, 5.2): reads, writes, flushes, discards and zeroes of a raw image.
//!
//! [`device`] answers the guest, [`request`] is what it asks, [`backend`] is the image, of which
//! [`layer`] is one kind: what a clone writes over an image that it shares with others. `flight` is how
//! several requests are under way at once. A [`document`] is a disk that tells a clone who it is.

pub mod backend;
pub mod device;
pub mod document;
mod flight;
pub mod layer;
pub mod request;
pub mod state;
