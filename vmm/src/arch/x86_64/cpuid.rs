#![forbid(unsafe_code)]
//! Which CPU features a guest sees.
//!
//! A guest sees what the host's KVM supports, less what would keep a frozen machine from going on
//! elsewhere or what has no meaning in it ([`guest_cpuid`] lists it), with the machine's own
//! topology put in. A clone gets the leaves of its template, unchanged; [`missing_features`] says
//! beforehand what its host lacks for that.

mod features;
mod missing;
mod topology;

pub use missing::{MissingFeature, missing_features};

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, where it matters.
    pub index: u32,
    /// [`INDEX_MATTERS`] or 0: KVM's flags.
    pub flags: u32,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// Flag of an entry that is found by its index too (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
pub const INDEX_MATTERS: u32 = 1;

/// Highest extended leaf that is passed on; those above are about encryption and profiling.
const LAST_EXTENDED_LEAF: u32 = 0x8000_0021;
/// Highest KVM leaf.
const LAST_KVM_LEAF: u32 = 0x4000_0001;
/// Leaf 1 ECX: the local APIC's timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Extended state components that are passed on: x87, SSE, AVX, AVX-512 (three), PKRU. Not MPX (3,
/// 4), which is gone from CPUs, and not AMX (17, 18), which a process must ask for.
const XSTATE_COMPONENTS: u64 = 0b10_1110_0111;
/// Size of the part of the extended state that is always there: legacy area and header.
const XSTATE_LEGACY_BYTES: u32 = 576;

/// KVM's paravirtual features that are passed on, by bit of leaf 0x40000001 EAX: kvm-clock (0, 3,
/// stable: 24), no I/O delay (1), steal time (5), PV EOI (6), unhalt (7), TLB flush (9), send IPI
/// (11), poll control (12), yield (13).
///
/// Asynchronous page faults (4, 10, 14) are left out: a guest that waits for such a fault when it
/// is frozen would wait for ever in its clones, which know nothing of it.
const KVM_FEATURES: u32 = 1 << 24 | 0b11_1010_1110_1011;

/// Adds to what `KVM_GET_SUPPORTED_CPUID` says that the in-kernel APIC has a TSC deadline timer,
/// which KVM tells by `KVM_CAP_TSC_DEADLINE_TIMER` only.
pub fn offer_tsc_deadline(supported: &mut [CpuidEntry]) {
    for entry in supported.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= TSC_DEADLINE;
    }
}

/// The leaves of CPU number `cpu` of `cpus`, from what the host supports
/// (`KVM_GET_SUPPORTED_CPUID`, and [`offer_tsc_deadline`] where it applies).
///
/// Left out, beside what KVM itself leaves out:
/// - nested virtualization (VMX, SVM): its state is not saved;
/// - performance counters, processor trace, debug store: theirs neither;
/// - AMX, MPX, SGX, CET and protection of memory by encryption;
/// - TSX, which microcode updates take away from one host and not from the next;
/// - MONITOR/MWAIT and frequency leaves (5, 0x15, 0x16), which describe one host;
/// - the invariant TSC, so that guests take kvm-clock, which is put right when a clone starts,
///   rather than a TSC that runs at another rate on another host;
/// - asynchronous page faults.
#[must_use]
pub fn guest_cpuid(supported: &[CpuidEntry], cpu: u8, cpus: u8) -> Vec<CpuidEntry> {
    guest_cpuid_in_nodes(supported, cpu, cpus, u32::MAX)
}

/// The same for CPUs in nodes: those whose numbers differ in the lowest `package_bits` bits only are in one
/// package and share its last level cache. A cache that two nodes share is one that Linux warns of.
#[must_use]
pub fn guest_cpuid_in_nodes(
    supported: &[CpuidEntry],
    cpu: u8,
    cpus: u8,
    package_bits: u32,
) -> Vec<CpuidEntry> {
    let topology = topology::Topology::new(cpu, cpus, package_bits);
    let mut leaves: Vec<CpuidEntry> = supported
        .iter()
        .filter(|entry| is_passed_on(entry))
        .copied()
        .collect();
    for entry in &mut leaves {
        filter(entry);
    }
    set_xstate_size(&mut leaves);
    topology.apply(&mut leaves);
    leaves
}

/// Whether a guest sees the leaf at all; what it does not see reads as zeros. Topology leaves that
/// are made anew are not passed on.
fn is_passed_on(entry: &CpuidEntry) -> bool {
    match entry.function {
        // Vendor, features, caches (2, 4), APIC timer, features, AVX10.
        0x0..=0x2 | 0x4 | 0x6 | 0x7 | 0x24 => true,
        0xd => entry.index < 2 || has_component(entry.index),
        0x4000_0000..=LAST_KVM_LEAF => true,
        // Features, brand, caches, sizes; large TLBs, FPU; caches, topology; features.
        0x8000_0000..=0x8000_0008 => true,
        0x8000_0019 | 0x8000_001a | 0x8000_001d | 0x8000_001e | LAST_EXTENDED_LEAF => true,
        _ => false,
    }
}

fn has_component(number: u32) -> bool {
    XSTATE_COMPONENTS.checked_shr(number).unwrap_or(0) & 1 != 0
}

/// Takes out of a leaf what a guest does not see.
fn filter(entry: &mut CpuidEntry) {
    match (entry.function, entry.index) {
        (0x1, _) => {
            // DTES64, MONITOR, DS-CPL, VMX, SMX, PDCM, DCA; OSXSAVE follows the guest's CR4.
            entry.ecx &=
                !(1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 15 | 1 << 18 | 1 << 27);
            // The guest is told that it is one.
            entry.ecx |= 1 << 31;
            // Debug store, ACPI clock control, thermal interrupt and monitor, PBE.
            entry.edx &= !(1 << 21 | 1 << 22 | 1 << 29 | 1 << 31);
        }
        // Always running APIC timer: the one bit with a meaning.
        (0x6, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 1 << 2, 0, 0, 0);
        }
        (0x7, 0) => {
            // SGX, HLE, RTM, RDT (12, 15), MPX, processor trace.
            entry.ebx &= !(1 << 2 | 1 << 4 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 25);
            // OSPKE follows the guest's CR4; shadow stacks; SGX launch control.
            entry.ecx &= !(1 << 4 | 1 << 7 | 1 << 30);
            // RTM always aborts, TSX load tracking, PCONFIG, LBR, IBT, AMX (22, 24, 25), and
            // ARCH_CAPABILITIES: a guest that was frozen where that register says "not vulnerable"
            // would go on without its mitigations on a host that is.
            entry.edx &= !(1 << 11
                | 1 << 16
                | 1 << 18
                | 1 << 19
                | 1 << 20
                | 1 << 22
                | 1 << 24
                | 1 << 25
                | 1 << 29);
        }
        (0x7, 1) => {
            // Performance counters, FRED, AMX-FP16, MSR lists.
            entry.eax &= !(1 << 8 | 1 << 17 | 1 << 21 | 1 << 27);
            // AMX-COMPLEX, CET supervisor shadow stacks.
            entry.edx &= !(1 << 8 | 1 << 18);
        }
        (0xd, 0) => {
            entry.eax &= low(XSTATE_COMPONENTS);
            entry.edx &= high(XSTATE_COMPONENTS);
        }
        // Compaction yes, extended feature disable (AMX) no, supervisor state none.
        (0xd, 1) => (entry.eax, entry.ecx, entry.edx) = (entry.eax & 0b1111, 0, 0),
        (0x4000_0000, _) => entry.eax = LAST_KVM_LEAF,
        (0x4000_0001, _) => (entry.eax, entry.edx) = (entry.eax & KVM_FEATURES, 0),
        (0x8000_0000, _) => entry.eax = entry.eax.min(LAST_EXTENDED_LEAF),
        (0x8000_0001, _) => {
            // SVM, OSVW, IBS, SKINIT, WDT, LWP, node id, counters (23, 24, 26, 27, 28), MWAITX.
            entry.ecx &= !(1 << 2
                | 1 << 9
                | 1 << 10
                | 1 << 12
                | 1 << 13
                | 1 << 15
                | 1 << 19
                | 1 << 23
                | 1 << 24
                | 1 << 26
                | 1 << 27
                | 1 << 28
                | 1 << 29);
        }
        (0x8000_0007, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Puts the size of the remaining components into leaf 0xd: EBX and ECX of index 0. KVM keeps EBX
/// (of what is enabled) up to date afterwards.
fn set_xstate_size(leaves: &mut [CpuidEntry]) {
    let size = leaves
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index >= 2)
        .map(|entry| entry.ebx.saturating_add(entry.eax))
        .fold(XSTATE_LEGACY_BYTES, u32::max);
    for entry in leaves.iter_mut() {
        if (entry.function, entry.index) == (0xd, 0) && entry.eax != 0 {
            (entry.ebx, entry.ecx) = (XSTATE_LEGACY_BYTES, size);
        }
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

fn high(value: u64) -> u32 {
    u32::try_from(value >> 32).unwrap_or(0)
}

/// The entry for a leaf; `index` is 0 where it does not matter.
fn find(leaves: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    leaves.iter().find(|entry| {
        entry.function == function && (entry.index == index || entry.flags & INDEX_MATTERS == 0)
    })
}

#[cfg(test)]
mod tests;
