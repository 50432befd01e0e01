#![forbid(unsafe_code)]
//! The fixed header in front of a template's binary files: readable by every past and future
//! build, whatever became of the body.
//!
//! | offset | bytes | what                                            |
//! |--------|-------|-------------------------------------------------|
//! | 0      | 8     | magic: which kind of file                       |
//! | 8      | 4     | version of the body                             |
//! | 12     | 4     | length of this header: 32                       |
//! | 16     | 8     | length of the body                              |
//! | 24     | 8     | XXH3-64 of the body                             |
//! | 32     |       | the body                                        |
//!
//! All little-endian; checked in this order, before anybody looks at the body.

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 32;

/// One kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its first bytes.
    pub magic: [u8; 8],
    /// The version of its body that this build writes, and the only one that it reads.
    pub version: u32,
}

/// Why bytes are no file of a kind. The texts say "it" of the file, which the caller names.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// The file ends within its header.
    #[error("it has {actual} bytes, less than its header")]
    TooShort {
        /// Bytes that there are.
        actual: usize,
    },
    /// A file of another kind.
    #[error("it does not begin with the mark of such a file")]
    Magic,
    /// Written by a later build.
    #[error("it has version {found}, and this build reads versions up to {supported}")]
    NewerVersion {
        /// The version in the header.
        found: u32,
        /// The newest that is read here.
        supported: u32,
    },
    /// Written by an earlier build, in a form that is no longer read.
    #[error("it has version {found}, and this build reads versions from {supported} on")]
    OlderVersion {
        /// The version in the header.
        found: u32,
        /// The oldest that is read here.
        supported: u32,
    },
    /// A header of another length.
    #[error("its header claims {found} bytes, not 32")]
    HeaderBytes {
        /// What it claims.
        found: u32,
    },
    /// The body was cut off, or something was appended to it.
    #[error("its header promises {expected} bytes of body and {actual} follow")]
    Length {
        /// Bytes of body that the header promises.
        expected: u64,
        /// Bytes that follow the header.
        actual: u64,
    },
    /// The body changed after it was written.
    #[error("its checksum is {expected:#018x}, its content gives {actual:#018x}")]
    Checksum {
        /// XXH3-64 in the header.
        expected: u64,
        /// XXH3-64 of the body.
        actual: u64,
    },
}

impl Frame {
    /// The bytes of a file with this `body`.
    pub fn encode(self, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend(self.magic);
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(32_u32.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(xxh3_64(body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    /// The body of a file's `bytes`, once the header has been proven against it. What the body
    /// says is for the caller to prove: anybody can make a right header.
    pub fn body(self, bytes: &[u8]) -> Result<&[u8], FrameError> {
        let begin = bytes.len().min(self.magic.len());
        if bytes[..begin] != self.magic[..begin] {
            return Err(FrameError::Magic);
        }
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::TooShort {
                actual: bytes.len(),
            });
        };
        let supported = self.version;
        match u32_at(header, 8) {
            found if found > supported => {
                return Err(FrameError::NewerVersion { found, supported });
            }
            found if found < supported => {
                return Err(FrameError::OlderVersion { found, supported });
            }
            _ => {}
        }
        let found = u32_at(header, 12);
        if found != 32 {
            return Err(FrameError::HeaderBytes { found });
        }
        let (expected, actual) = (u64_at(header, 16), body.len() as u64);
        if actual != expected {
            return Err(FrameError::Length { expected, actual });
        }
        let (expected, actual) = (u64_at(header, 24), xxh3_64(body));
        if actual != expected {
            return Err(FrameError::Checksum { expected, actual });
        }
        Ok(body)
    }
}

fn u32_at(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&header[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(header: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAME: Frame = Frame {
        magic: *b"PANDOXY\0",
        version: 3,
    };

    #[test]
    fn the_bytes_are_those_of_the_table() {
        let mut expected = b"PANDOXY\0\x03\0\0\0\x20\0\0\0\x04\0\0\0\0\0\0\0".to_vec();
        expected.extend(xxh3_64(b"body").to_le_bytes());
        expected.extend(b"body");
        assert_eq!(FRAME.encode(b"body"), expected);
    }

    #[test]
    fn what_is_wrong_is_named_in_the_documented_order() {
        let good = FRAME.encode(b"body");
        assert_eq!(FRAME.body(&good).unwrap(), b"body");
        let error = |bytes: &[u8]| FRAME.body(bytes).unwrap_err();
        for actual in [0, 8, 31] {
            assert_eq!(error(&good[..actual]), FrameError::TooShort { actual });
        }
        assert_eq!(error(b"ELF"), FrameError::Magic);
        // Everything that is checked later is wrong too.
        let mut bytes = vec![0xff; 40];
        bytes[..8].copy_from_slice(b"PANDOXY\0");
        bytes[8..12].copy_from_slice(&[4, 0, 0, 0]);
        let (found, supported) = (4, 3);
        let newer = FrameError::NewerVersion { found, supported };
        assert_eq!(error(&bytes), newer);
        bytes[8] = 2;
        let found = 2;
        let older = FrameError::OlderVersion { found, supported };
        assert_eq!(error(&bytes), older);
        bytes[8] = 3;
        let found = u32::MAX;
        assert_eq!(error(&bytes), FrameError::HeaderBytes { found });
        bytes[12..16].copy_from_slice(&[32, 0, 0, 0]);
        let (expected, actual) = (u64::MAX, 8);
        assert_eq!(error(&bytes), FrameError::Length { expected, actual });
        bytes[16..24].copy_from_slice(&8_u64.to_le_bytes());
        assert!(matches!(error(&bytes), FrameError::Checksum { .. }));
    }

    proptest! {
        #[test]
        fn any_cut_or_flipped_bit_is_refused(
            body: Vec<u8>, at in any::<prop::sample::Index>(), bit in 0..8,
        ) {
            let mut bytes = FRAME.encode(&body);
            prop_assert_eq!(FRAME.body(&bytes).unwrap(), &body);
            let at = at.index(bytes.len());
            prop_assert!(FRAME.body(&bytes[..at]).is_err());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(FRAME.body(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert!(FRAME.body(&bytes).is_err());
        }
    }
}
