#![forbid(unsafe_code)]
//! The VM generation ID as guests find it: a device that says where the 16 bytes are.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Name, Package, Path, Scope, ZERO};
use acpi_tables::sdt::Sdt;

use super::low32;
use crate::arch::x86_64::layout::GENERATION_ID_ADDRESS;

/// The device, for those that notify it.
pub(super) const PATH: &str = "\\_SB_.VGEN";

/// Adds the device.
pub(super) fn append(dsdt: &mut Sdt) {
    let address = low32(GENERATION_ID_ADDRESS);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("VGEN"),
            vec![
                // As QEMU's, which drivers know.
                &Name::new(Path::new("_HID"), &"QEMUVGID"),
                &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
                &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
                &Name::new(Path::new("ADDR"), &Package::new(vec![&address, &ZERO])),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}
