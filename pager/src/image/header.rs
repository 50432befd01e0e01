#![forbid(unsafe_code)]
//! The fixed header in front of a page index: readable by every past and future build.
//!
//! ```text
//! 0        8         12        16              24               32
//! | magic  | version | zero    | body bytes    | xxh3-64 of body | body ...
//! ```
//! All little-endian; checked in that order.

use xxhash_rust::xxh3::xxh3_64;

use super::ImageError;

const MAGIC: [u8; 8] = *b"PANDOIDX";
const VERSION: u32 = 1;
/// Length of the header in bytes.
pub(super) const HEADER_BYTES: usize = 32;

/// The header in front of `body`.
pub(super) fn encode(body: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[24..].copy_from_slice(&xxh3_64(body).to_le_bytes());
    header
}

/// The body behind the header of `bytes`, once the header has been proven against it.
pub(super) fn body(bytes: &[u8]) -> Result<&[u8], ImageError> {
    let too_short = || ImageError::Length {
        expected: HEADER_BYTES as u64,
        actual: bytes.len() as u64,
    };
    if !bytes.starts_with(&MAGIC) {
        return Err(ImageError::Magic {
            found: bytes[..bytes.len().min(8)].to_vec(),
        });
    }
    let version = u32_at(bytes, 8).ok_or_else(too_short)?;
    if version != VERSION {
        return Err(ImageError::Version {
            found: version,
            supported: VERSION,
        });
    }
    let reserved = u32_at(bytes, 12).ok_or_else(too_short)?;
    let length = u64_at(bytes, 16).ok_or_else(too_short)?;
    let expected = u64_at(bytes, 24).ok_or_else(too_short)?;
    if reserved != 0 {
        return Err(ImageError::Body {
            offset: 0,
            reason: "reserved header field is not zero",
        });
    }
    let body = &bytes[HEADER_BYTES..];
    if body.len() as u64 != length {
        return Err(ImageError::Length {
            expected: length.saturating_add(HEADER_BYTES as u64),
            actual: bytes.len() as u64,
        });
    }
    let actual = xxh3_64(body);
    if actual != expected {
        return Err(ImageError::Checksum { expected, actual });
    }
    Ok(body)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at + 8)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named_in_the_documented_order() {
        let text = |bytes: &[u8]| body(bytes).unwrap_err().to_string();
        let mut whole = encode(b"body").to_vec();
        whole.extend_from_slice(b"body");
        assert_eq!(body(&whole).unwrap(), b"body");
        assert!(text(b"ELF").starts_with("not a page index"));
        assert!(text(b"PANDOIDX").contains("8 bytes where its header says 32"));
        let mut newer = whole.clone();
        newer[8] = 9;
        newer.pop();
        assert!(text(&newer).contains("version 9, this build reads version 1"));
        assert!(text(&whole[..34]).contains("34 bytes where its header says 36"));
        let mut flipped = whole.clone();
        flipped[33] ^= 1;
        assert!(text(&flipped).contains("it was damaged"));
        let mut reserved = whole;
        reserved[12] = 1;
        assert!(text(&reserved).contains("reserved"));
    }
}
