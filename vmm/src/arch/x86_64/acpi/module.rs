#![forbid(unsafe_code)]
//! Slots of memory modules as devices (ACPI 6.5, 9.11). All slots are there from the start, taken or not: a
//! template's guest keeps these tables, and what its clones are given comes later. What is in a slot the
//! methods read out of the registers of [`crate::device::modules`]. Linux names the blocks of memory that it
//! already has from the memory map after the modules, and knows their node.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName,
    Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Mutex, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Or, Path, Release,
    ResourceTemplate, Return, Scope, ShiftLeft, ShiftRight, Store, While, ZERO,
};
use acpi_tables::sdt::Sdt;

use crate::arch::x86_64::ports::MODULE_HOTPLUG_PORTS;
use crate::spec::MachineSpec;

/// The method to call when the interrupt has come.
pub(super) const METHOD: &str = "\\_SB_.MHPE";
/// What the register of events reads where nothing has happened.
const NOTHING: u32 = u32::MAX;
/// Bits of a register.
const REGISTER_BITS: usize = 32;
/// Waits for the lock as long as it takes.
const FOR_EVER: u16 = 0xffff;
/// The parts of a range in a 64-bit address space descriptor (ACPI 6.5, 6.4.3.5.1) by their offsets, with the
/// registers that have them.
const RANGE: [(&str, u8, &str); 6] = [
    ("MINL", 14, "MHFL"),
    ("MINH", 18, "MHFH"),
    ("MAXL", 22, "MHLL"),
    ("MAXH", 26, "MHLH"),
    ("LENL", 38, "MHSL"),
    ("LENH", 42, "MHSH"),
];

/// Adds registers, slots and methods, where the machine has slots.
pub(super) fn append(dsdt: &mut Sdt, spec: &MachineSpec) {
    if spec.slots() == 0 {
        return;
    }
    registers(dsdt);
    look(dsdt, "MHST", "MHSS");
    look(dsdt, "MHPX", "MHNO");
    range(dsdt);
    outcome(dsdt);
    for slot in 0..spec.slots() {
        place(dsdt, slot);
    }
    events(dsdt, spec.slots());
}

fn in_system(dsdt: &mut Sdt, children: Vec<&dyn Aml>) {
    Scope::new(Path::new("_SB_"), children).to_aml_bytes(dsdt);
}

fn name_of(slot: u32) -> String {
    format!("M{slot:03X}")
}

/// The registers in their order, and the lock of the one that selects.
fn registers(dsdt: &mut Sdt) {
    let bytes = u8::try_from(MODULE_HOTPLUG_PORTS.len()).unwrap_or(u8::MAX);
    let names = [
        *b"MHSE", *b"MHFL", *b"MHFH", *b"MHLL", *b"MHLH", *b"MHSL", *b"MHSH", *b"MHNO", *b"MHSS",
        *b"MHNX", *b"MHEJ", *b"MHOU",
    ];
    let fields = names.map(|name| FieldEntry::Named(name, REGISTER_BITS));
    in_system(
        dsdt,
        vec![
            &OpRegion::new(
                Path::new("MHPR"),
                OpRegionSpace::SystemIO,
                &MODULE_HOTPLUG_PORTS.start,
                &bytes,
            ),
            &Field::new(
                Path::new("MHPR"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                fields.to_vec(),
            ),
            &Mutex::new(Path::new("MHLK"), 0),
        ],
    );
}

/// A method that reads one register of a slot.
fn look(dsdt: &mut Sdt, method: &str, register: &str) {
    let (select, register) = (Path::new("MHSE"), Path::new(register));
    in_system(
        dsdt,
        vec![&Method::new(
            Path::new(method),
            1,
            true,
            vec![
                &Acquire::new(Path::new("MHLK"), FOR_EVER),
                &Store::new(&select, &Arg(0)),
                &Store::new(&Local(0), &register),
                &Release::new(Path::new("MHLK")),
                &Return::new(&Local(0)),
            ],
        )],
    );
}

/// The method that makes the range of a slot's module.
fn range(dsdt: &mut Sdt) {
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        0_u64,
        u64::MAX - 1,
        None,
    );
    let (select, buffer) = (Path::new("MHSE"), Path::new("MHRB"));
    let parts = RANGE.map(|(name, offset, from)| (Path::new(name), offset, Path::new(from)));
    let fields: Vec<_> = (parts.iter())
        .map(|(name, offset, _)| CreateDWordField::new(name, &buffer, offset))
        .collect();
    let copies: Vec<_> = (parts.iter())
        .map(|(name, _, from)| Store::new(name, from))
        .collect();
    let template = ResourceTemplate::new(vec![&memory]);
    let empty = Name::new(Path::new("MHRB"), &template);
    let (lock, free) = (
        Acquire::new(Path::new("MHLK"), FOR_EVER),
        Release::new(Path::new("MHLK")),
    );
    let choose = Store::new(&select, &Arg(0));
    let mut steps: Vec<&dyn Aml> = vec![&empty];
    steps.extend(fields.iter().map(|field| field as &dyn Aml));
    steps.extend([&lock as &dyn Aml, &choose]);
    steps.extend(copies.iter().map(|copy| copy as &dyn Aml));
    let answer = Return::new(&buffer);
    steps.extend([&free as &dyn Aml, &answer]);
    in_system(dsdt, vec![&Method::new(Path::new("MHCR"), 1, true, steps)]);
}

/// The method that puts an outcome together: slot, event, status.
fn outcome(dsdt: &mut Sdt) {
    let byte = |arg| And::new(&ZERO, arg, &0xff_u8);
    let (event, status) = (byte(&Arg(1)), byte(&Arg(2)));
    let event = ShiftLeft::new(&ZERO, &event, &8_u8);
    let status = ShiftLeft::new(&ZERO, &status, &16_u8);
    let both = Or::new(&ZERO, &event, &status);
    let all = Or::new(&ZERO, &Arg(0), &both);
    let register = Path::new("MHOU");
    let say = Store::new(&register, &all);
    in_system(
        dsdt,
        vec![&Method::new(Path::new("MHOS"), 3, true, vec![&say])],
    );
}

/// A slot.
fn place(dsdt: &mut Sdt, slot: u32) {
    let ask = |method: &str| MethodCall::new(Path::new(method), vec![&slot as &dyn Aml]);
    let (status, range, node) = (ask("MHST"), ask("MHCR"), ask("MHPX"));
    let eject = Path::new("MHEJ");
    let method = |name: &str, call: &dyn Aml| {
        let mut bytes = Vec::new();
        let answer = Return::new(call);
        Method::new(Path::new(name), 0, true, vec![&answer]).to_aml_bytes(&mut bytes);
        Raw(bytes)
    };
    in_system(
        dsdt,
        vec![&Device::new(
            Path::new(&name_of(slot)),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C80")),
                &Name::new(Path::new("_UID"), &slot),
                &method("_STA", &status),
                &method("_CRS", &range),
                &method("_PXM", &node),
                &Method::new(Path::new("_EJ0"), 1, true, vec![&Store::new(&eject, &slot)]),
                &Method::new(
                    Path::new("_OST"),
                    3,
                    true,
                    vec![&MethodCall::new(
                        Path::new("MHOS"),
                        vec![&slot, &Arg(0), &Arg(1)],
                    )],
                ),
            ],
        )],
    );
}

/// Code that was made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// Reads what happened, until nothing is left, and tells each slot.
fn events(dsdt: &mut Sdt, slots: u32) {
    let places: Vec<(u32, Path)> = (0..slots)
        .map(|slot| (slot, Path::new(&name_of(slot))))
        .collect();
    let asks: Vec<_> = (places.iter())
        .map(|(slot, path)| (Equal::new(&Arg(0), slot), Notify::new(path, &Arg(1))))
        .collect();
    let cases: Vec<If<'_>> = (asks.iter())
        .map(|(ask, tell)| If::new(ask, vec![tell]))
        .collect();
    let steps = cases.iter().map(|case| case as &dyn Aml).collect();
    in_system(dsdt, vec![&Method::new(Path::new("MHTE"), 2, true, steps)]);
    let (next, all) = (Path::new("MHNX"), Local(0));
    let read = Store::new(&all, &next);
    let slot = And::new(&ZERO, &all, &0xffff_u16);
    let what = ShiftRight::new(&ZERO, &all, &16_u8);
    let tell = MethodCall::new(Path::new("MHTE"), vec![&slot, &what]);
    let is_something = NotEqual::new(&all, &NOTHING);
    let again = While::new(&is_something, vec![&tell, &read]);
    in_system(
        dsdt,
        vec![&Method::new(
            Path::new("MHPE"),
            0,
            true,
            vec![&read, &again],
        )],
    );
}
