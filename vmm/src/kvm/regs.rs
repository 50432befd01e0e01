// UNSAFETY: KVM_GET_XSAVE2 and KVM_SET_XSAVE move as many bytes as KVM_CAP_XSAVE2 said when the VM
// was made, whatever the length of the buffer. This file makes every buffer at least that long.
#![expect(unsafe_code, reason = "passes sized buffers to the xsave ioctls")]
//! The state of one vCPU as the kernel's structures.

use std::io;
use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, Msrs, Xsave, kvm_debugregs, kvm_dtable, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::vcpu::Vcpu;
use super::{KvmError, abi, host, ioctl};
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::regs::{DescriptorTable, InitialRegisters, Segment};
use crate::vcpu::state::Section;

/// By how much two TSC rates may differ and still be called the same, in parts per million. KVM
/// uses the same tolerance (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;
/// `struct kvm_xsave` without what `KVM_CAP_XSAVE2` adds, in bytes.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();

impl Vcpu {
    /// Says what CPUID answers on this vCPU. Before any other state.
    pub fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), KvmError> {
        let kernel: Vec<_> = entries.iter().map(host::entry_to_kvm).collect();
        let cpuid = CpuId::from_entries(&kernel).map_err(|_| KvmError::TooMany {
            what: "cpuid leaves",
            actual: entries.len(),
            limit: kvm_bindings::KVM_MAX_CPUID_ENTRIES,
        })?;
        self.fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))
    }

    /// Rate of the guest's TSC in kHz; `None` on a host whose own TSC is not stable.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|&khz| khz > 0)
    }

    /// Rate of the guest's TSC in kHz after [`Self::set_tsc_khz`] with `khz`, without asking again.
    pub fn tsc_khz_after(&self, khz: Option<u32>) -> Option<u32> {
        self.host_tsc_khz().map(|host_khz| khz.unwrap_or(host_khz))
    }

    /// Rate in kHz with which a new vCPU of this host begins, asked once per process.
    pub(super) fn host_tsc_khz(&self) -> Option<u32> {
        static HOST_KHZ: OnceLock<Option<u32>> = OnceLock::new();
        *HOST_KHZ.get_or_init(|| self.tsc_khz())
    }

    /// Makes the guest's TSC run at `khz` kHz. Before the TSC itself.
    ///
    /// Where KVM cannot scale the TSC only the host's own rate is possible, or one so near that KVM
    /// takes it for the same.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        let Some(host_khz) = self.host_tsc_khz() else {
            return Ok(());
        };
        if host_khz == khz {
            return Ok(());
        }
        let difference = u64::from(host_khz.abs_diff(khz));
        if !self.can_scale_tsc && difference * 1_000_000 > u64::from(host_khz) * TSC_TOLERANCE_PPM {
            return Err(KvmError::TscRate {
                wanted_khz: khz,
                host_khz,
            });
        }
        self.fd.set_tsc_khz(khz).map_err(ioctl("KVM_SET_TSC_KHZ"))
    }

    /// Loads the registers with which a guest starts into a vCPU that is as reset leaves it.
    pub fn set_initial_registers(&self, registers: &InitialRegisters) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        let system = &registers.system;
        sregs.cs = segment(&system.cs);
        let data = segment(&system.data);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(&system.tr);
        sregs.gdt = table(&system.gdt);
        sregs.idt = table(&system.idt);
        sregs.cr0 = system.cr0;
        sregs.cr3 = system.cr3;
        sregs.cr4 = system.cr4;
        sregs.efer = system.efer;
        self.fd.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        let general = &registers.general;
        let regs = kvm_regs {
            rip: general.rip,
            rsp: general.rsp,
            rbp: general.rbp,
            rbx: general.rbx,
            rsi: general.rsi,
            rflags: general.rflags,
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))
    }

    /// Reads one section as the kernel's bytes.
    pub fn section(&self, section: Section) -> Result<Vec<u8>, KvmError> {
        let fd = &self.fd;
        Ok(match section {
            Section::MpState => {
                abi::to_bytes(&fd.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?)
            }
            Section::Registers => abi::to_bytes(&fd.get_regs().map_err(ioctl("KVM_GET_REGS"))?),
            Section::SystemRegisters => {
                abi::to_bytes(&fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?)
            }
            Section::Xsave => self.xsave()?,
            Section::Xcrs => abi::to_bytes(&fd.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?),
            Section::DebugRegisters => {
                abi::to_bytes(&fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?)
            }
            Section::Lapic => abi::to_bytes(&fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?),
            Section::Events => {
                abi::to_bytes(&fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?)
            }
        })
    }

    /// Whether `bytes` say what a new vCPU has there anyway. Each call into a vCPU has KVM load it
    /// into the processor first, which reads a register of the host: much where the host is itself
    /// a guest. General and system registers, XSAVE area and local APIC are not looked at: a vCPU
    /// that ran never has those of a reset.
    pub fn has_from_reset(&self, section: Section, bytes: &[u8]) -> Result<bool, KvmError> {
        Ok(match section {
            Section::MpState => {
                let state: kvm_mp_state = abi::from_bytes("run state", bytes)?;
                // The others wait for their start-up interrupt.
                self.number == 0 && state.mp_state == KVM_MP_STATE_RUNNABLE
            }
            Section::Xcrs => {
                let xcrs: kvm_xcrs = abi::from_bytes("extended control registers", bytes)?;
                let [first, ..] = xcrs.xcrs;
                xcrs.nr_xcrs == 1 && xcrs.flags == 0 && (first.xcr, first.value) == (0, 1)
            }
            Section::DebugRegisters => {
                let debug: kvm_debugregs = abi::from_bytes("debug registers", bytes)?;
                // Intel SDM, volume 3, "Debug Registers": what reset leaves.
                debug.db == [0; 4] && (debug.dr6, debug.dr7, debug.flags) == (0xffff_0ff0, 0x400, 0)
            }
            Section::Events => {
                let events: kvm_vcpu_events = abi::from_bytes("events", bytes)?;
                // The flags only say which fields are meant.
                let nothing = kvm_vcpu_events {
                    flags: events.flags,
                    ..Default::default()
                };
                events == nothing
            }
            Section::Registers | Section::SystemRegisters | Section::Xsave | Section::Lapic => {
                false
            }
        })
    }

    /// Writes one section. The length of `bytes` is checked here, their content by KVM.
    pub fn set_section(&self, section: Section, bytes: &[u8]) -> Result<(), KvmError> {
        let fd = &self.fd;
        match section {
            Section::MpState => {
                let state: kvm_mp_state = abi::from_bytes("run state", bytes)?;
                fd.set_mp_state(state).map_err(ioctl("KVM_SET_MP_STATE"))
            }
            Section::Registers => fd
                .set_regs(&abi::from_bytes("registers", bytes)?)
                .map_err(ioctl("KVM_SET_REGS")),
            Section::SystemRegisters => fd
                .set_sregs(&abi::from_bytes("system registers", bytes)?)
                .map_err(ioctl("KVM_SET_SREGS")),
            Section::Xsave => self.set_xsave(bytes),
            Section::Xcrs => fd
                .set_xcrs(&abi::from_bytes("extended control registers", bytes)?)
                .map_err(ioctl("KVM_SET_XCRS")),
            Section::DebugRegisters => fd
                .set_debug_regs(&abi::from_bytes("debug registers", bytes)?)
                .map_err(ioctl("KVM_SET_DEBUGREGS")),
            Section::Lapic => fd
                .set_lapic(&abi::from_bytes("local apic", bytes)?)
                .map_err(ioctl("KVM_SET_LAPIC")),
            Section::Events => fd
                .set_vcpu_events(&abi::from_bytes("events", bytes)?)
                .map_err(ioctl("KVM_SET_VCPU_EVENTS")),
        }
    }

    /// Reads registers by number, in the order given; those that KVM lists but cannot read on this
    /// vCPU are left out.
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        let mut values = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let entries: Vec<_> = rest
                .iter()
                .take(kvm_bindings::KVM_MAX_MSR_ENTRIES)
                .map(|&index| msr_entry(index, 0))
                .collect();
            let mut msrs = msr_array(&entries)?;
            let read = self.fd.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
            values.extend(msrs.as_slice()[..read].iter().map(|e| (e.index, e.data)));
            let skipped = usize::from(read < entries.len());
            if skipped > 0 {
                tracing::debug!(msr = rest[read], "cannot be read, not saved");
            }
            rest = &rest[read + skipped..];
        }
        Ok(values)
    }

    /// Writes registers in the order given; `name` tells what a number is called. A register that
    /// KVM refuses is no error when it holds the value already (most feature registers are
    /// read-only).
    pub fn set_msrs(
        &self,
        values: &[(u32, u64)],
        name: impl Fn(u32) -> Option<&'static str>,
    ) -> Result<(), KvmError> {
        let mut rest = values;
        while !rest.is_empty() {
            let entries: Vec<_> = rest
                .iter()
                .take(kvm_bindings::KVM_MAX_MSR_ENTRIES)
                .map(|&(index, value)| msr_entry(index, value))
                .collect();
            let written = self
                .fd
                .set_msrs(&msr_array(&entries)?)
                .map_err(ioctl("KVM_SET_MSRS"))?;
            rest = &rest[written..];
            if written < entries.len() {
                let (index, value) = rest[0];
                if self.msrs(&[index])? != [(index, value)] {
                    return Err(KvmError::SetMsr {
                        index,
                        name: name(index).unwrap_or("unnamed"),
                        value,
                    });
                }
                rest = &rest[1..];
            }
        }
        Ok(())
    }

    /// Tells a guest that uses kvmclock that it was stopped, so that its watchdogs forgive it.
    pub fn note_stopped(&self) -> Result<(), KvmError> {
        match self.fd.kvmclock_ctrl() {
            // EINVAL: this vCPU has no kvmclock.
            Err(e) if e.errno() != libc::EINVAL => Err(ioctl("KVM_KVMCLOCK_CTRL")(e)),
            _ => Ok(()),
        }
    }

    fn xsave(&self) -> Result<Vec<u8>, KvmError> {
        if self.xsave_bytes <= XSAVE_BYTES {
            let xsave = self.fd.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?;
            return Ok(abi::to_bytes(&xsave));
        }
        let mut xsave = self.xsave_buffer()?;
        // SAFETY: the buffer has at least the length that KVM_CAP_XSAVE2 gave for this VM.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(ioctl("KVM_GET_XSAVE2"))?;
        let mut bytes = abi::to_bytes(&xsave.as_fam_struct_ref().xsave);
        bytes.extend(xsave.as_slice().iter().flat_map(|word| word.to_le_bytes()));
        Ok(bytes)
    }

    fn set_xsave(&self, bytes: &[u8]) -> Result<(), KvmError> {
        let what = "xsave area";
        if bytes.len() < XSAVE_BYTES
            || bytes.len() > self.xsave_bytes
            || !bytes.len().is_multiple_of(4)
        {
            return Err(KvmError::BadLength {
                what,
                expected: self.xsave_bytes,
                actual: bytes.len(),
            });
        }
        let (fixed, extra) = bytes.split_at(XSAVE_BYTES);
        let fixed: kvm_xsave = abi::from_bytes(what, fixed)?;
        let mut xsave = self.xsave_buffer()?;
        // SAFETY: only the fixed part is replaced; the recorded length stays what it is.
        unsafe { xsave.as_mut_fam_struct() }.xsave = fixed;
        for (word, four) in xsave.as_mut_slice().iter_mut().zip(extra.chunks_exact(4)) {
            *word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        }
        // SAFETY: the buffer has at least the length that KVM_CAP_XSAVE2 gave for this VM.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(ioctl("KVM_SET_XSAVE"))
    }

    fn xsave_buffer(&self) -> Result<Xsave, KvmError> {
        Xsave::new((self.xsave_bytes - XSAVE_BYTES).div_ceil(4)).map_err(|e| KvmError::Ioctl {
            ioctl: "KVM_CAP_XSAVE2",
            source: io::Error::other(format!("{e:?}")),
        })
    }
}

fn segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind,
        present: segment.present.into(),
        dpl: segment.privilege,
        db: segment.default_big.into(),
        s: segment.code_or_data.into(),
        l: segment.long.into(),
        g: segment.granular.into(),
        avl: 0,
        unusable: (!segment.present).into(),
        padding: 0,
    }
}

fn table(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        ..Default::default()
    }
}

fn msr_entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn msr_array(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::TooMany {
        what: "msrs",
        actual: entries.len(),
        limit: kvm_bindings::KVM_MAX_MSR_ENTRIES,
    })
}
