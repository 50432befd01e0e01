#![forbid(unsafe_code)]
//! Places of the PCI bus whose devices come and go (ACPI 6.5, 6.3): each is a device that can be taken out,
//! and one method tells the guest's system what happened, out of the registers of
//! [`crate::arch::x86_64::ports::PCI_HOTPLUG_PORTS`].
//!
//! All places are there from the start, taken or not: a template's guest keeps these tables, and what its
//! clones are given comes later. No place has a status (`_STA`): a system finds out by reading the registers
//! of the function, which are all ones where there is none.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Or, Path, Scope, ShiftLeft,
    Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use crate::arch::x86_64::ports::PCI_HOTPLUG_PORTS;
use crate::spec::LAST_SLOT;

/// The method to call when the interrupt has come.
pub(super) const METHOD: &str = "\\_SB_.PCI0.PHPE";
/// What a place is told: look what is there.
const DEVICE_CHECK: u8 = 1;
/// What a place is told: let go of what is there.
const EJECT_REQUEST: u8 = 3;
/// Bits of a register.
const REGISTER_BITS: usize = 32;

/// Adds registers, places and methods to the host bridge, which is there.
pub(super) fn append(dsdt: &mut Sdt) {
    registers(dsdt);
    for slot in 1..=LAST_SLOT {
        place(dsdt, slot);
    }
    events(dsdt);
}

fn name_of(slot: u8) -> String {
    format!("S{slot:02X}_")
}

/// The registers in their order, and the method that puts an outcome together: place, event, status.
fn registers(dsdt: &mut Sdt) {
    let bytes = u8::try_from(PCI_HOTPLUG_PORTS.len()).unwrap_or(u8::MAX);
    let names = [*b"PHPU", *b"PHPD", *b"PHPJ", *b"PHPS"];
    let fields = names.map(|name| FieldEntry::Named(name, REGISTER_BITS));
    let byte = |arg| And::new(&ZERO, arg, &0xff_u8);
    let (event, status) = (byte(&Arg(1)), byte(&Arg(2)));
    let event = ShiftLeft::new(&ZERO, &event, &8_u8);
    let status = ShiftLeft::new(&ZERO, &status, &16_u8);
    let both = Or::new(&ZERO, &event, &status);
    let all = Or::new(&ZERO, &Arg(0), &both);
    let outcome = Path::new("PHPS");
    Scope::new(
        Path::new("\\_SB_.PCI0"),
        vec![
            &OpRegion::new(
                Path::new("PHPR"),
                OpRegionSpace::SystemIO,
                &PCI_HOTPLUG_PORTS.start,
                &bytes,
            ),
            &Field::new(
                Path::new("PHPR"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                fields.to_vec(),
            ),
            &Method::new(
                Path::new("PHPO"),
                3,
                true,
                vec![&Store::new(&outcome, &all)],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// A place, its number, how it is emptied, and how a system says what came of that.
fn place(dsdt: &mut Sdt, slot: u8) {
    let (eject, bit) = (Path::new("PHPJ"), 1_u32 << slot);
    Scope::new(
        Path::new("\\_SB_.PCI0"),
        vec![&Device::new(
            Path::new(&name_of(slot)),
            vec![
                &Name::new(Path::new("_SUN"), &slot),
                &Name::new(Path::new("_ADR"), &(u32::from(slot) << 16)),
                &Method::new(Path::new("_EJ0"), 1, true, vec![&Store::new(&eject, &bit)]),
                &Method::new(
                    Path::new("_OST"),
                    3,
                    true,
                    vec![&MethodCall::new(
                        Path::new("PHPO"),
                        vec![&slot, &Arg(0), &Arg(1)],
                    )],
                ),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}

/// Reads what came and what is to go, and tells each place: what came first.
fn events(dsdt: &mut Sdt) {
    let (came, goes) = (Local(0), Local(1));
    let (plugged, unplug) = (Path::new("PHPU"), Path::new("PHPD"));
    let places: Vec<(u32, Path)> = (1..=LAST_SLOT)
        .map(|slot| (1 << slot, Path::new(&name_of(slot))))
        .collect();
    let mut asks = Vec::new();
    for (register, what) in [(&came, &DEVICE_CHECK), (&goes, &EJECT_REQUEST)] {
        for (bit, path) in &places {
            let ask = And::new(&ZERO, register, bit);
            asks.push((ask, Notify::new(path, what)));
        }
    }
    let cases: Vec<If<'_>> = (asks.iter())
        .map(|(ask, tell)| If::new(ask, vec![tell]))
        .collect();
    let read = [Store::new(&came, &plugged), Store::new(&goes, &unplug)];
    let mut steps: Vec<&dyn Aml> = Vec::new();
    steps.extend(read.iter().map(|step| step as &dyn Aml));
    steps.extend(cases.iter().map(|case| case as &dyn Aml));
    Scope::new(
        Path::new("\\_SB_.PCI0"),
        vec![&Method::new(Path::new("PHPE"), 0, true, steps)],
    )
    .to_aml_bytes(dsdt);
}
