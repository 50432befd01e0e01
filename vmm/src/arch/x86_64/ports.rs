#![forbid(unsafe_code)]
//! Where the legacy devices are: I/O ports and interrupt lines.

use std::ops::Range;

/// COM1's registers.
pub const COM1_PORTS: Range<u16> = 0x3f8..0x400;
/// COM1's interrupt line (GSI), edge triggered, active high.
pub const COM1_GSI: u32 = 4;
/// The power button's interrupt line (GSI), edge triggered, active high.
pub const POWER_BUTTON_GSI: u32 = 5;
/// The interrupt line (GSI) that tells of a new VM generation, edge triggered, active high.
pub const GENERATION_ID_GSI: u32 = 10;
/// The interrupt line (GSI) that tells of devices that come and go on the PCI bus, level triggered, active
/// high.
pub const PCI_HOTPLUG_GSI: u32 = 9;
/// The interrupt line (GSI) that tells of memory modules that come and go, level triggered, active high.
pub const MODULE_HOTPLUG_GSI: u32 = 11;
/// The keyboard controller's data.
pub const I8042_DATA_PORTS: Range<u16> = 0x60..0x61;
/// The keyboard controller's command and status. Only its reset command exists.
pub const I8042_COMMAND_PORTS: Range<u16> = 0x64..0x65;
/// The timer's counters and, last, its control word.
pub const TIMER_PORTS: Range<u16> = 0x40..0x44;
/// The timer's gate and output, and the speaker.
pub const SPEAKER_PORTS: Range<u16> = 0x61..0x62;
/// Registers of PCI functions: an address register and a data register, four bytes each.
pub const PCI_CONFIG_PORTS: Range<u16> = 0xcf8..0xd00;
/// What devices come and go on the PCI bus: four registers of four bytes each.
pub const PCI_HOTPLUG_PORTS: Range<u16> = 0x610..0x620;
/// What memory modules come and go: registers of four bytes each (see [`crate::device::modules`]).
pub const MODULE_HOTPLUG_PORTS: Range<u16> = 0x620..0x650;
/// ACPI sleep control, sleep status and reset registers, one byte each, in this order.
pub const POWER_PORTS: Range<u16> = 0x600..0x603;
/// Port of the ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = POWER_PORTS.start;
/// Port of the ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = POWER_PORTS.start + 1;
/// Port of the ACPI reset register.
pub const RESET_PORT: u16 = POWER_PORTS.start + 2;
/// What a guest writes to [`RESET_PORT`] to reset the machine.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the soft-off state S5, as `\_S5` names it.
pub const SLEEP_TYPE_S5: u8 = 5;
