#![forbid(unsafe_code)]
//! The power button (ACPI 6.5, 4.8.3.1 and 5.6.9): hardware-reduced machines have it as a device whose
//! press is an interrupt of the Generic Event Device. Without state: each interrupt is one press.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, If, Interrupt, Method, Name, Notify, Path, ResourceTemplate,
    Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use crate::arch::x86_64::ports::POWER_BUTTON_GSI;

/// What the button is told: it was pressed (ACPI 6.5, table 5.187).
const PRESSED: u8 = 0x80;

/// Adds the button and the device that brings its events.
pub(super) fn append(dsdt: &mut Sdt) {
    let interrupt = Interrupt::new(true, true, false, false, POWER_BUTTON_GSI);
    let button = Path::new("\\_SB_.PWRB");
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("PWRB"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                    &Name::new(Path::new("_UID"), &ZERO),
                ],
            ),
            &Device::new(
                Path::new("GED_"),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0013"),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
                    &Method::new(
                        Path::new("_EVT"),
                        1,
                        true,
                        vec![&If::new(
                            &Equal::new(&Arg(0), &POWER_BUTTON_GSI),
                            vec![&Notify::new(&button, &PRESSED)],
                        )],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}
