#![forbid(unsafe_code)]
//! `state.bin`: everything of the machine that is not RAM, behind the header that all binary files
//! of a template have ([`pando_pager::image::frame`]), with the magic `PANDOST\0`.
//!
//! The header is proven, and only then is the body (postcard) decoded.

use std::path::Path;

use pando_pager::image::frame::{Frame, FrameError};

use super::error::TemplateError;
use crate::machine::state::MachineState;

/// The body format that this version writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
const FRAME: Frame = Frame {
    magic: *b"PANDOST\0",
    version: FORMAT,
};
/// Larger than the state of eight vCPUs by far; a bound on what is read into memory.
pub const MAX_FILE_BYTES: u64 = 16 << 20;

/// The file's bytes for a machine state.
pub fn encode(path: &Path, state: &MachineState) -> Result<Vec<u8>, TemplateError> {
    let body = postcard::to_stdvec(state).map_err(|error| {
        TemplateError::damaged(path, format!("state cannot be encoded: {error}"))
    })?;
    Ok(FRAME.encode(&body))
}

/// Proves the header of `bytes`, then decodes the body.
pub fn decode(path: &Path, bytes: &[u8]) -> Result<MachineState, TemplateError> {
    let damaged = |reason: String| TemplateError::damaged(path, reason);
    let body = FRAME.body(bytes).map_err(|error| match error {
        FrameError::NewerVersion { found, supported } => TemplateError::NewerFormat {
            path: path.to_owned(),
            found,
            supported,
        },
        FrameError::Magic => damaged("it does not begin with the mark of a state file".into()),
        FrameError::Length { expected, actual } => damaged(format!(
            "its header promises {expected} bytes of state and {actual} follow"
        )),
        FrameError::TooShort { .. }
        | FrameError::OlderVersion { .. }
        | FrameError::HeaderBytes { .. }
        | FrameError::Checksum { .. } => damaged(error.to_string()),
    })?;
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

    #[test]
    fn each_part_of_the_header_is_checked_in_order() {
        let good = FRAME.encode(b"body");
        assert!(message(&good[..31]).contains("31 bytes, less than its header"));
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            message(&bytes)
        };
        assert!(with(0, b'X').contains("does not begin with the mark"));
        assert!(with(8, 2).contains("has format 2"));
        assert!(with(8, 0).contains("is damaged: it has version 0"));
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
            let _ = decode(path(), &FRAME.encode(&body));
        }
    }
}
