#![forbid(unsafe_code)]
//! The saved state of one vCPU, and in which order it is read and written.

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::msr;
use crate::kvm::KvmError;
use crate::kvm::vcpu::Vcpu;

/// `IA32_TIME_STAMP_COUNTER`.
const MSR_TSC: u32 = 0x10;
/// `MSR_KVM_SYSTEM_TIME`, old and new: bit 0 is set while the guest uses kvmclock.
const MSRS_KVMCLOCK: [u32; 2] = [0x12, 0x4b56_4d01];
/// Where the local APIC has the count that its timer starts from, in bytes (Intel SDM, volume 3,
/// "Local APIC Register Address Map").
const APIC_INITIAL_COUNT: usize = 0x380;

/// A part of a vCPU's state that KVM reads and writes as one structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Section {
    /// Running, halted, waiting for a start-up interrupt.
    MpState,
    /// General purpose registers, instruction pointer, flags.
    Registers,
    /// Segments, control registers, EFER, APIC base.
    SystemRegisters,
    /// FPU, SSE, AVX and later register files.
    Xsave,
    /// Extended control registers.
    Xcrs,
    /// Debug registers.
    DebugRegisters,
    /// Local APIC.
    Lapic,
    /// Exceptions and interrupts on their way, NMI and SMI state.
    Events,
}

/// In which order sections are read.
///
/// - The state that KVM calls `mp_state` first: reading it lets KVM act on pending INIT and SIPI,
///   which changes everything else.
/// - Events last: reading the local APIC can move an interrupt on.
pub const SAVE_ORDER: [Section; 8] = [
    Section::MpState,
    Section::Registers,
    Section::SystemRegisters,
    Section::Xsave,
    Section::Xcrs,
    Section::DebugRegisters,
    Section::Lapic,
    Section::Events,
];

/// Sections that are written before the MSRs, in this order, after CPUID, the TSC's rate and the
/// TSC.
///
/// - General registers before events: writing them drops pending exceptions.
/// - System registers before the local APIC: they hold its base and mode.
/// - Local APIC before the MSRs: the TSC deadline is refused unless the timer is in that mode.
/// - `mp_state` before events, and it depends on which vCPU is the boot processor only.
pub const RESTORE_ORDER: [Section; 7] = [
    Section::MpState,
    Section::Registers,
    Section::SystemRegisters,
    Section::Xsave,
    Section::Xcrs,
    Section::DebugRegisters,
    Section::Lapic,
];

/// Everything of one vCPU that is not RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID answers on this vCPU (leaves differ by APIC id).
    pub cpuid: Vec<SavedCpuid>,
    /// The kernel's structures as bytes, in [`SAVE_ORDER`].
    pub sections: Vec<(Section, Vec<u8>)>,
    /// Model specific registers in the order in which they are written back.
    pub msrs: Vec<(u32, u64)>,
}

/// A CPUID leaf as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedCpuid {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
    /// KVM's flags: 1 when the subleaf matters.
    pub flags: u32,
    /// The four answers.
    pub registers: [u32; 4],
}

impl From<&CpuidEntry> for SavedCpuid {
    fn from(entry: &CpuidEntry) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        }
    }
}

impl From<&SavedCpuid> for CpuidEntry {
    fn from(saved: &SavedCpuid) -> Self {
        let [eax, ebx, ecx, edx] = saved.registers;
        Self {
            function: saved.function,
            index: saved.index,
            flags: saved.flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

/// How far a guest's time stamp counters go forward when it is restored.
///
/// The clock of a restored guest goes on as if it had not been frozen: `kvmclock` is moved by KVM
/// (see [`crate::kvm::irq`]), and the counters by the same wall-clock time, so that both kinds of
/// guest agree with the host's time and with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TscShift {
    /// Counter ticks to add on every vCPU.
    pub ticks: u64,
}

impl TscShift {
    /// The ticks of `elapsed_ns` nanoseconds at `khz` kHz.
    pub fn from_elapsed(elapsed_ns: u64, khz: u32) -> Self {
        let ticks = u128::from(elapsed_ns) * u128::from(khz) / 1_000_000;
        Self {
            ticks: u64::try_from(ticks).unwrap_or(u64::MAX),
        }
    }
}

impl VcpuState {
    /// Reads all state of a vCPU that does not run and whose last exit was consistent; all other
    /// vCPUs must be stopped too (interrupts between them are part of the state). `msrs` names the
    /// registers to read, in the order in which to write them back.
    pub fn save(vcpu: &Vcpu, cpuid: &[CpuidEntry], msrs: &[u32]) -> Result<Self, KvmError> {
        let sections = SAVE_ORDER
            .iter()
            .map(|&section| Ok((section, vcpu.section(section)?)))
            .collect::<Result<_, KvmError>>()?;
        Ok(Self {
            cpuid: cpuid.iter().map(SavedCpuid::from).collect(),
            sections,
            msrs: vcpu.msrs(msrs)?,
        })
    }

    /// Writes all state into a new vCPU whose CPUID and TSC rate are set. No vCPU may run.
    pub fn restore(&self, vcpu: &Vcpu, shift: TscShift) -> Result<(), KvmError> {
        // KVM takes writes of the counter on several vCPUs within a second as one and keeps them in
        // step.
        let mut msrs = self.msrs.clone();
        let tsc = msrs.iter_mut().find(|(index, _)| *index == MSR_TSC);
        if let Some((_, value)) = tsc {
            *value = value.wrapping_add(shift.ticks);
        }
        if self.has_apic_timer()? {
            // The counter first: the timer that is restored with the local APIC is computed from it.
            let (tsc, others): (Vec<_>, Vec<_>) =
                msrs.into_iter().partition(|&(index, _)| index == MSR_TSC);
            vcpu.set_msrs(&tsc, msr::name)?;
            msrs = others;
        }
        for section in RESTORE_ORDER {
            self.restore_section(vcpu, section)?;
        }
        vcpu.set_msrs(&msrs, msr::name)?;
        // Last: writing registers or the local APIC would drop what is on its way.
        self.restore_section(vcpu, Section::Events)?;
        // Lets the guest's watchdogs know that it was stopped.
        if self.has_kvmclock() {
            vcpu.note_stopped()?;
        }
        Ok(())
    }

    /// Writes a section, unless a new vCPU has it already.
    fn restore_section(&self, vcpu: &Vcpu, section: Section) -> Result<(), KvmError> {
        let bytes = self.section(section)?;
        if vcpu.has_from_reset(section, bytes)? {
            return Ok(());
        }
        vcpu.set_section(section, bytes)
    }

    /// Whether the local APIC's timer counts down, or its state is no local APIC's.
    fn has_apic_timer(&self) -> Result<bool, KvmError> {
        let lapic = self.section(Section::Lapic)?;
        let count = lapic.get(APIC_INITIAL_COUNT..APIC_INITIAL_COUNT + 4);
        Ok(count != Some(&[0; 4]))
    }

    fn has_kvmclock(&self) -> bool {
        self.msrs
            .iter()
            .any(|(index, value)| MSRS_KVMCLOCK.contains(index) && value & 1 != 0)
    }

    /// The CPUID leaves as they were set.
    pub fn cpuid(&self) -> Vec<CpuidEntry> {
        self.cpuid.iter().map(CpuidEntry::from).collect()
    }

    fn section(&self, wanted: Section) -> Result<&[u8], KvmError> {
        self.sections
            .iter()
            .find(|(section, _)| *section == wanted)
            .map(|(_, bytes)| bytes.as_slice())
            .ok_or(KvmError::MissingSection { section: wanted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_saved_section_is_restored_once() {
        for section in SAVE_ORDER {
            let times = RESTORE_ORDER.iter().filter(|&&s| s == section).count();
            assert_eq!(
                times,
                usize::from(section != Section::Events),
                "{section:?}"
            );
        }
    }

    #[test]
    fn a_shift_is_exact_for_years() {
        assert_eq!(
            TscShift::from_elapsed(1_000_000_000, 2_300_000).ticks,
            2_300_000_000
        );
        let year_ns = 31_536_000_000_000_000;
        assert_eq!(
            TscShift::from_elapsed(year_ns, 3_000_001).ticks,
            94_608_031_536_000_000
        );
        assert_eq!(TscShift::from_elapsed(0, u32::MAX).ticks, 0);
        assert_eq!(TscShift::from_elapsed(u64::MAX, u32::MAX).ticks, u64::MAX);
    }
}
