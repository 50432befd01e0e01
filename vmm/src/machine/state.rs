#![forbid(unsafe_code)]
//! The saved state of a machine: everything that is not RAM, in plain types.

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::kvm::irq::ClockReading;
use crate::vcpu::state::VcpuState;

/// Everything of a machine that is not RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// vCPUs in the order of their numbers.
    pub cpus: Vec<VcpuState>,
    /// Interrupt chips, timer and clock.
    pub vm: VmState,
    /// Devices outside the kernel.
    pub devices: Vec<DeviceRecord>,
    /// Rate of the guest's TSC in kHz, where the host that saved it had a stable one.
    pub tsc_khz: Option<u32>,
}

impl MachineState {
    /// What CPUID answers on the boot processor: what another host must offer too.
    pub fn cpuid(&self) -> Vec<CpuidEntry> {
        self.cpus.first().map(VcpuState::cpuid).unwrap_or_default()
    }

    /// Numbers of the model specific registers of the boot processor: what another host must be
    /// able to set.
    pub fn msr_numbers(&self) -> Vec<u32> {
        self.cpus
            .first()
            .map(|cpu| cpu.msrs.iter().map(|(number, _)| *number).collect())
            .unwrap_or_default()
    }
}

/// State that the vCPUs of a VM share, as the kernel's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// First 8259 (`struct kvm_irqchip`).
    pub pic_master: Vec<u8>,
    /// Second 8259 (`struct kvm_irqchip`).
    pub pic_slave: Vec<u8>,
    /// I/O APIC (`struct kvm_irqchip`).
    pub io_apic: Vec<u8>,
    /// Timer (`struct kvm_pit_state2`).
    pub pit: Vec<u8>,
    /// What the guest's clock showed, in nanoseconds.
    pub clock_ns: u64,
    /// The host's wall-clock time at that moment in nanoseconds since 1970. A restored guest's time
    /// goes on from there; without it, from where it stopped.
    pub realtime_ns: Option<u64>,
}

impl VmState {
    /// The guest's clock when it was saved.
    pub(super) fn clock(&self) -> ClockReading {
        ClockReading {
            clock_ns: self.clock_ns,
            realtime_ns: self.realtime_ns,
        }
    }
}

/// State of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Which device.
    pub kind: String,
    /// Version of what `body` holds.
    pub version: u32,
    /// The device's own saved form.
    pub body: Vec<u8>,
}
