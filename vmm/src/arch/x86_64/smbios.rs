#![forbid(unsafe_code)]
//! The SMBIOS tables, for machines that say who they are: the system (type 1) and the end (type 127),
//! behind a 64-bit entry point where guests without EFI look for it (DSP0134 3.0, 5.2.2).

use super::layout::{RESET_VECTOR_ADDRESS, SMBIOS_ADDRESS};
use crate::memory::guest::{GuestMemoryError, GuestRam};
use crate::spec::{Identity, MAX_SYSTEM_TEXT_BYTES, SystemTexts, Uuid};

/// Length of the entry point in bytes.
const ENTRY_BYTES: u64 = 24;
/// Where the UUID is in the system's structure, which comes first.
const UUID_OFFSET: u64 = 8;
// The tables end before the reset vector.
const _: () = assert!(SMBIOS_ADDRESS + MAX_SYSTEM_TEXT_BYTES as u64 + 0x100 < RESET_VECTOR_ADDRESS);

/// Writes the tables of a machine that says who it is; nothing for one that does not.
pub fn write(ram: &GuestRam, identity: &Identity) -> Result<(), GuestMemoryError> {
    if !identity.tells_guest() {
        return Ok(());
    }
    let system = identity.system.clone().unwrap_or_default();
    let Uuid(uuid) = identity.uuid.unwrap_or_default();
    ram.write(SMBIOS_ADDRESS, &tables(SMBIOS_ADDRESS, &system, uuid))
}

/// Gives the system another UUID, where [`write()`] has written tables.
pub fn write_uuid(ram: &GuestRam, uuid: Uuid) -> Result<(), GuestMemoryError> {
    let address = SMBIOS_ADDRESS + ENTRY_BYTES + UUID_OFFSET;
    ram.write(address, &in_memory(uuid.0))
}

/// A UUID as it is here: its first three fields are little-endian.
fn in_memory(mut uuid: [u8; 16]) -> [u8; 16] {
    for field in [0..4, 4..6, 6..8] {
        uuid[field].reverse();
    }
    uuid
}

/// Entry point and tables as they are to lie at `address`.
fn tables(address: u64, system: &SystemTexts, uuid: [u8; 16]) -> Vec<u8> {
    let mut structures = system_structure(system, uuid);
    // The end of the table: type 127, four bytes, no texts.
    structures.extend([127, 4, 0, 2, 0, 0]);
    let length = u32::try_from(structures.len()).unwrap_or(u32::MAX);
    let mut image = b"_SM3_\0\x18\x03\0\0\x01\0".to_vec();
    image.extend(length.to_le_bytes());
    image.extend((address + ENTRY_BYTES).to_le_bytes());
    let sum = image.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    image[5] = sum.wrapping_neg();
    image.extend(structures);
    image
}

fn system_structure(system: &SystemTexts, uuid: [u8; 16]) -> Vec<u8> {
    let [manufacturer, product, version, serial, sku, family] = system.all();
    let mut texts = Vec::new();
    let mut count = 0;
    let mut number = |text: &str| {
        if text.is_empty() {
            return 0;
        }
        texts.extend(text.bytes().filter(|&byte| byte != 0));
        texts.push(0);
        count += 1;
        count
    };
    // Type, length, handle, numbers of texts.
    let mut bytes = vec![1, 27, 0, 1];
    bytes.extend([manufacturer, product, version, serial].map(&mut number));
    bytes.extend(in_memory(uuid));
    // Woken by the power switch.
    bytes.push(6);
    bytes.extend([sku, family].map(&mut number));
    if texts.is_empty() {
        texts.push(0);
    }
    bytes.extend(texts);
    bytes.push(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_those_of_the_specification() {
        let system = SystemTexts {
            product: "aspen".into(),
            serial: "S1".into(),
            ..SystemTexts::default()
        };
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let image = tables(0xf_0000, &system, uuid);
        let sum = image[..24]
            .iter()
            .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((&image[..5], sum), (b"_SM3_".as_slice(), 0));
        assert_eq!(image[16..24], 0xf_0018_u64.to_le_bytes());
        let table = &image[24..];
        assert_eq!(table.len(), usize::from(image[12]));
        assert_eq!(table[..8], [1, 27, 0, 1, 0, 1, 0, 2]);
        let at = usize::try_from(UUID_OFFSET).unwrap();
        assert_eq!(table[at..at + 8], [4, 3, 2, 1, 6, 5, 8, 7]);
        assert_eq!(&table[27..], b"aspen\0S1\0\0\x7f\x04\0\x02\0\0");
    }

    #[test]
    fn no_texts_end_with_two_zeros() {
        let image = tables(0, &SystemTexts::default(), [0; 16]);
        assert_eq!(image[24 + 27..24 + 29], [0, 0]);
    }
}
