#![forbid(unsafe_code)]
//! Where CPUID has feature bits, and what Linux calls them in `/proc/cpuinfo`.

use super::CpuidEntry;

/// An output register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// 32 feature bits.
#[derive(Debug)]
pub(super) struct Word {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) register: Register,
    /// Bits that say nothing about the host: they follow the guest's own settings or its topology,
    /// or tell how an instruction behaves that nobody relies on.
    pub(super) ignored: u32,
    /// 32 names, lowest bit first; `-` where there is none.
    names: &'static str,
}

impl Word {
    /// Linux's name of a bit.
    pub(super) fn name(&self, bit: u32) -> Option<&'static str> {
        self.names
            .split_whitespace()
            .nth(usize::try_from(bit).ok()?)
            .filter(|&name| name != "-")
    }
}

const fn word(
    function: u32,
    index: u32,
    register: Register,
    ignored: u32,
    names: &'static str,
) -> Word {
    Word {
        function,
        index,
        register,
        ignored,
        names,
    }
}

/// Every word that [`super::missing_features`] compares.
pub(super) const WORDS: &[Word] = &[
    word(
        0x1,
        0,
        Register::Edx,
        // Number of logical CPUs.
        1 << 28,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov
         pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    word(
        0x1,
        0,
        Register::Ecx,
        // OSXSAVE, hypervisor.
        1 << 27 | 1 << 31,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm
         - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx
         f16c rdrand hypervisor",
    ),
    word(
        0x6,
        0,
        Register::Eax,
        0,
        "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req - - - -
         - - - hfi - - - - - - - - - - - -",
    ),
    word(
        0x7,
        0,
        Register::Ebx,
        // FDP_EXCPTN_ONLY, ZERO_FCS_FDS.
        1 << 6 | 1 << 13,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb
         intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    word(
        0x7,
        0,
        Register::Ecx,
        // OSPKE.
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 user_shstk gfni vaes
         vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid
         key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    word(
        0x7,
        0,
        Register::Edx,
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear
         rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt -
         amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    word(
        0x7,
        1,
        Register::Eax,
        0,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs
         fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - -
         invd_disable -",
    ),
    word(
        0x7,
        1,
        Register::Edx,
        0,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr prefetchi
         user_msr - - cet_sss avx10 - apx_f - - - - - - - - - -",
    ),
    word(
        0x7,
        2,
        Register::Edx,
        0,
        "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_dis monitor_mitg_no
         - - - - - - - - - - - - - - - - - - - - - - - -",
    ),
    word(
        0xd,
        1,
        Register::Eax,
        0,
        "xsaveopt xsavec xgetbv1 xsaves xfd - - - - - - - - - - -
         - - - - - - - - - - - - - - - -",
    ),
    word(
        0x4000_0001,
        0,
        Register::Eax,
        0,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time
         kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi
         kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id
         kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable
         - - - - - - -",
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        0,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov
         pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        // Number of cores.
        1 << 1,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs
         xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb -
         bpext ptsc perfctr_llc mwaitx - -",
    ),
    word(
        0x8000_0007,
        0,
        Register::Edx,
        0,
        "- - - - - - - hw_pstate constant_tsc cpb aperfmperf proc_feedback acc_power - - -
         - - - - - - - - - - - - - - - -",
    ),
    word(
        0x8000_0008,
        0,
        Register::Ebx,
        0,
        "clzero irperf xsaveerptr - rdpru - mba - - wbnoinvd - - ibpb - ibrs stibp ibrs_always
         stibp_always - ibrs_same_mode - - - amd_ppin ssbd virt_ssbd amd_ssb_no cppc amd_psfd
         btc_no ibpb_ret brs",
    ),
    word(
        0x8000_0021,
        0,
        Register::Eax,
        0,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - -
         - - - - - prefetchi - - - - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no -",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_names_32_bits() {
        for word in WORDS {
            assert_eq!(
                word.names.split_whitespace().count(),
                32,
                "{:#x}.{} {}",
                word.function,
                word.index,
                word.register.name()
            );
        }
    }

    #[test]
    fn well_known_bits_have_their_names() {
        let name = |function, index, register, bit| {
            WORDS
                .iter()
                .find(|w| (w.function, w.index, w.register) == (function, index, register))
                .and_then(|w| w.name(bit))
        };
        assert_eq!(name(1, 0, Register::Edx, 26), Some("sse2"));
        assert_eq!(name(1, 0, Register::Ecx, 24), Some("tsc_deadline_timer"));
        assert_eq!(name(1, 0, Register::Ecx, 28), Some("avx"));
        assert_eq!(name(1, 0, Register::Ecx, 30), Some("rdrand"));
        assert_eq!(name(7, 0, Register::Ebx, 16), Some("avx512f"));
        assert_eq!(name(7, 0, Register::Ebx, 5), Some("avx2"));
        assert_eq!(name(7, 0, Register::Ebx, 31), Some("avx512vl"));
        assert_eq!(name(7, 0, Register::Ecx, 16), Some("la57"));
        assert_eq!(name(7, 0, Register::Ecx, 22), Some("rdpid"));
        assert_eq!(name(7, 0, Register::Edx, 29), Some("arch_capabilities"));
        assert_eq!(name(7, 0, Register::Edx, 24), Some("amx_tile"));
        assert_eq!(name(7, 1, Register::Eax, 5), Some("avx512_bf16"));
        assert_eq!(name(7, 1, Register::Edx, 19), Some("avx10"));
        assert_eq!(name(0x8000_0001, 0, Register::Edx, 26), Some("pdpe1gb"));
        assert_eq!(name(0x8000_0001, 0, Register::Edx, 29), Some("lm"));
        assert_eq!(name(0x8000_0001, 0, Register::Ecx, 22), Some("topoext"));
        assert_eq!(name(0x8000_0008, 0, Register::Ebx, 24), Some("ssbd"));
        assert_eq!(name(0x8000_0021, 0, Register::Eax, 8), Some("autoibrs"));
        assert_eq!(
            name(0x4000_0001, 0, Register::Eax, 24),
            Some("kvm_clocksource_stable")
        );
        assert_eq!(name(1, 0, Register::Edx, 10), None);
    }
}
