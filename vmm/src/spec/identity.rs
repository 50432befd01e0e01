#![forbid(unsafe_code)]
//! Who a machine is: its name, its UUID, and what SMBIOS tells its guest of the system.

use std::fmt;
use std::str::FromStr;

use super::error::SpecError;

/// Most bytes of all texts of the system together, each with its end.
pub const MAX_SYSTEM_TEXT_BYTES: usize = 0xf000;

/// A UUID in the order of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uuid(pub [u8; 16]);

impl FromStr for Uuid {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let bytes = text.as_bytes();
        let dashes = [8, 13, 18, 23];
        if bytes.len() != 36 || dashes.iter().any(|&at| bytes[at] != b'-') {
            return Err(());
        }
        let digits: Vec<u8> = (0..36)
            .filter(|at| !dashes.contains(at))
            .filter_map(|at| char::from(bytes[at]).to_digit(16))
            .filter_map(|digit| u8::try_from(digit).ok())
            .collect();
        if digits.len() != 32 {
            return Err(());
        }
        let mut uuid = [0; 16];
        for (byte, pair) in uuid.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(uuid))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What SMBIOS says of the system. Empty texts are not there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SystemTexts {
    /// Who made it.
    pub manufacturer: String,
    /// What it is called.
    pub product: String,
    /// Its version.
    pub version: String,
    /// Its serial number.
    pub serial: String,
    /// Its stock keeping unit.
    pub sku: String,
    /// Its family.
    pub family: String,
}

impl SystemTexts {
    /// All of them, in the order of their fields.
    pub fn all(&self) -> [&str; 6] {
        [
            &self.manufacturer,
            &self.product,
            &self.version,
            &self.serial,
            &self.sku,
            &self.family,
        ]
    }

    /// Length of all texts with their ends, in bytes.
    pub fn bytes(&self) -> usize {
        self.all().iter().map(|text| text.len() + 1).sum()
    }
}

/// Who a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Its name, for monitors.
    pub name: Option<String>,
    /// Its UUID, for monitors and the guest.
    pub uuid: Option<Uuid>,
    /// What else the guest is told of the system.
    pub system: Option<SystemTexts>,
}

impl Identity {
    /// Whether the guest is told anything.
    pub fn tells_guest(&self) -> bool {
        self.uuid.is_some() || self.system.is_some()
    }

    pub(super) fn check(&self) -> Result<(), SpecError> {
        let Some(system) = &self.system else {
            return Ok(());
        };
        if let Some(text) = system.all().into_iter().find(|text| text.contains('\0')) {
            let text = text.to_owned();
            return Err(SpecError::SystemTextZero { text });
        }
        match system.bytes() {
            bytes if bytes > MAX_SYSTEM_TEXT_BYTES => Err(SpecError::SystemTexts { bytes }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts_that_smbios_cannot_hold_are_refused() {
        let check = |serial: String| {
            let system = Some(SystemTexts {
                serial,
                ..SystemTexts::default()
            });
            Identity {
                system,
                ..Identity::default()
            }
            .check()
            .map_err(|error| error.to_string())
        };
        assert_eq!(check("S1".into()), Ok(()));
        assert!(check("S\0".into()).unwrap_err().contains("zero byte"));
        let text = check("x".repeat(MAX_SYSTEM_TEXT_BYTES)).unwrap_err();
        assert!(
            text.contains("have 61446 bytes together, the most is 61440"),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn uuids_come_back(bytes: [u8; 16]) {
            prop_assert_eq!(Uuid(bytes).to_string().parse(), Ok(Uuid(bytes)));
        }

        #[test]
        fn no_text_is_misread(text: String) {
            if let Ok(uuid) = text.parse::<Uuid>() {
                prop_assert_eq!(uuid.to_string(), text.to_lowercase());
            }
        }
    }
}
