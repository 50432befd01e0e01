#![forbid(unsafe_code)]
//! Where entropy comes from.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Most bytes that the kernel gives at once whatever happens (getrandom(2)).
pub const PIECE_BYTES: usize = 256;

/// The kernel's generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entropy;

impl Entropy {
    /// Fills a buffer of at most [`PIECE_BYTES`] bytes; returns how many.
    pub fn fill(self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(PIECE_BYTES);
        let part = buffer.get_mut(..length).unwrap_or_default();
        Ok(getrandom(part, GetRandomFlags::empty())?)
    }
}
