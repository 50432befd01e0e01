#![forbid(unsafe_code)]
//! `state.bin`: everything of the machine that is not RAM, behind a header that every past and
//! future build can read.
//!
//! | offset | bytes | what                                      |
//! |--------|-------|-------------------------------------------|
//! | 0      | 8     | magic `PANDOST\0`                         |
//! | 8      | 4     | format of the body, little-endian         |
//! | 12     | 4     | length of this header (32)                |
//! | 16     | 8     | length of the body                        |
//! | 24     | 8     | XXH3-64 of the body                       |
//!
//! They are checked in this order, and only then is the body (postcard) decoded.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use super::error::TemplateError;
use crate::machine::state::MachineState;

const MAGIC: [u8; 8] = *b"PANDOST\0";
const HEADER_BYTES: usize = 32;
/// The body format that this version writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// Larger than the state of eight vCPUs by far; a bound on what is read into memory.
pub const MAX_FILE_BYTES: u64 = 16 << 20;

/// The file's bytes for a machine state.
pub fn encode(path: &Path, state: &MachineState) -> Result<Vec<u8>, TemplateError> {
    let body = postcard::to_stdvec(state).map_err(|error| {
        TemplateError::damaged(path, format!("state cannot be encoded: {error}"))
    })?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(32_u32.to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(xxh3_64(&body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// Proves the header of `bytes`, then decodes the body.
pub fn decode(path: &Path, bytes: &[u8]) -> Result<MachineState, TemplateError> {
    let damaged = |reason: String| TemplateError::damaged(path, reason);
    let (Some(header), Some(body)) = (bytes.get(..HEADER_BYTES), bytes.get(HEADER_BYTES..)) else {
        return Err(damaged(format!(
            "it has {} bytes, less than its header",
            bytes.len()
        )));
    };
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap_or_default());
    let half = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap_or_default());
    if header[..8] != MAGIC {
        return Err(damaged(
            "it does not begin with the mark of a state file".into(),
        ));
    }
    if half(8) > FORMAT {
        return Err(TemplateError::NewerFormat {
            path: path.to_owned(),
            found: half(8),
            supported: FORMAT,
        });
    }
    if half(12) as usize != HEADER_BYTES {
        return Err(damaged(format!(
            "its header claims {} bytes, not {HEADER_BYTES}",
            half(12)
        )));
    }
    if word(16) != body.len() as u64 {
        return Err(damaged(format!(
            "its header promises {} bytes of state and {} follow",
            word(16),
            body.len()
        )));
    }
    let checksum = xxh3_64(body);
    if word(24) != checksum {
        return Err(damaged(format!(
            "its checksum is {:#018x}, its content gives {checksum:#018x}",
            word(24)
        )));
    }
    postcard::from_bytes(body).map_err(|error| damaged(format!("state cannot be decoded: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path() -> &'static Path {
        Path::new("t/state.bin")
    }

    fn message(bytes: &[u8]) -> String {
        decode(path(), bytes).unwrap_err().to_string()
    }

    /// A body of no meaning behind a header that is right.
    fn framed(body: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(32_u32.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(xxh3_64(body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn each_part_of_the_header_is_checked_in_order() {
        let good = framed(b"body");
        assert!(message(&good[..31]).contains("31 bytes, less than its header"));
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            message(&bytes)
        };
        assert!(with(0, b'X').contains("does not begin with the mark"));
        assert!(with(8, 2).contains("has format 2"));
        assert!(with(12, 33).contains("header claims 33 bytes"));
        assert!(with(16, 5).contains("promises 5 bytes of state and 4 follow"));
        assert!(with(33, 0).contains("its checksum is"));
        assert!(message(&good).contains("state cannot be decoded"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert!(decode(path(), &bytes).is_err());
        }

        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>) {
            let _ = decode(path(), &framed(&body));
        }
    }
}
