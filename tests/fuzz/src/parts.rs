#![forbid(unsafe_code)]
//! Inputs with a byte in front that says what the rest is.

/// The number of a kind below `kinds`, and what is of it.
pub fn kind(data: &[u8], kinds: u8) -> Option<(u8, &[u8])> {
    let (first, rest) = data.split_first()?;
    Some((first % kinds, rest))
}

/// An input of a kind.
pub fn of(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind], content].concat()
}

/// A header with a right checksum in front of a body: only then does anybody look at that.
pub fn framed(magic: [u8; 8], version: u32, body: &[u8]) -> Vec<u8> {
    pando_pager::image::frame::Frame { magic, version }.encode(body)
}
