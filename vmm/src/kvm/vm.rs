// UNSAFETY: a memory slot tells the kernel to let a guest read and write host memory by address.
// This file hands over the slots of a `GuestRam` and holds the memory behind each of them for as long
// as the VM has the slot.
#![expect(unsafe_code, reason = "hands host memory to the guest by raw address")]
//! One KVM VM: memory slots, interrupt chips, timer.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::timer::Timer;
use super::vcpu::Vcpu;
use super::{KvmError, host, ioctl};
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::memory::guest::{GuestRam, RamBacking, View};
use crate::memory::layout::{KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS};
use crate::memory::slots::Slot;

/// How often KVM_CREATE_VM is tried when signals interrupt it.
const CREATE_ATTEMPTS: u32 = 64;
/// What `KVM_GET_XSAVE` gives, in bytes; more needs `KVM_GET_XSAVE2`.
const XSAVE_BYTES: usize = 4096;

/// One VM of the kernel.
#[derive(Debug)]
pub struct Vm {
    pub(super) fd: Arc<OpenVm>,
    timer: Arc<Timer>,
    kvm: &'static Kvm,
    xsave_bytes: usize,
}

/// The VM's descriptor, with the memory that its slots name: whoever holds it, the memory lives longer.
#[derive(Debug)]
pub(super) struct OpenVm {
    fd: VmFd,
    // After the descriptor.
    shown: Mutex<Vec<(u32, Arc<RamBacking>)>>,
}

impl Deref for OpenVm {
    type Target = VmFd;

    fn deref(&self) -> &VmFd {
        &self.fd
    }
}

impl Vm {
    /// Opens KVM and makes an empty VM.
    pub fn create() -> Result<Self, KvmError> {
        let kvm = host::shared()?;
        let fd = Arc::new(OpenVm {
            fd: create_vm(kvm)?,
            shown: Mutex::default(),
        });
        let xsave_bytes = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            timer: Arc::new(Timer::new(Arc::clone(&fd))),
            fd,
            kvm,
            xsave_bytes: xsave_bytes.max(XSAVE_BYTES),
        })
    }

    /// Shows `ram` to the guest. Before [`Self::create_chips`]: each slot that is set later waits
    /// for a grace period of the kernel, 6 to 10 ms instead of 0.2 ms in all.
    pub fn set_slots(&self, ram: &GuestRam) -> Result<(), KvmError> {
        let view = ram.view();
        (0..view.backings().len()).try_for_each(|backend| self.show_backend(&view, backend))
    }

    /// Shows one backend of `view` to the guest, which may run.
    pub fn show_backend(&self, view: &View, backend: usize) -> Result<(), KvmError> {
        let Some(backing) = view.backings().get(backend) else {
            return Ok(());
        };
        for slot in view.slots().of_backend(backend) {
            // Before the guest can reach it.
            self.shown().push((slot.number, Arc::clone(backing)));
            if let Err(error) = self.set_slot(slot, slot.bytes) {
                self.shown().retain(|(number, _)| *number != slot.number);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes one backend of `view` away from the guest, which may run. Where that fails the guest keeps it.
    pub fn hide_backend(&self, view: &View, backend: usize) -> Result<(), KvmError> {
        for slot in view.slots().of_backend(backend) {
            self.set_slot(slot, 0)?;
            self.shown().retain(|(number, _)| *number != slot.number);
        }
        Ok(())
    }

    fn set_slot(&self, slot: &Slot, bytes: u64) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: if slot.is_rom { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.guest_address,
            memory_size: bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the region is nothing, or a segment of a backing, mapped readable and writable (also one
        // that the guest may only read), which `OpenVm` keeps alive until the slot is gone, or its own
        // descriptor is closed.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))
    }

    fn shown(&self) -> MutexGuard<'_, Vec<(u32, Arc<RamBacking>)>> {
        let shown = self.fd.shown.lock();
        shown.unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the interrupt chips. After the slots, before the vCPUs (a vCPU gets its local APIC only
    /// when the chips exist).
    pub fn create_chips(&self) -> Result<(), KvmError> {
        self.fd
            .set_identity_map_address(KVM_IDENTITY_MAP_ADDRESS)
            .map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let tss = usize::try_from(KVM_TSS_ADDRESS).unwrap_or(usize::MAX);
        self.fd
            .set_tss_address(tss)
            .map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        self.fd
            .create_irq_chip()
            .map_err(ioctl("KVM_CREATE_IRQCHIP"))
    }

    /// The timer, which needs the interrupt chips once a guest asks for it.
    pub fn timer(&self) -> &Arc<Timer> {
        &self.timer
    }

    /// Makes vCPU `number`, which is also its APIC id.
    pub fn create_vcpu(&self, number: u8) -> Result<Vcpu, KvmError> {
        let fd = self
            .fd
            .create_vcpu(number.into())
            .map_err(ioctl("KVM_CREATE_VCPU"))?;
        let can_scale_tsc = self.kvm.check_extension(Cap::TscControl);
        Vcpu::new(number, fd, self.xsave_bytes, can_scale_tsc)
    }

    /// The CPUID leaves that KVM can give a guest here.
    pub fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, KvmError> {
        host::supported_cpuid(self.kvm)
    }

    /// The model specific registers that KVM can save and restore here.
    pub fn msr_list(&self) -> Result<&'static [u32], KvmError> {
        host::msr_list(self.kvm)
    }
}

/// `KVM_CREATE_VM` starts a kernel thread and gives up with EINTR when a signal comes meanwhile.
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut attempt = 1;
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR && attempt < CREATE_ATTEMPTS => attempt += 1,
            result => return result.map_err(ioctl("KVM_CREATE_VM")),
        }
    }
}
