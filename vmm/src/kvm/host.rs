#![forbid(unsafe_code)]
//! What this host's KVM offers.

use std::io;
use std::sync::OnceLock;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::{KvmError, ioctl};
use crate::arch::x86_64::cpuid::{CpuidEntry, offer_tsc_deadline};
use crate::arch::x86_64::msr;

/// Without these no machine can run, be paused or be saved. All are older than Linux 5.10.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// `/dev/kvm`, opened and checked once per process. A VM belongs to the memory of the process that
/// makes it, this descriptor does not: forks of a process that has it use it for VMs of their own.
pub(super) fn shared() -> Result<&'static Kvm, KvmError> {
    static KVM: OnceLock<Kvm> = OnceLock::new();
    if let Some(kvm) = KVM.get() {
        return Ok(kvm);
    }
    let opened = open()?;
    Ok(KVM.get_or_init(|| opened))
}

/// Has all that this process will ask of KVM as a whole answered now, for the forks to come. No VM
/// is left.
pub fn learn() -> Result<(), KvmError> {
    let kvm = shared()?;
    msr_list(kvm)?;
    let vm = super::vm::Vm::create()?;
    vm.create_chips()?;
    vm.create_vcpu(0)?.host_tsc_khz();
    vm.clock_follows_realtime();
    Ok(())
}

/// Opens `/dev/kvm` and checks that it can do what every machine needs.
fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| KvmError::Open(io::Error::from_raw_os_error(e.errno())))?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::ApiVersion {
            actual: version,
            expected: KVM_API_VERSION,
        });
    }
    for (capability, name) in REQUIRED {
        if !kvm.check_extension(*capability) {
            return Err(KvmError::Missing { capability: name });
        }
    }
    Ok(kvm)
}

/// The CPUID leaves that this host's KVM can give a guest.
pub fn host_cpuid() -> Result<Vec<CpuidEntry>, KvmError> {
    supported_cpuid(shared()?)
}

/// The numbers of the model specific registers that this host's KVM can save and restore, those
/// included that every KVM has and older ones do not list.
pub fn host_msrs() -> Result<Vec<u32>, KvmError> {
    Ok(msr::to_save(msr_list(shared()?)?))
}

/// `KVM_GET_SUPPORTED_CPUID`, asked once per process: the host does not change, and where the host
/// is itself a guest the kernel traps for every leaf (1 ms).
pub(super) fn supported_cpuid(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmError> {
    static SUPPORTED: OnceLock<Vec<CpuidEntry>> = OnceLock::new();
    if let Some(known) = SUPPORTED.get() {
        return Ok(known.clone());
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
    let mut leaves: Vec<_> = cpuid.as_slice().iter().map(entry_from_kvm).collect();
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        offer_tsc_deadline(&mut leaves);
    }
    Ok(SUPPORTED.get_or_init(|| leaves).clone())
}

/// `KVM_GET_MSR_INDEX_LIST`, asked once per process.
pub(super) fn msr_list(kvm: &Kvm) -> Result<&'static [u32], KvmError> {
    static LISTED: OnceLock<Vec<u32>> = OnceLock::new();
    if let Some(known) = LISTED.get() {
        return Ok(known);
    }
    let list = kvm
        .get_msr_index_list()
        .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(LISTED.get_or_init(|| list.as_slice().to_vec()))
}

fn entry_from_kvm(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

/// The kernel's form of a CPUID leaf.
pub(super) fn entry_to_kvm(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    }
}
