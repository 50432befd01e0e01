#![forbid(unsafe_code)]
//! The power button (ACPI 6.5, 4.8.3.1 and 5.6.9): hardware-reduced machines have it as a device whose
//! press is an interrupt of the Generic Event Device. Without state: each interrupt is one press. The
//! same device brings the event of a new VM generation, and those of devices that come and go on the PCI
//! bus and of memory modules, whose lines stay raised until they are read.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, If, Interrupt, Method, MethodCall, Name, Notify, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{generation, hotplug, module};
use crate::arch::x86_64::ports::{
    GENERATION_ID_GSI, MODULE_HOTPLUG_GSI, PCI_HOTPLUG_GSI, POWER_BUTTON_GSI,
};
use crate::spec::MachineSpec;

/// What the button is told: it was pressed (ACPI 6.5, table 5.187).
const PRESSED: u8 = 0x80;
/// What the generation ID is told: it has changed.
const CHANGED: u8 = 0x80;

/// Adds the button and the device that brings its events, those of a generation ID and those of a PCI bus.
pub(super) fn append(dsdt: &mut Sdt, spec: &MachineSpec) {
    let interrupt = Interrupt::new(true, true, false, false, POWER_BUTTON_GSI);
    let button = Path::new("\\_SB_.PWRB");
    let renewed = Interrupt::new(true, true, false, false, GENERATION_ID_GSI);
    let generation = Path::new(generation::PATH);
    let is_pressed = Equal::new(&Arg(0), &POWER_BUTTON_GSI);
    let press = Notify::new(&button, &PRESSED);
    let on_press = If::new(&is_pressed, vec![&press]);
    let is_renewed = Equal::new(&Arg(0), &GENERATION_ID_GSI);
    let renew = Notify::new(&generation, &CHANGED);
    let on_renewal = If::new(&is_renewed, vec![&renew]);
    let moved = Interrupt::new(true, false, false, false, PCI_HOTPLUG_GSI);
    let is_moved = Equal::new(&Arg(0), &PCI_HOTPLUG_GSI);
    let look = MethodCall::new(Path::new(hotplug::METHOD), vec![]);
    let on_move = If::new(&is_moved, vec![&look]);
    let grown = Interrupt::new(true, false, false, false, MODULE_HOTPLUG_GSI);
    let is_grown = Equal::new(&Arg(0), &MODULE_HOTPLUG_GSI);
    let look_at_slots = MethodCall::new(Path::new(module::METHOD), vec![]);
    let on_growth = If::new(&is_grown, vec![&look_at_slots]);
    let mut interrupts: Vec<&dyn Aml> = vec![&interrupt];
    let mut events: Vec<&dyn Aml> = vec![&on_press];
    if spec.has_generation_id() {
        interrupts.push(&renewed);
        events.push(&on_renewal);
    }
    if spec.has_pci() {
        interrupts.push(&moved);
        events.push(&on_move);
    }
    if spec.slots() > 0 {
        interrupts.push(&grown);
        events.push(&on_growth);
    }
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
                    &Name::new(Path::new("_CRS"), &ResourceTemplate::new(interrupts)),
                    &Method::new(Path::new("_EVT"), 1, true, events),
                ],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}
