#![forbid(unsafe_code)]
use super::*;
use crate::arch::x86_64::layout::{ACPI_ADDRESS, ACPI_END, GENERATION_ID_ADDRESS};
use crate::spec::{
    BackendKind, BackendOptions, BackendSpec, CpuCount, DimmParts, DistanceParts, MachineParts,
    MemoryParts, NodeParts,
};

mod hotplug;

const MIB: u64 = 1 << 20;

fn plain(cpus: u32) -> MachineSpec {
    let ram = BackendSpec::new("ram0", 64 * MIB).unwrap();
    MachineSpec::new(CpuCount::new(cpus).unwrap(), vec![ram]).unwrap()
}

/// Two nodes around the gap, a module in each slot but one, and a read-only module.
fn two_nodes() -> MachineSpec {
    let ram = |id: &str, bytes| BackendSpec::new(id, bytes).unwrap();
    let rom = BackendSpec::from_options(BackendOptions {
        kind: BackendKind::File,
        id: "rom".into(),
        path: Some("rom".into()),
        bytes: 2 * MIB,
        readonly: true,
        ..BackendOptions::default()
    });
    let dimm = |backend: &str, node, slot| DimmParts {
        id: format!("dimm-{backend}"),
        backend: backend.into(),
        node,
        slot: Some(slot),
        guest_address: None,
    };
    let node = |cpus: &[u32], backend: &str| NodeParts {
        cpus: cpus.into(),
        backend: Some(backend.into()),
        ..NodeParts::default()
    };
    MachineSpec::from_parts(MachineParts {
        cpus: CpuCount::new(3).unwrap(),
        backends: vec![
            ram("m0", 64 * MIB),
            ram("m1", 4 << 30),
            ram("d0", 128 * MIB),
            rom.unwrap(),
        ],
        ram_backend: None,
        memory: MemoryParts {
            bytes: None,
            slots: 4,
            max_bytes: Some(16 << 30),
        },
        nodes: vec![node(&[0, 2], "m0"), node(&[1], "m1")],
        distances: vec![
            DistanceParts {
                from: 0,
                to: 1,
                distance: 30,
            },
            DistanceParts {
                from: 1,
                to: 0,
                distance: 31,
            },
        ],
        identity: crate::spec::Identity::default(),
        dimms: vec![dimm("d0", 1, 2), dimm("rom", 0, 0)],
        pci: false,
        devices: vec![],
        generation_id: false,
    })
    .unwrap()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The table at a guest address: its length and checksum are right.
fn table(image: &[u8], address: u64) -> &[u8] {
    let at = usize::try_from(address - ACPI_ADDRESS).unwrap();
    assert_eq!(at % ALIGNMENT_BYTES, 0);
    let length = usize::try_from(u32_at(image, at + 4)).unwrap();
    let table = &image[at..at + length];
    assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
    table
}

/// The tables that the XSDT names.
fn named(image: &[u8]) -> Vec<&[u8]> {
    let xsdt = table(image, u64_at(image, 24));
    (36..xsdt.len())
        .step_by(8)
        .map(|at| table(image, u64_at(xsdt, at)))
        .collect()
}

/// Follows the pointers as a guest does: FADT, MADT, DSDT.
fn walk(image: &[u8]) -> [&[u8]; 3] {
    assert_eq!(&image[..8], b"RSD PTR ");
    assert_eq!(sum(&image[..20]), 0);
    assert_eq!(sum(&image[..36]), 0);
    let xsdt = table(image, u64_at(image, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let fadt = table(image, u64_at(xsdt, 36));
    let madt = table(image, u64_at(xsdt, 44));
    let dsdt = table(image, u64_at(fadt, 140));
    [fadt, madt, dsdt]
}

#[test]
fn every_table_is_found_with_a_valid_length_and_checksum() {
    let with_pci = || plain(1).with_pci(true);
    for spec in [plain(1), plain(2), plain(8), two_nodes(), with_pci()] {
        let image = tables(ACPI_ADDRESS, &spec);
        let [fadt, madt, dsdt] = walk(&image);
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(image.len() as u64 <= ACPI_END - ACPI_ADDRESS);
    }
}

#[test]
fn the_madt_has_every_cpu_and_the_io_apic() {
    let image = tables(ACPI_ADDRESS, &plain(3));
    let [_, madt, _] = walk(&image);
    assert_eq!(u32_at(madt, 36), 0xfee0_0000);
    let mut cpus = Vec::new();
    let mut at = 44;
    while at < madt.len() {
        match madt[at] {
            0 => cpus.push((madt[at + 2], madt[at + 3], u32_at(madt, at + 4))),
            1 => assert_eq!(
                (u32_at(madt, at + 4), u32_at(madt, at + 8)),
                (0xfec0_0000, 0)
            ),
            other => panic!("structure {other}"),
        }
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(cpus, [(0, 0, 1), (1, 1, 1), (2, 2, 1)]);
}

#[test]
fn the_fadt_says_how_to_power_off_and_reset() {
    let image = tables(ACPI_ADDRESS, &plain(1));
    let [fadt, _, _] = walk(&image);
    assert_eq!(fadt.len(), 276);
    let flags = u32_at(fadt, 112);
    assert_ne!(flags & 1 << 20, 0, "hardware reduced");
    assert_ne!(flags & 1 << 10, 0, "reset register");
    let register = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], u64_at(fadt, at + 4));
    assert_eq!(register(116), (1, 8, 1, u64::from(RESET_PORT)));
    assert_eq!(fadt[128], RESET_VALUE);
    assert_eq!(register(244), (1, 8, 1, u64::from(SLEEP_CONTROL_PORT)));
    assert_eq!(register(256), (1, 8, 1, u64::from(SLEEP_STATUS_PORT)));
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_arch & 1 << 1, 0, "no PS/2 controller to probe");
    assert_ne!(boot_arch & 1 << 5, 0, "no RTC");
}

#[test]
fn a_machine_without_nodes_says_nothing_of_them() {
    let image = tables(ACPI_ADDRESS, &plain(2));
    let names: Vec<&[u8]> = named(&image).iter().map(|table| &table[..4]).collect();
    assert_eq!(names, [b"FACP", b"APIC"]);
}

#[test]
fn the_srat_has_every_cpu_all_ram_and_every_module_that_can_be_written() {
    let image = tables(ACPI_ADDRESS, &two_nodes());
    let all = named(&image);
    let srat = all[2];
    assert_eq!((&srat[..4], srat[8]), (&b"SRAT"[..], 3));
    assert_eq!((u32_at(srat, 36), u64_at(srat, 40)), (1, 0));
    let (mut cpus, mut memory) = (Vec::new(), Vec::new());
    let mut at = 48;
    while at < srat.len() {
        match (srat[at], srat[at + 1]) {
            (0, 16) => cpus.push((srat[at + 3], srat[at + 2], u32_at(srat, at + 4))),
            (1, 40) => memory.push((
                u32_at(srat, at + 2),
                u64_at(srat, at + 8),
                u64_at(srat, at + 16),
                u32_at(srat, at + 28),
            )),
            other => panic!("structure {other:?}"),
        }
        at += usize::from(srat[at + 1]);
    }
    assert_eq!(cpus, [(0, 0, 1), (1, 1, 1), (2, 0, 1)]);
    let gib = 1_u64 << 30;
    assert_eq!(
        memory,
        [
            (0, 0, 64 * MIB, 1),
            (1, 64 * MIB, 3 * gib - 64 * MIB, 1),
            (1, 4 * gib, gib + 64 * MIB, 1),
            // Enabled and hot-pluggable, at the next GiB.
            (1, 6 * gib, 128 * MIB, 3),
            // Room for more: up to the 16 GiB, but for the read-only module, and a GiB for each slot.
            (1, 6 * gib + 130 * MIB, 16 * gib - 64 * MIB - 130 * MIB, 3),
        ]
    );
}

#[test]
fn the_slit_has_distances_by_direction() {
    let image = tables(ACPI_ADDRESS, &two_nodes());
    let all = named(&image);
    let slit = all[3];
    assert_eq!((&slit[..4], slit[8]), (&b"SLIT"[..], 1));
    assert_eq!(u64_at(slit, 36), 2);
    assert_eq!(slit[44..], [10, 30, 31, 10]);
}

#[test]
fn each_slot_of_a_module_is_a_device() {
    let image = tables(ACPI_ADDRESS, &two_nodes());
    let [_, _, dsdt] = walk(&image);
    let names = dsdt
        .windows(4)
        .filter(|name| name[0] == b'M' && name[1..3] == *b"00");
    // Each twice: as a device, and where it is told.
    assert_eq!(
        names.collect::<Vec<_>>(),
        [
            b"M000", b"M001", b"M002", b"M003", b"M000", b"M001", b"M002", b"M003"
        ],
    );
    // EISAID("PNP0C80").
    assert!(dsdt.windows(4).any(|id| id == [0x41, 0xd0, 0x0c, 0x80]));
}

#[test]
fn as_many_slots_as_there_can_be_fit() {
    let mut parts = two_nodes().to_parts();
    parts.memory.slots = crate::spec::MAX_SLOTS;
    let image = tables(
        ACPI_ADDRESS,
        &MachineSpec::from_parts(parts).unwrap().with_pci(true),
    );
    assert!(image.len() as u64 <= GENERATION_ID_ADDRESS - ACPI_ADDRESS);
}
