#![forbid(unsafe_code)]
//! The digest of a RAM file: SHA-256 over what it holds, leaving out what is zero.
//!
//! For each chunk with data, in ascending order, the digest takes in the chunk's offset as a
//! little-endian 64-bit integer and then its bytes; last comes the length of the file. A hole and
//! a run of zero bytes therefore count the same, and a sparse file of many GiB is digested in the
//! time that its data takes.

use pando_pager::ByteOffset;
use sha2::{Digest, Sha256};

/// A digest in the making.
#[derive(Debug, Default)]
pub struct SparseDigest {
    hash: Sha256,
}

impl SparseDigest {
    /// Takes in one chunk that has data; chunks come in ascending order.
    pub fn chunk(&mut self, offset: ByteOffset, bytes: &[u8]) {
        self.hash.update(offset.get().to_le_bytes());
        self.hash.update(bytes);
    }

    /// The digest of a file of `file_bytes` bytes, as `sha256-sparse:` and 64 hex digits.
    pub fn finish(mut self, file_bytes: u64) -> String {
        self.hash.update(file_bytes.to_le_bytes());
        format!("sha256-sparse:{}", hex(&self.hash.finalize()))
    }
}

/// SHA-256 of plain bytes, as `sha256:` and 64 hex digits.
pub fn of_bytes(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_digest_is_what_sha256sum_prints() {
        assert_eq!(
            of_bytes(b"aspen"),
            "sha256:24fa74107107be23919a666f108522cef177e886397714156dd0a36e6aef9f7a"
        );
    }

    #[test]
    fn place_content_and_length_all_count() {
        let digest = |offset, bytes: &[u8], length| {
            let mut digest = SparseDigest::default();
            digest.chunk(ByteOffset::new(offset), bytes);
            digest.finish(length)
        };
        let base = digest(0, b"data", 8192);
        assert_eq!(base, digest(0, b"data", 8192));
        assert_ne!(base, digest(4096, b"data", 8192));
        assert_ne!(base, digest(0, b"date", 8192));
        assert_ne!(base, digest(0, b"data", 12288));
    }
}
