#![forbid(unsafe_code)]
//! Which CPU features a guest sees.

use std::fmt;

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

/// Adds to what `KVM_GET_SUPPORTED_CPUID` says that the in-kernel APIC has a TSC deadline timer,
/// which KVM tells by `KVM_CAP_TSC_DEADLINE_TIMER` only.
pub fn offer_tsc_deadline(supported: &mut [CpuidEntry]) {
    let _ = supported;
    todo!()
}

/// The leaves of CPU number `cpu` of `cpus`, from what the host supports
/// (`KVM_GET_SUPPORTED_CPUID`, and [`offer_tsc_deadline`] where it applies).
#[must_use]
pub fn guest_cpuid(supported: &[CpuidEntry], cpu: u8, cpus: u8) -> Vec<CpuidEntry> {
    let _ = (supported, cpu, cpus);
    todo!()
}

/// What `host` lacks of the features in `wanted`; empty when a machine with `wanted` can run.
#[must_use]
pub fn missing_features(wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<MissingFeature> {
    let _ = (wanted, host);
    todo!()
}

/// A feature that a template needs and a host lacks. `Display` names it as Linux does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingFeature {
    text: String,
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
