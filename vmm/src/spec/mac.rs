#![forbid(unsafe_code)]
//! Hardware addresses of network devices.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address of one station.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The first address of those that devices get which were given none, as QEMU has it.
    pub const DEFAULT: Self = Self([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);

    /// An address; `None` where it is a group's, or nobody's.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// Any bytes as an address that somebody here gave out: locally administered, of one station.
    pub fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }

    /// Its bytes in the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The address `number` behind it, of the same vendor; `None` behind the last.
    pub fn plus(self, number: u64) -> Option<Self> {
        let [a, b, c, x, y, z] = self.0;
        let low = u64::from(u32::from_be_bytes([0, x, y, z]));
        let low = u32::try_from(low.checked_add(number)?).ok()?;
        match low.to_be_bytes() {
            [0, x, y, z] => Some(Self([a, b, c, x, y, z])),
            _ => None,
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is no MAC address of one station: six bytes as in 52:54:00:12:34:56")
        };
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut bytes = [0; 6];
        let mut words = text.split(separator);
        for byte in &mut bytes {
            let word = words.next().ok_or_else(wrong)?;
            let is_byte = word.len() == 2 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
            let value = u8::from_str_radix(word, 16).ok();
            *byte = value.filter(|_| is_byte).ok_or_else(wrong)?;
        }
        match words.next() {
            None => Self::new(bytes).ok_or_else(wrong),
            Some(_) => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_address_of_one_station_is_refused() {
        for text in [
            "",
            "zz",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:0:12:34:56",
            "+2:54:00:12:34:56",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            let error = text.parse::<MacAddress>().unwrap_err();
            assert!(error.contains("no MAC address of one station"), "{text}");
        }
    }

    #[test]
    fn addresses_are_counted_within_their_vendor() {
        let plus = |number| MacAddress::DEFAULT.plus(number).map(|mac| mac.to_string());
        assert_eq!(plus(0).as_deref(), Some("52:54:00:12:34:56"));
        assert_eq!(plus(0xaa).as_deref(), Some("52:54:00:12:35:00"));
        assert_eq!(plus(0xff_ffff), None);
        assert_eq!(plus(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn text_is_read_back(bytes: [u8; 6]) {
            let mac = MacAddress::local(bytes);
            prop_assert_eq!(mac.to_string().parse::<MacAddress>().unwrap(), mac);
            prop_assert_eq!(mac.to_string().replace(':', "-").to_uppercase().parse::<MacAddress>().unwrap(), mac);
            prop_assert_eq!(MacAddress::new(mac.bytes()), Some(mac));
            prop_assert_eq!(mac.bytes()[0] & 3, 2);
        }
    }
}
