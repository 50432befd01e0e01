#![forbid(unsafe_code)]
//! Sizes as people type and read them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes that was typed with a unit: `512M`, `5G`, `65536K`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("'{text}' is no size: give a number with K, M, G or T, such as 512M");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &*text[digits.len()..].to_ascii_uppercase() {
            "K" | "KIB" => 10,
            "M" | "MIB" => 20,
            "G" | "GIB" => 30,
            "T" | "TIB" => 40,
            "B" => 0,
            "" if !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit()) => {
                return Err(format!(
                    "'{text}' has no unit: give K, M, G or T, such as {digits}M"
                ));
            }
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number
            .checked_mul(1 << shift)
            .map(Size)
            .ok_or_else(|| format!("'{text}' is more than 2^64 bytes"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&human_bytes(self.0))
    }
}

/// Bytes with the unit that keeps the number short: `640 KiB`, `1.5 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut whole = bytes;
    let mut tenths = 0;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        tenths = whole % 1024 * 10 / 1024;
        whole /= 1024;
        unit += 1;
    }
    if tenths == 0 || whole >= 100 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{tenths} {}", UNITS[unit])
    }
}

/// A duration in microseconds with the unit that keeps the number short.
pub fn human_us(us: f64) -> String {
    if us < 1000.0 {
        format!("{us:.1} us")
    } else if us < 1_000_000.0 {
        format!("{:.2} ms", us / 1e3)
    } else {
        format!("{:.2} s", us / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        assert_eq!("128M".parse(), Ok(Size(128 << 20)));
        assert_eq!("5G".parse(), Ok(Size(5 << 30)));
        assert_eq!("64kib".parse(), Ok(Size(64 << 10)));
        assert_eq!("4096b".parse(), Ok(Size(4096)));
        assert_eq!("0M".parse(), Ok(Size(0)));
        for wrong in ["", "M", "-1M", "1.5G", "12X", "99999999T", "1 G"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
        for (text, hint) in [
            ("128", "such as 128M"),
            ("64M1", "such as 512M"),
            ("", "such as 512M"),
        ] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(error.ends_with(hint), "{error}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(128 << 20), "128 MiB");
        assert_eq!(human_bytes(5 << 30), "5 GiB");
        assert_eq!(human_us(12.34), "12.3 us");
        assert_eq!(human_us(12340.0), "12.34 ms");
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Size>();
        }
    }
}
