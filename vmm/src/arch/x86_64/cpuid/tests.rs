#![forbid(unsafe_code)]
use proptest::prelude::*;

use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry {
        function,
        index,
        flags: u32::from(matches!(function, 0x4 | 0x7 | 0xb | 0xd | 0x8000_001d)) * INDEX_MATTERS,
        eax,
        ebx,
        ecx,
        edx,
    }
}

fn vendor(max: u32, name: &[u8; 12]) -> CpuidEntry {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    leaf(0, 0, [max, word(0), word(8), word(4)])
}

/// A host with every feature bit there is.
fn everything() -> Vec<CpuidEntry> {
    let all = [u32::MAX; 4];
    vec![
        vendor(0x24, b"GenuineIntel"),
        leaf(0x1, 0, [0x000a_0671, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0x4, 0, [0xfc00_4121, 1, 2, 3]),
        leaf(0x4, 3, [0xfc1f_c163, 1, 2, 3]),
        leaf(0x5, 0, all),
        leaf(0x6, 0, all),
        leaf(0x7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0x7, 1, all),
        leaf(0x7, 2, all),
        leaf(0xa, 0, all),
        leaf(0xb, 0, all),
        leaf(0xd, 0, [0x0006_02ff, 11008, 11008, 0]),
        leaf(0xd, 1, [0x1f, 0, 0x1800, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 3, [64, 960, 0, 0]),
        leaf(0xd, 4, [64, 1024, 0, 0]),
        leaf(0xd, 5, [64, 1088, 0, 0]),
        leaf(0xd, 6, [512, 1152, 0, 0]),
        leaf(0xd, 7, [1024, 1664, 0, 0]),
        leaf(0xd, 9, [8, 2688, 0, 0]),
        leaf(0xd, 17, [64, 2752, 2, 0]),
        leaf(0xd, 18, [8192, 2816, 6, 0]),
        leaf(0x14, 0, all),
        leaf(0x15, 0, all),
        leaf(0x1d, 0, all),
        leaf(0x1f, 0, all),
        leaf(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
        leaf(0x4000_0001, 0, all),
        leaf(0x8000_0000, 0, [0x8000_0026, 0, 0, 0]),
        leaf(0x8000_0001, 0, all),
        leaf(0x8000_0007, 0, all),
        leaf(0x8000_0008, 0, [0x302e, u32::MAX, 0, 0]),
        leaf(0x8000_000a, 0, all),
        leaf(0x8000_001f, 0, all),
    ]
}

fn amd() -> Vec<CpuidEntry> {
    let mut leaves = everything();
    leaves[0] = vendor(0x10, b"AuthenticAMD");
    leaves.push(leaf(0x8000_001d, 3, [0x0001_c163, 1, 2, 3]));
    leaves.push(leaf(0x8000_001e, 0, [9, 9, 9, 9]));
    leaves
}

fn at(leaves: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
    *find(leaves, function, index).unwrap()
}

#[test]
fn each_cpu_has_its_own_number_everywhere() {
    for cpu in 0..3 {
        let leaves = guest_cpuid(&amd(), cpu, 3);
        assert_eq!(at(&leaves, 1, 0).ebx >> 24, u32::from(cpu));
        for index in 0..3 {
            assert_eq!(at(&leaves, 0xb, index).edx, u32::from(cpu));
        }
        assert_eq!(at(&leaves, 0x8000_001e, 0).eax, u32::from(cpu));
        assert_eq!(at(&leaves, 0x8000_001e, 0).ebx, u32::from(cpu));
    }
}

#[test]
fn three_cpus_are_three_cores_of_one_package() {
    let leaves = guest_cpuid(&everything(), 0, 3);
    let one = at(&leaves, 1, 0);
    assert_eq!(one.ebx >> 16 & 0xff, 4, "APIC ids of the package");
    assert_ne!(one.edx & 1 << 28, 0, "more than one logical CPU");
    let levels: Vec<_> = (0..3)
        .map(|index| at(&leaves, 0xb, index))
        .map(|l| (l.eax, l.ebx, l.ecx, l.flags))
        .collect();
    assert_eq!(levels, [(0, 1, 0x100, 1), (2, 3, 0x201, 1), (0, 0, 2, 1)]);
    let (l1, l3) = (at(&leaves, 4, 0).eax, at(&leaves, 4, 3).eax);
    assert_eq!((l1 >> 14 & 0xfff, l1 >> 26), (0, 3));
    assert_eq!((l3 >> 14 & 0xfff, l3 >> 26), (3, 3));
    assert_eq!(
        at(&leaves, 0x8000_0008, 0).ecx,
        0,
        "reserved at this vendor"
    );
}

#[test]
fn amd_counts_its_cores_in_its_own_leaves() {
    let leaves = guest_cpuid(&amd(), 1, 2);
    assert_eq!(at(&leaves, 0x8000_0008, 0).ecx, 1 | 1 << 12);
    assert_ne!(at(&leaves, 0x8000_0001, 0).ecx & 1 << 1, 0);
    assert_eq!(at(&leaves, 0x8000_001d, 3).eax >> 14 & 0xfff, 1);
    let single = guest_cpuid(&amd(), 0, 1);
    assert_eq!(at(&single, 0x8000_0008, 0).ecx, 0);
    assert_eq!(at(&single, 0x8000_0001, 0).ecx & 1 << 1, 0);
    assert_eq!(at(&single, 1, 0).edx & 1 << 28, 0);
}

#[test]
fn what_cannot_be_restored_is_left_out() {
    let leaves = guest_cpuid(&everything(), 0, 1);
    for function in [0x5, 0xa, 0x14, 0x15, 0x1d, 0x1f, 0x8000_000a, 0x8000_001f] {
        assert_eq!(find(&leaves, function, 0), None, "leaf {function:#x}");
    }
    assert_eq!(at(&leaves, 1, 0).ecx & 1 << 5, 0, "vmx");
    assert_eq!(at(&leaves, 0x8000_0001, 0).ecx & 1 << 2, 0, "svm");
    assert_eq!(at(&leaves, 7, 0).edx & 1 << 24, 0, "amx_tile");
    assert_eq!(at(&leaves, 7, 0).ebx & 1 << 11, 0, "rtm");
    assert_eq!(at(&leaves, 0x8000_0007, 0).edx, 0, "invariant tsc");
    assert_eq!(at(&leaves, 0x8000_0000, 0).eax, LAST_EXTENDED_LEAF);
    let kvm = at(&leaves, 0x4000_0001, 0).eax;
    assert_eq!(kvm & (1 << 4 | 1 << 10 | 1 << 14), 0, "async page faults");
    assert_ne!(kvm & 1 << 3, 0, "kvm-clock");
    assert_ne!(at(&leaves, 1, 0).ecx & 1 << 31, 0, "hypervisor");
    assert_ne!(at(&leaves, 7, 0).ebx & 1 << 16, 0, "avx512f");
}

#[test]
fn the_extended_state_leaf_agrees_with_itself() {
    let leaves = guest_cpuid(&everything(), 0, 1);
    let zero = at(&leaves, 0xd, 0);
    assert_eq!((zero.eax, zero.edx), (0x2e7, 0));
    assert_eq!((zero.ebx, zero.ecx), (576, 2688 + 8));
    assert_eq!(at(&leaves, 0xd, 1).eax, 0xf, "no XFD");
    assert_eq!(at(&leaves, 0xd, 1).ecx, 0, "no supervisor state");
    for index in [3, 4, 17, 18] {
        assert_eq!(find(&leaves, 0xd, index), None);
    }
}

#[test]
fn the_deadline_timer_is_offered_only_when_the_host_has_it() {
    let mut host = vec![leaf(1, 0, [0; 4])];
    assert_eq!(at(&guest_cpuid(&host, 0, 1), 1, 0).ecx & TSC_DEADLINE, 0);
    offer_tsc_deadline(&mut host);
    assert_ne!(at(&guest_cpuid(&host, 0, 1), 1, 0).ecx & TSC_DEADLINE, 0);
}

#[test]
fn missing_features_are_named() {
    let guest = guest_cpuid(&everything(), 0, 2);
    let mut host = everything();
    for entry in &mut host {
        match (entry.function, entry.index) {
            (7, 0) => entry.ebx &= !(1 << 16),
            (1, 0) => entry.ecx &= !TSC_DEADLINE,
            (0xd, 9) => entry.ebx = 2432,
            (0xd, 0) => entry.eax &= !(1 << 5),
            (0x8000_0008, 0) => entry.eax = 0x3027,
            _ => {}
        }
    }
    let names: Vec<String> = missing_features(&guest, &host)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        names,
        [
            "tsc_deadline_timer (cpuid 1.0 ecx bit 24)",
            "avx512f (cpuid 7.0 ebx bit 16)",
            "xsave component 5 of 64 bytes at offset 1088 (host has none)",
            "xsave component 9 of 8 bytes at offset 2688 (host has 8 bytes at offset 2432)",
            "46 physical address bits (host has 39)",
        ]
    );
}

#[test]
fn another_vendor_is_named() {
    let guest = guest_cpuid(&everything(), 0, 1);
    let mut host = everything();
    host[0] = vendor(0x10, b"AuthenticAMD");
    assert_eq!(
        missing_features(&guest, &host)[0].to_string(),
        "cpu vendor GenuineIntel (host has AuthenticAMD)"
    );
}

fn any_entry() -> impl Strategy<Value = CpuidEntry> {
    let functions = prop::sample::select(vec![
        0,
        1,
        4,
        6,
        7,
        0xb,
        0xd,
        0x4000_0001,
        0x8000_0001,
        0x8000_0008,
        0x8000_0021,
        0x1234,
    ]);
    (functions, 0_u32..70, 0_u32..2, any::<[u32; 4]>()).prop_map(
        |(function, index, flags, [eax, ebx, ecx, edx])| CpuidEntry {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        },
    )
}

proptest! {
    #[test]
    fn a_host_lacks_nothing_of_itself_and_nothing_of_a_guest_made_on_it(
        leaves in prop::collection::vec(any_entry(), 0..40), cpu: u8, cpus: u8,
    ) {
        prop_assert_eq!(missing_features(&leaves, &leaves), []);
        // Leaves of one kind appear once on a real host.
        let mut seen = std::collections::HashSet::new();
        let host: Vec<CpuidEntry> = leaves
            .into_iter()
            .map(|leaf| CpuidEntry { flags: INDEX_MATTERS, ..leaf })
            .filter(|leaf| seen.insert((leaf.function, leaf.index)))
            .collect();
        let guest = guest_cpuid(&host, cpu, cpus);
        prop_assert_eq!(missing_features(&guest, &host), []);
    }
}

#[test]
fn cores_of_two_nodes_share_no_cache() {
    let sharing = |bits| {
        let leaves = guest_cpuid_in_nodes(&everything(), 0, 4, bits);
        let mut caches = leaves.iter().filter(|leaf| leaf.function == 4);
        let last = caches.find(|leaf| leaf.eax >> 5 & 7 == 3).unwrap();
        last.eax >> 14 & 0xfff
    };
    assert_eq!([0, 1, 2, 9].map(sharing), [0, 1, 3, 3]);
    // CPU 3 of 4, two a package: the second core of the second package.
    let leaves = guest_cpuid_in_nodes(&amd(), 3, 4, 1);
    let leaf = at(&leaves, 0x8000_001e, 0);
    assert_eq!((leaf.eax, leaf.ebx, leaf.ecx), (3, 1, 1));
    assert_eq!(at(&leaves, 0x8000_0008, 0).ecx, 1 | 1 << 12);
}
