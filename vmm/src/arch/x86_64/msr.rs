#![forbid(unsafe_code)]
//! Which model specific registers are saved, in which order they are restored, and their names.
//!
//! Left out: what other state has (`APIC_BASE`, `EFER` and the segment bases are system registers,
//! the x2APIC's registers are the local APIC's), what belongs to features that
//! [`guest_cpuid`](super::cpuid::guest_cpuid) hides (performance counters, VMX, SVM, AMX, CET, MPX,
//! TSX, asynchronous page faults, Hyper-V), and what tells facts of the host
//! (`ARCH_CAPABILITIES`, microcode revision): a clone sees those of the host that it runs on, and
//! not every KVM lets them be set.
//!
//! KVM's wall clock registers are left out too. A guest writes them each time it wants to know the
//! time of boot, and setting one makes KVM write into guest RAM.

/// Time stamp counter.
const TSC: u32 = 0x10;
/// When the APIC's timer fires next.
const TSC_DEADLINE: u32 = 0x6e0;
/// Default memory type.
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Switches of CPU behaviour.
const MISC_ENABLE: u32 = 0x1a0;

/// What is saved, in restore order. The TSC comes first, because deadlines and clocks are compared
/// with it; KVM's clock follows the registers of the CPU; the TSC deadline is last: it arms a timer
/// and is ignored unless the local APIC is in deadline mode, so the local APIC is restored before
/// this list and the TSC before everything.
const SAVED: &[u32] = &[
    TSC,
    0x3b,
    // Where the kernel is entered.
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
    // How the CPU behaves.
    MISC_ENABLE,
    0x140,
    0x277,
    0x48,
    0xc001_011f,
    0xe1,
    0xda0,
    // Machine check: its switches and state.
    0x17a,
    0x17b,
    // Memory types.
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    MTRR_DEFAULT_TYPE,
    // KVM's own.
    0x12,
    0x4b56_4d01,
    0x4b56_4d03,
    0x4b56_4d04,
    0x4b56_4d05,
    TSC_DEADLINE,
];

/// The MTRRs, which every KVM has and lets be saved, and which older ones do not list.
fn is_always_there(index: u32) -> bool {
    matches!(index, 0x200..=0x20f | 0x250 | 0x258 | 0x259 | 0x268..=0x26f | MTRR_DEFAULT_TYPE)
}

/// The MSRs to save, in the order in which they are to be restored, out of those that the host
/// lists (`KVM_GET_MSR_INDEX_LIST`), and the MTRRs.
///
/// Restore them after the local APIC. One that cannot be read is not saved; one that was saved and
/// cannot be set is an error to be reported with its [`name`].
#[must_use]
pub fn to_save(index_list: &[u32]) -> Vec<u32> {
    SAVED
        .iter()
        .copied()
        .filter(|index| is_always_there(*index) || index_list.contains(index))
        .collect()
}

/// MSRs (index, value) that every CPU starts with and that are not as reset leaves them, as a PC's
/// firmware would set them.
#[must_use]
pub fn boot_msrs() -> Vec<(u32, u64)> {
    /// Fast string operations; no branch trace store; no precise event sampling.
    const FAST_STRINGS: u64 = 1 << 0 | 1 << 11 | 1 << 12;
    /// MTRRs on, write-back by default.
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    vec![
        (MISC_ENABLE, FAST_STRINGS),
        (MTRR_DEFAULT_TYPE, ENABLED_WRITE_BACK),
    ]
}

/// The manual's name of an MSR, of those that are saved and of others that errors may be about.
#[must_use]
pub fn name(index: u32) -> Option<&'static str> {
    NAMES
        .iter()
        .find(|(named, _)| *named == index)
        .map(|(_, name)| *name)
}

/// Intel SDM volume 4, AMD APM volume 2 appendix A, Linux `kvm_para.h`.
const NAMES: &[(u32, &str)] = &[
    (0x10, "IA32_TIME_STAMP_COUNTER"),
    (0x11, "KVM_WALL_CLOCK"),
    (0x12, "KVM_SYSTEM_TIME"),
    (0x1b, "IA32_APIC_BASE"),
    (0x34, "MSR_SMI_COUNT"),
    (0x3a, "IA32_FEATURE_CONTROL"),
    (0x3b, "IA32_TSC_ADJUST"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x49, "IA32_PRED_CMD"),
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0x9e, "IA32_SMBASE"),
    (0xce, "MSR_PLATFORM_INFO"),
    (0xe1, "IA32_UMWAIT_CONTROL"),
    (0xfe, "IA32_MTRRCAP"),
    (0x10a, "IA32_ARCH_CAPABILITIES"),
    (0x122, "IA32_TSX_CTRL"),
    (0x140, "MSR_MISC_FEATURES_ENABLES"),
    (0x174, "IA32_SYSENTER_CS"),
    (0x175, "IA32_SYSENTER_ESP"),
    (0x176, "IA32_SYSENTER_EIP"),
    (0x179, "IA32_MCG_CAP"),
    (0x17a, "IA32_MCG_STATUS"),
    (0x17b, "IA32_MCG_CTL"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x1c4, "IA32_XFD"),
    (0x1c5, "IA32_XFD_ERR"),
    (0x1d9, "IA32_DEBUGCTL"),
    (0x200, "IA32_MTRR_PHYSBASE0"),
    (0x201, "IA32_MTRR_PHYSMASK0"),
    (0x202, "IA32_MTRR_PHYSBASE1"),
    (0x203, "IA32_MTRR_PHYSMASK1"),
    (0x204, "IA32_MTRR_PHYSBASE2"),
    (0x205, "IA32_MTRR_PHYSMASK2"),
    (0x206, "IA32_MTRR_PHYSBASE3"),
    (0x207, "IA32_MTRR_PHYSMASK3"),
    (0x208, "IA32_MTRR_PHYSBASE4"),
    (0x209, "IA32_MTRR_PHYSMASK4"),
    (0x20a, "IA32_MTRR_PHYSBASE5"),
    (0x20b, "IA32_MTRR_PHYSMASK5"),
    (0x20c, "IA32_MTRR_PHYSBASE6"),
    (0x20d, "IA32_MTRR_PHYSMASK6"),
    (0x20e, "IA32_MTRR_PHYSBASE7"),
    (0x20f, "IA32_MTRR_PHYSMASK7"),
    (0x250, "IA32_MTRR_FIX64K_00000"),
    (0x258, "IA32_MTRR_FIX16K_80000"),
    (0x259, "IA32_MTRR_FIX16K_A0000"),
    (0x268, "IA32_MTRR_FIX4K_C0000"),
    (0x269, "IA32_MTRR_FIX4K_C8000"),
    (0x26a, "IA32_MTRR_FIX4K_D0000"),
    (0x26b, "IA32_MTRR_FIX4K_D8000"),
    (0x26c, "IA32_MTRR_FIX4K_E0000"),
    (0x26d, "IA32_MTRR_FIX4K_E8000"),
    (0x26e, "IA32_MTRR_FIX4K_F0000"),
    (0x26f, "IA32_MTRR_FIX4K_F8000"),
    (0x277, "IA32_PAT"),
    (0x2ff, "IA32_MTRR_DEF_TYPE"),
    (0x345, "IA32_PERF_CAPABILITIES"),
    (0x6e0, "IA32_TSC_DEADLINE"),
    (0xd90, "IA32_BNDCFGS"),
    (0xda0, "IA32_XSS"),
    (0xc000_0080, "IA32_EFER"),
    (0xc000_0081, "IA32_STAR"),
    (0xc000_0082, "IA32_LSTAR"),
    (0xc000_0083, "IA32_CSTAR"),
    (0xc000_0084, "IA32_FMASK"),
    (0xc000_0100, "IA32_FS_BASE"),
    (0xc000_0101, "IA32_GS_BASE"),
    (0xc000_0102, "IA32_KERNEL_GS_BASE"),
    (0xc000_0103, "IA32_TSC_AUX"),
    (0xc001_0015, "HWCR"),
    (0xc001_011f, "VIRT_SPEC_CTRL"),
    (0x4b56_4d00, "MSR_KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, "MSR_KVM_SYSTEM_TIME_NEW"),
    (0x4b56_4d02, "MSR_KVM_ASYNC_PF_EN"),
    (0x4b56_4d03, "MSR_KVM_STEAL_TIME"),
    (0x4b56_4d04, "MSR_KVM_PV_EOI_EN"),
    (0x4b56_4d05, "MSR_KVM_POLL_CONTROL"),
    (0x4b56_4d06, "MSR_KVM_ASYNC_PF_INT"),
    (0x4b56_4d07, "MSR_KVM_ASYNC_PF_ACK"),
    (0x4b56_4d08, "MSR_KVM_MIGRATION_CONTROL"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn only_what_the_host_lists_is_saved_beside_the_mtrrs() {
        let saved = to_save(&[0x6e0, 0xc000_0081, 0x10, 0xdead]);
        let others: Vec<u32> = saved
            .iter()
            .copied()
            .filter(|i| !is_always_there(*i))
            .collect();
        assert_eq!(others, [0x10, 0xc000_0081, 0x6e0], "in restore order");
        assert_eq!(saved.len(), others.len() + 16 + 11 + 1);
    }

    #[test]
    fn the_tsc_is_first_and_the_deadline_last() {
        let saved = to_save(SAVED);
        assert_eq!(saved, SAVED);
        assert_eq!(saved.first(), Some(&TSC));
        assert_eq!(saved.last(), Some(&TSC_DEADLINE));
    }

    #[test]
    fn every_saved_register_has_a_name_and_appears_once() {
        let unique: HashSet<u32> = SAVED.iter().copied().collect();
        assert_eq!(unique.len(), SAVED.len());
        for index in SAVED.iter().chain(&[0x10a, 0x1b]) {
            assert!(name(*index).is_some(), "MSR {index:#x}");
        }
        assert_eq!(
            NAMES.iter().map(|(i, _)| i).collect::<HashSet<_>>().len(),
            NAMES.len()
        );
        assert_eq!(name(0x10a), Some("IA32_ARCH_CAPABILITIES"));
        assert_eq!(name(0xdead), None);
    }

    #[test]
    fn what_boot_sets_is_saved() {
        for (index, _) in boot_msrs() {
            assert!(SAVED.contains(&index));
        }
    }
}
