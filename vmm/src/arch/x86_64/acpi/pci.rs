#![forbid(unsafe_code)]
//! The PCI bus: its host bridge (PCI firmware specification 3.3, 4), with the window in which functions
//! have their memory, and where their registers are (MCFG). What is in its places, and comes and goes there,
//! is [`hotplug`]'s.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of, hotplug, low32};
use crate::arch::x86_64::ports::{PCI_CONFIG_PORTS, PCI_HOTPLUG_PORTS};
use crate::memory::layout::{PCI_CONFIG_MEMORY, PCI_WINDOW};

/// The only bus.
const BUS: u16 = 0;

/// Where the registers of bus 0 are.
pub(super) fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_CONFIG_MEMORY.start, 0, 0, 0);
    bytes_of(&mcfg)
}

/// Adds the host bridge, and a board that keeps the memory and the ports of the registers.
pub(super) fn append(dsdt: &mut Sdt) {
    let all_of = |ports: Range<u16>| {
        let count = u8::try_from(ports.len()).unwrap_or(u8::MAX);
        IO::new(ports.start, ports.start, 1, count)
    };
    let ports = all_of(PCI_CONFIG_PORTS);
    let hotplug_ports = all_of(PCI_HOTPLUG_PORTS);
    let buses = AddressSpace::<u16>::new_bus_number(BUS, BUS);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low32(PCI_WINDOW.start),
        low32(PCI_WINDOW.end - 1),
        None,
    );
    let registers = Memory32Fixed::new(
        true,
        low32(PCI_CONFIG_MEMORY.start),
        low32(PCI_CONFIG_MEMORY.end - PCI_CONFIG_MEMORY.start),
    );
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("PCI0"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                    &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_SEG"), &ZERO),
                    &Name::new(Path::new("_BBN"), &ZERO),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&buses, &ports, &window]),
                    ),
                ],
            ),
            &Device::new(
                Path::new("MBRD"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&registers, &hotplug_ports]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
    hotplug::append(dsdt);
}
