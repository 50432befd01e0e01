#![forbid(unsafe_code)]
//! The VM generation ID: 16 bytes by which a guest sees that it was cloned, and an interrupt that has it
//! look (Microsoft, "Virtual Machine Generation ID", 2012).

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::arch::x86_64::layout::GENERATION_ID_ADDRESS;
use crate::arch::x86_64::ports::GENERATION_ID_GSI;
use crate::kvm::vm::Vm;
use crate::memory::guest::GuestRam;

use super::error::MachineError;

/// What its record is called.
pub(super) const GENERATION_KIND: &str = "vmgenid";
/// Version of its record.
pub(super) const GENERATION_VERSION: u32 = 1;

/// A generation, in the order of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationId(pub [u8; 16]);

impl GenerationId {
    /// One that was never there before: a random UUID (RFC 9562, version 4).
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        // So few bytes always come at once.
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// As the guest has it in memory: the first three fields are little endian.
    fn in_memory(self) -> [u8; 16] {
        let mut bytes = self.0;
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    }

    /// Writes it where the ACPI tables say that it is.
    pub(super) fn write(self, ram: &GuestRam) -> Result<(), MachineError> {
        ram.write(GENERATION_ID_ADDRESS, &self.in_memory())
            .map_err(|source| MachineError::Device {
                kind: GENERATION_KIND,
                source: Box::new(source),
            })
    }
}

impl fmt::Display for GenerationId {
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

/// Has the guest look: when all else of the machine is as it was, lest the interrupt is lost.
pub(super) fn notify(vm: &Vm) -> Result<(), MachineError> {
    vm.pulse_irq(GENERATION_ID_GSI)
        .map_err(MachineError::vm("cannot tell the guest of its generation"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_the_first_three_fields_backwards() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        let id = GenerationId([
            0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
            0xee, 0xff,
        ]);
        assert_eq!(id.to_string(), text);
        assert_eq!(
            id.in_memory()[..9],
            [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88]
        );
    }

    #[test]
    fn generations_are_random_uuids() {
        let (a, b) = (
            GenerationId::random().unwrap(),
            GenerationId::random().unwrap(),
        );
        assert_ne!(a, b);
        assert_eq!((a.0[6] >> 4, a.0[8] >> 6), (4, 2));
    }
}
