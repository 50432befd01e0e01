#![forbid(unsafe_code)]
//! Sizes as QEMU reads them: `512M`, `0x1000`, `1.5G`.

/// Reads a size; a number without suffix counts units of `unit` bytes (1, or 1 MiB for `-m`).
///
/// Suffixes are B, K, M, G, T, P, E in either case, powers of 1024. A fraction needs a suffix other
/// than B, is decimal, and is rounded to the nearest byte, as QEMU does. `None` when it is no size
/// or not below 2^64. Blanks and a plus in front are read over, as C's functions do.
pub fn parse(text: &str, unit: u64) -> Option<u64> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
    let text = text.strip_prefix('+').unwrap_or(text);
    let (number, scale) = match text.char_indices().next_back() {
        Some((at, last)) if shift(last, text).is_some() => {
            (&text[..at], 1_u64 << shift(last, text)?)
        }
        Some(_) => (text, unit),
        None => return None,
    };
    if let Some(hex) = strip_hex(number) {
        // A size in hexadecimal has no suffix: `0x1E` is a number.
        return (number.len() == text.len())
            .then(|| u64::from_str_radix(hex, 16).ok())?
            .and_then(|value| value.checked_mul(unit));
    }
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    let is_number = whole.bytes().all(|c| c.is_ascii_digit());
    if !is_number || whole.is_empty() && fraction.is_none_or(str::is_empty) {
        return None;
    }
    let value = match whole {
        "" => 0,
        whole => whole.parse::<u64>().ok()?.checked_mul(scale)?,
    };
    let Some(fraction) = fraction else {
        return Some(value);
    };
    if !fraction.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    if scale == 1 && fraction.bytes().any(|digit| digit != b'0') {
        return None;
    }
    value.checked_add(part(fraction, scale))
}

/// The power of two of a suffix. A hexadecimal number may end in `b` or `e`, which is none then.
fn shift(suffix: char, text: &str) -> Option<u32> {
    let shift = match suffix.to_ascii_uppercase() {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        'P' => 50,
        'E' => 60,
        _ => return None,
    };
    let is_digit = suffix.is_ascii_hexdigit() && strip_hex(text).is_some();
    (!is_digit).then_some(shift)
}

fn strip_hex(text: &str) -> Option<&str> {
    text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))
}

/// The decimal fraction `digits` of `scale`, rounded. Digits behind the 18th count for nothing.
fn part(digits: &str, scale: u64) -> u64 {
    let (mut value, mut weight) = (0_u128, 1_u128);
    for digit in digits.bytes().take(18) {
        value = value * 10 + u128::from(digit - b'0');
        weight *= 10;
    }
    u64::try_from((value * u128::from(scale) + weight / 2) / weight).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        let read = |text| parse(text, 1);
        assert_eq!(read("64M"), Some(64 << 20));
        assert_eq!(read("2g"), Some(2 << 30));
        assert_eq!(read("67109000B"), Some(67_109_000));
        assert_eq!(read("0x1000"), Some(4096));
        assert_eq!(read("0x1b"), Some(27));
        assert_eq!(read("1.5G"), Some(3 << 29));
        assert_eq!(read("0.5K"), Some(512));
        assert_eq!(read("0"), Some(0));
        assert_eq!(read(" +64M"), Some(64 << 20));
        assert_eq!(read(".5G"), Some(1 << 29));
        assert_eq!(read("5."), Some(5));
        assert_eq!(parse("512", 1 << 20), Some(512 << 20));
        assert_eq!(parse("512K", 1 << 20), Some(512 << 10));
        assert_eq!(parse("7E", 1), Some(7 << 60));
        for wrong in [
            "",
            "-1",
            "64X",
            "M",
            "1.5",
            "1.5B",
            "16E",
            "64MB",
            "0x",
            "0x1K",
            "1e3",
            "99999999999999999999",
            "+-1",
            ".",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String, unit in 1_u64..1 << 20) {
            let _ = parse(&text, unit);
        }

        #[test]
        fn numbers_come_back(value: u64) {
            prop_assert_eq!(parse(&value.to_string(), 1), Some(value));
            prop_assert_eq!(parse(&format!("{value:#x}"), 1), Some(value));
        }
    }
}
