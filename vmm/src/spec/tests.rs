use proptest::prelude::*;

use super::*;
use crate::memory::layout::LayoutError;

const MIB: u64 = 1 << 20;

fn backend(id: &str, bytes: u64) -> BackendSpec {
    BackendSpec::new(id, bytes).unwrap()
}

/// Two nodes of 64 MiB with a vCPU each and a module of 128 MiB in the second.
fn two_nodes() -> MachineParts {
    MachineParts {
        cpus: CpuCount::new(2).unwrap(),
        backends: vec![
            backend("d0", 128 * MIB),
            backend("m1", 64 * MIB),
            backend("m0", 64 * MIB),
        ],
        ram_backend: None,
        memory: MemoryParts {
            bytes: Some(128 * MIB),
            slots: 2,
            max_bytes: Some(1 << 30),
        },
        nodes: [(1, "m1"), (0, "m0")]
            .map(|(id, backend)| NodeParts {
                id: Some(id),
                cpus: vec![id],
                backend: Some(backend.into()),
            })
            .into(),
        distances: vec![],
        identity: Identity::default(),
        dimms: vec![DimmParts {
            id: "dimm0".into(),
            backend: "d0".into(),
            node: 1,
            ..DimmParts::default()
        }],
        pci: false,
        devices: vec![],
        generation_id: false,
    }
}

type Change = fn(&mut MachineParts);

fn refused(parts: MachineParts) -> String {
    match MachineSpec::from_parts(parts) {
        Ok(spec) => panic!("accepted: {spec:?}"),
        Err(error) => error.to_string(),
    }
}

fn refused_with(change: impl FnOnce(&mut MachineParts)) -> String {
    let mut parts = two_nodes();
    change(&mut parts);
    refused(parts)
}

#[test]
fn counts_outside_one_to_eight_are_refused() {
    for cpus in [0, 9, 256, 257, u32::MAX] {
        assert_eq!(CpuCount::new(cpus), Err(SpecError::Cpus { cpus }));
    }
    assert_eq!(CpuCount::new(8).unwrap().get(), 8);
    assert_eq!(
        CpuCount::new(0).unwrap_err().to_string(),
        "a machine has 1 to 8 vCPUs, not 0"
    );
}

#[test]
fn ids_cannot_leave_a_directory() {
    for id in [
        "",
        ".",
        "..",
        "a/b",
        ".hidden",
        "nul\0",
        "a b",
        &"x".repeat(65),
    ] {
        assert!(BackendSpec::new(id, 4096).is_err(), "{id:?}");
    }
    assert_eq!(backend("ram-0_a.b", 4096).id(), "ram-0_a.b");
}

#[test]
fn too_little_ram_and_twice_the_same_id_are_refused() {
    let small = MachineSpec::new(CpuCount::ONE, vec![backend("ram", MIN_RAM_BYTES - 4096)]);
    assert!(
        matches!(small, Err(SpecError::TooSmall { .. })),
        "{small:?}"
    );
    let twice = MachineSpec::new(
        CpuCount::ONE,
        vec![backend("ram", MIN_RAM_BYTES), backend("ram", MIN_RAM_BYTES)],
    );
    assert!(
        matches!(twice, Err(SpecError::DuplicateId { .. })),
        "{twice:?}"
    );
    let none = MachineSpec::new(CpuCount::ONE, vec![]);
    assert_eq!(none, Err(SpecError::Layout(LayoutError::NoBackend)));
}

#[test]
fn backends_lie_in_the_order_of_their_nodes_and_modules_behind_them() {
    let spec = MachineSpec::from_parts(two_nodes()).unwrap();
    let ids: Vec<&str> = spec.backends().iter().map(BackendSpec::id).collect();
    assert_eq!(ids, ["m0", "m1", "d0"]);
    let layout = spec.layout();
    let at = [0, 1, 2].map(|backend| layout.guest_address(backend, 0));
    assert_eq!(at, [Some(0), Some(64 * MIB), Some(4 << 30)]);
    assert_eq!([0, 1, 2].map(|at| spec.node_of_backend(at)), [0, 1, 1]);
    assert_eq!([0, 1].map(|cpu| spec.numa().node_of(cpu)), [0, 1]);
    assert_eq!(spec.numa().distance(0, 1), REMOTE_DISTANCE);
    assert_eq!(spec.numa().distance(1, 1), LOCAL_DISTANCE);
    assert_eq!((spec.dimms()[0].slot(), spec.ram_bytes()), (0, 128 * MIB));
}

#[test]
fn a_machine_can_be_made_again_from_its_parts() {
    let spec = MachineSpec::from_parts(two_nodes()).unwrap();
    assert_eq!(MachineSpec::from_parts(spec.to_parts()).unwrap(), spec);
    let mut plain = MachineParts::of(CpuCount::ONE, backend("ram0", 64 * MIB));
    plain.memory.max_bytes = Some(128 * MIB);
    plain.memory.slots = 1;
    let spec = MachineSpec::from_parts(plain).unwrap();
    assert!(spec.to_parts().nodes.is_empty(), "none was asked for");
    assert_eq!(spec.numa().nodes().len(), 1, "modules need one");
    assert_eq!(MachineSpec::from_parts(spec.to_parts()).unwrap(), spec);
}

#[test]
fn vcpus_that_no_node_names_are_in_the_first() {
    let mut parts = two_nodes();
    parts.nodes.iter_mut().for_each(|node| node.cpus.clear());
    let spec = MachineSpec::from_parts(parts).unwrap();
    assert_eq!(spec.numa().nodes()[0].cpus(), [0, 1]);
    assert!(spec.numa().nodes()[1].cpus().is_empty());
}

#[test]
fn a_package_never_reaches_into_another_node() {
    let shared = |cpus: u32, second: &[u32]| {
        let mut parts = two_nodes();
        parts.cpus = CpuCount::new(cpus).unwrap();
        parts.nodes[0].cpus = second.to_vec();
        parts.nodes[1].cpus.clear();
        let spec = MachineSpec::from_parts(parts).unwrap();
        spec.numa().package_bits(spec.cpus())
    };
    assert_eq!(shared(2, &[1]), 0);
    assert_eq!(shared(4, &[2, 3]), 1);
    assert_eq!(shared(8, &[4, 5, 6, 7]), 2);
    assert_eq!(shared(8, &[6, 7]), 1);
    assert_eq!(shared(4, &[1, 3]), 0);
    assert_eq!(shared(8, &[]), 7);
}

#[test]
fn nodes_that_cannot_be_are_refused_in_qemus_words() {
    let gap = refused_with(|parts| parts.nodes[0].id = Some(2));
    assert!(gap.contains("numa: Node ID missing: 1"), "{gap}");
    let twice = refused_with(|parts| parts.nodes[0].id = Some(0));
    assert!(twice.contains("Duplicate NUMA nodeid: 0"), "{twice}");
    let sum = refused_with(|parts| parts.memory.bytes = Some(64 * MIB));
    assert!(
        sum.contains("total memory for NUMA nodes (0x8000000) should equal RAM size (0x4000000)"),
        "{sum}"
    );
    let both = refused_with(|parts| parts.ram_backend = Some("m0".into()));
    assert!(
        both.contains(
            "'-machine memory-backend' and '-numa memdev' properties are mutually exclusive"
        ),
        "{both}"
    );
    let cpu = refused_with(|parts| parts.nodes[0].cpus.push(2));
    assert!(cpu.contains("CPU index (2) should be smaller than maxcpus (2)"));
    let stolen = refused_with(|parts| parts.nodes[0].cpus.push(0));
    assert!(
        stolen.contains("CPU 0 is in NUMA nodes 0 and 1"),
        "{stolen}"
    );
    let many = refused_with(|parts| parts.nodes[0].id = Some(128));
    assert!(many.contains("max number of NUMA nodes"), "{many}");
}

#[test]
fn distances_are_completed_or_refused() {
    let with = |distances: &[(u32, u32, u32)]| {
        let mut parts = two_nodes();
        parts.distances = distances
            .iter()
            .map(|&(from, to, distance)| DistanceParts { from, to, distance })
            .collect();
        MachineSpec::from_parts(parts)
    };
    let numa = with(&[(0, 1, 40)]).unwrap().numa().clone();
    assert_eq!((numa.distance(0, 1), numa.distance(1, 0)), (40, 40));
    let numa = with(&[(0, 1, 40), (1, 0, 41)]).unwrap().numa().clone();
    assert_eq!((numa.distance(0, 1), numa.distance(1, 0)), (40, 41));
    assert_eq!(numa.distance(0, 2), 255);
    let text = |distances: &[(u32, u32, u32)]| with(distances).unwrap_err().to_string();
    assert!(text(&[(0, 2, 20)]).contains("Source/Destination NUMA node is missing"));
    assert!(text(&[(0, 1, 9)]).contains("NUMA distance (9) is invalid"));
    assert!(text(&[(0, 1, 256)]).contains("NUMA distance (256) is invalid"));
    assert!(text(&[(1, 1, 11)]).contains("Local distance of node 1 should be 10"));
}

#[test]
fn three_nodes_need_every_distance_or_none() {
    let ram = |id: u32| backend(&format!("m{id}"), 64 * MIB);
    let with = |distances: &[(u32, u32, u32)]| {
        MachineSpec::from_parts(MachineParts {
            cpus: CpuCount::ONE,
            backends: (0..3).map(ram).collect(),
            ram_backend: None,
            memory: MemoryParts::default(),
            nodes: (0..3)
                .map(|id| NodeParts {
                    backend: Some(format!("m{id}")),
                    ..NodeParts::default()
                })
                .collect(),
            distances: distances
                .iter()
                .map(|&(from, to, distance)| DistanceParts { from, to, distance })
                .collect(),
            identity: Identity::default(),
            dimms: vec![],
            pci: false,
            devices: vec![],
            generation_id: false,
        })
    };
    with(&[]).unwrap();
    with(&[(0, 1, 20), (2, 0, 30), (1, 2, 40)]).unwrap();
    let text = |distances: &[(u32, u32, u32)]| with(distances).unwrap_err().to_string();
    assert!(text(&[(0, 1, 20)]).contains("The distance between node 0 and 2 is missing"));
    let one_way = text(&[(0, 1, 20), (1, 0, 21), (2, 0, 30), (1, 2, 40)]);
    assert!(
        one_way.contains("At least one asymmetrical pair"),
        "{one_way}"
    );
}

#[test]
fn backends_are_used_once_and_all_of_them() {
    let text = refused_with(|parts| parts.dimms[0].backend = "m0".into());
    assert!(text.contains("can't use already busy memdev: m0"), "{text}");
    let text = refused_with(|parts| parts.dimms[0].backend = "zz".into());
    assert!(text.contains("Device 'zz' not found"), "{text}");
    let text = refused_with(|parts| parts.dimms.clear());
    assert!(text.contains("\"d0\" is used by nothing"), "{text}");
    let mut parts = MachineParts::of(CpuCount::ONE, backend("ram0", 64 * MIB));
    parts.ram_backend = Some("nope".into());
    let text = refused(parts);
    assert!(text.contains("Memory backend 'nope' not found"), "{text}");
}

#[test]
fn modules_that_do_not_fit_are_refused_in_qemus_words() {
    let cases: [(&str, Change); 9] = [
        (
            "no slots where allocated, please specify the 'slots' option",
            |parts| parts.memory.slots = 0,
        ),
        ("invalid slot number 9, valid range is [0-1]", |parts| {
            parts.dimms[0].slot = Some(9)
        }),
        (
            "'DIMM property node has value 3' which exceeds the number of numa nodes: 2",
            |parts| parts.dimms[0].node = 3,
        ),
        ("address must be aligned to 0x200000 bytes", |parts| {
            parts.dimms[0].guest_address = Some((4 << 30) + 1)
        }),
        (
            "not enough space, currently 0x0 in use of total space for memory devices 0x4000000",
            |parts| parts.memory.max_bytes = Some(192 * MIB),
        ),
        (
            "can't add memory device [0xc0000000:0x8000000], usable range for memory devices \
             [0x100000000:",
            |parts| parts.dimms[0].guest_address = Some(3 << 30),
        ),
        (
            "invalid value of maxmem: maximum memory size (0x4000000) must be at least the \
             initial memory size (0x8000000)",
            |parts| parts.memory.max_bytes = Some(64 * MIB),
        ),
        ("memory slots were specified but", |parts| {
            parts.memory.max_bytes = Some(128 * MIB)
        }),
        ("unsupported number of memory slots: 257", |parts| {
            parts.memory.slots = 257
        }),
    ];
    for (expected, change) in cases {
        let text = refused_with(change);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn modules_take_the_first_slot_and_the_first_gap_that_fits() {
    let mut parts = two_nodes();
    parts.memory.slots = 3;
    let more = |id: &str, parts: &mut MachineParts| {
        parts.backends.push(backend(id, 64 * MIB));
        parts.dimms.push(DimmParts {
            id: format!("dimm-{id}"),
            backend: id.into(),
            ..DimmParts::default()
        });
    };
    more("d1", &mut parts);
    more("d2", &mut parts);
    // The first leaves a gap in front of it that only small ones fit into.
    parts.dimms[0].guest_address = Some((4 << 30) + 64 * MIB);
    let spec = MachineSpec::from_parts(parts.clone()).unwrap();
    let places: Vec<(u32, u64)> = spec
        .dimms()
        .iter()
        .map(|dimm| (dimm.slot(), dimm.guest_address() - (4 << 30)))
        .collect();
    assert_eq!(places, [(0, 64 * MIB), (1, 0), (2, 192 * MIB)]);
    parts.memory.slots = 2;
    let text = refused(parts.clone());
    assert!(
        text.contains("\"dimm-d2\": no free slots available"),
        "{text}"
    );
    parts.memory.slots = 3;
    parts.dimms[1].guest_address = Some((4 << 30) + 128 * MIB);
    let text = refused(parts.clone());
    assert!(
        text.contains("address range conflicts with memory device id='dimm0'"),
        "{text}"
    );
    parts.dimms[1].slot = Some(0);
    assert!(refused(parts.clone()).contains("slot 0 is busy"));
    parts.dimms[1].id = "dimm0".into();
    assert!(refused(parts).contains("Duplicate device ID 'dimm0'"));
}

#[test]
fn main_memory_is_never_rom_and_a_module_may_be() {
    let rom = |id: &str| {
        BackendSpec::from_options(BackendOptions {
            kind: BackendKind::File,
            id: id.into(),
            path: Some("file".into()),
            bytes: 128 * MIB,
            readonly: true,
            ..BackendOptions::default()
        })
        .unwrap()
    };
    let text = refused(MachineParts::of(CpuCount::ONE, rom("pc.ram")));
    assert!(text.contains("add rom=off for a clone"), "{text}");
    let mut parts = two_nodes();
    parts.backends[0] = rom("d0");
    assert!(MachineSpec::from_parts(parts).unwrap().backends()[2].is_rom());
}

#[test]
fn a_machine_has_a_role_when_every_backend_has() {
    let file = |id: &str, share, readonly| {
        BackendSpec::from_options(BackendOptions {
            kind: BackendKind::File,
            id: id.into(),
            path: Some(id.into()),
            bytes: 64 * MIB,
            share: Some(share),
            readonly,
            rom: OnOffAuto::Off,
            ..BackendOptions::default()
        })
        .unwrap()
    };
    let machine = |backends| MachineSpec::new(CpuCount::ONE, backends).unwrap();
    let template = machine(vec![file("a", true, false), file("b", true, false)]);
    assert_eq!(template.check_role(Role::Template), Ok(()));
    let clone = machine(vec![file("a", false, true), file("b", false, false)]);
    assert_eq!(clone.check_role(Role::Clone), Ok(()));
    let mixed = machine(vec![file("a", true, false), file("b", false, true)]);
    let text = mixed.check_role(Role::Template).unwrap_err().to_string();
    assert!(
        text.starts_with("memory backend \"b\" keeps what"),
        "{text}"
    );
    let text = mixed.check_role(Role::Clone).unwrap_err().to_string();
    assert!(
        text.starts_with("memory backend \"a\" writes its file"),
        "{text}"
    );
    let plain = machine(vec![backend("ram0", 64 * MIB)]);
    let text = plain.check_role(Role::Clone).unwrap_err().to_string();
    assert!(text.contains("\"ram0\" has no file, so"), "{text}");
}

proptest! {
    #[test]
    fn no_sizes_panic(sizes in proptest::collection::vec(any::<u64>(), 0..20)) {
        let backends = sizes
            .iter()
            .enumerate()
            .map(|(n, &bytes)| BackendSpec::new(format!("ram{n}"), bytes))
            .collect::<Result<Vec<_>, _>>();
        if let Ok(backends) = backends
            && let Ok(spec) = MachineSpec::new(CpuCount::ONE, backends)
        {
            prop_assert!(spec.layout().total_bytes() >= MIN_RAM_BYTES);
        }
    }

    #[test]
    fn modules_never_meet(
        sizes in proptest::collection::vec(1_u64..200, 1..8),
        asked in proptest::collection::vec(proptest::option::of(0_u64..600), 8),
    ) {
        let mut parts = MachineParts::of(CpuCount::ONE, backend("ram0", 64 * MIB));
        parts.memory.slots = 8;
        parts.memory.max_bytes = Some(8 << 30);
        for (n, (&size, asked)) in sizes.iter().zip(&asked).enumerate() {
            parts.backends.push(backend(&format!("d{n}"), size * MIB));
            parts.dimms.push(DimmParts {
                id: format!("dimm{n}"),
                backend: format!("d{n}"),
                guest_address: asked.map(|mib| (4 << 30) + mib * 2 * MIB),
                ..DimmParts::default()
            });
        }
        if let Ok(spec) = MachineSpec::from_parts(parts) {
            let mut end = 0;
            for segment in spec.layout().segments() {
                prop_assert!(segment.guest_address >= end);
                end = segment.guest_address + segment.bytes;
            }
            prop_assert_eq!(MachineSpec::from_parts(spec.to_parts()).unwrap(), spec);
        }
    }
}
