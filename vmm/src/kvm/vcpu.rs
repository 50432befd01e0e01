// UNSAFETY: KVM describes an exit in a page that it shares with this process, as a union that its
// `exit_reason` selects, with port data at an offset in the mapping. This file reads that union and
// makes slices of that data; it also writes `immediate_exit` in a second mapping of the same page,
// which is how a running vCPU is told to come out from another thread.
#![expect(
    unsafe_code,
    reason = "reads the kvm_run union and writes immediate_exit by raw address"
)]
//! One vCPU: entering the guest and making it come out.

use std::mem::offset_of;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use memmap2::{MmapOptions, MmapRaw};

use super::{KvmError, ioctl};
use crate::sandbox::sigbus;
use crate::vcpu::exit::{FaultAddress, VmEntry, VmExit};

/// Most answers of EAGAIN in a row. A start-up interrupt gives one or two; a kernel that cannot
/// start the task that the first entry of a VM needs gives nothing else.
const MAX_RUN_AGAIN: u32 = 64;

/// One vCPU of the kernel.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) number: u8,
    pub(super) fd: VcpuFd,
    pub(super) xsave_bytes: usize,
    pub(super) can_scale_tsc: bool,
    kick: ExitFlag,
    /// Answers of EAGAIN since the last other answer.
    run_again: u32,
}

/// The `immediate_exit` flag of one vCPU, from any thread.
///
/// While it is set, entering the guest only finishes what the last exit left open and comes back.
#[derive(Debug, Clone)]
pub struct ExitFlag {
    page: Arc<MmapRaw>,
}

impl ExitFlag {
    /// Makes the next entry, or one that has not yet looked at the flag, come back at once. An
    /// entry that has looked is ended by a signal to its thread *after* this call.
    pub fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// Lets the guest run again.
    pub fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    fn flag(&self) -> &AtomicU8 {
        let flag = self
            .page
            .as_mut_ptr()
            .wrapping_add(offset_of!(kvm_run, immediate_exit));
        // SAFETY: the mapping is at least a `kvm_run` long, `self.page` keeps it mapped, and
        // through it nothing but this byte is accessed, always atomically.
        unsafe { AtomicU8::from_ptr(flag) }
    }
}

impl Vcpu {
    pub(super) fn new(
        number: u8,
        fd: VcpuFd,
        xsave_bytes: usize,
        can_scale_tsc: bool,
    ) -> Result<Self, KvmError> {
        let page = MmapOptions::new()
            .len(size_of::<kvm_run>())
            .map_raw(&fd)
            .map_err(KvmError::MapRun)?;
        Ok(Self {
            number,
            fd,
            xsave_bytes,
            can_scale_tsc,
            kick: ExitFlag {
                page: Arc::new(page),
            },
            run_again: 0,
        })
    }

    /// The flag that makes this vCPU come out.
    pub fn exit_flag(&self) -> &ExitFlag {
        &self.kick
    }

    /// Where the guest is, if the registers can be read.
    pub fn rip(&self) -> Option<u64> {
        self.fd.get_regs().ok().map(|regs| regs.rip)
    }

    /// Enters the guest and says why it was left.
    pub fn enter(&mut self, entry: VmEntry) -> Result<VmExit<'_>, KvmError> {
        if entry == VmEntry::Retire {
            self.kick.set();
        }
        let stay = sigbus::in_guest(|| match self.fd.run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Stay::MemoryFault(gpa),
            Ok(_) => Stay::Exit,
            Err(e) => Stay::Error(e),
        });
        self.run_again = count_again(self.run_again, &stay.result)?;
        if let Some(address) = stay.sigbus {
            return Ok(VmExit::MemoryError {
                address: FaultAddress::Host(address),
            });
        }
        match stay.result {
            Stay::Exit => Ok(self.decode()),
            Stay::MemoryFault(gpa) => Ok(VmExit::MemoryError {
                address: FaultAddress::Guest(gpa),
            }),
            Stay::Error(e) => match e.errno() {
                // EAGAIN: a vCPU that was waiting for its start-up interrupt has got it.
                libc::EINTR | libc::EAGAIN => Ok(VmExit::Interrupted),
                libc::EFAULT | libc::EHWPOISON => Ok(VmExit::MemoryError {
                    address: FaultAddress::Unknown,
                }),
                _ => Err(ioctl("KVM_RUN")(e)),
            },
        }
    }

    /// Puts the exit that KVM has just described into our words.
    fn decode(&mut self) -> VmExit<'_> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` is this vCPU's mapping; nobody else holds a reference into it, and the
        // kernel does not write it before the next entry, which needs `&mut self`.
        let kvm_run = unsafe { &mut *run };
        // Every union field read below is the one that `exit_reason` selects (Linux,
        // Documentation/virt/kvm/api.rst, "The kvm_run structure").
        match kvm_run.exit_reason {
            kvm_bindings::KVM_EXIT_IO => {
                // SAFETY: selected by KVM_EXIT_IO.
                let io = unsafe { kvm_run.__bindgen_anon_1.io };
                let width = usize::from(io.size);
                let bytes = width * io.count as usize;
                let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
                // SAFETY: KVM places `count` elements of `size` bytes at this offset of the
                // mapping (`KVM_GET_VCPU_MMAP_SIZE` bytes long), behind the structure itself; the
                // slice borrows `self`, so no entry can change it meanwhile.
                let data =
                    unsafe { slice::from_raw_parts_mut(run.cast::<u8>().add(offset), bytes) };
                if u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN {
                    VmExit::PioRead {
                        port: io.port,
                        width,
                        data,
                    }
                } else {
                    VmExit::PioWrite {
                        port: io.port,
                        width,
                        data,
                    }
                }
            }
            kvm_bindings::KVM_EXIT_MMIO => {
                // SAFETY: selected by KVM_EXIT_MMIO.
                let mmio = unsafe { &mut kvm_run.__bindgen_anon_1.mmio };
                let guest_address = mmio.phys_addr;
                let is_write = mmio.is_write != 0;
                let length = (mmio.len as usize).min(mmio.data.len());
                let data = &mut mmio.data[..length];
                if is_write {
                    VmExit::MmioWrite {
                        guest_address,
                        data,
                    }
                } else {
                    VmExit::MmioRead {
                        guest_address,
                        data,
                    }
                }
            }
            kvm_bindings::KVM_EXIT_INTR | kvm_bindings::KVM_EXIT_IRQ_WINDOW_OPEN => {
                VmExit::Interrupted
            }
            kvm_bindings::KVM_EXIT_HLT => VmExit::Halted,
            kvm_bindings::KVM_EXIT_SHUTDOWN => VmExit::Shutdown,
            kvm_bindings::KVM_EXIT_SYSTEM_EVENT => VmExit::SystemEvent {
                // SAFETY: selected by KVM_EXIT_SYSTEM_EVENT.
                event: unsafe { kvm_run.__bindgen_anon_1.system_event.type_ },
            },
            kvm_bindings::KVM_EXIT_FAIL_ENTRY => VmExit::EntryFailed {
                // SAFETY: selected by KVM_EXIT_FAIL_ENTRY.
                reason: unsafe {
                    kvm_run
                        .__bindgen_anon_1
                        .fail_entry
                        .hardware_entry_failure_reason
                },
            },
            kvm_bindings::KVM_EXIT_INTERNAL_ERROR => VmExit::InternalError {
                // SAFETY: selected by KVM_EXIT_INTERNAL_ERROR.
                suberror: unsafe { kvm_run.__bindgen_anon_1.internal.suberror },
            },
            reason => VmExit::Unexpected { reason },
        }
    }
}

/// Answers of EAGAIN in a row, after another answer; an error when they are too many.
fn count_again(so_far: u32, stay: &Stay) -> Result<u32, KvmError> {
    match stay {
        Stay::Error(error) if error.errno() == libc::EAGAIN => {
            if so_far >= MAX_RUN_AGAIN {
                return Err(KvmError::RunAgain);
            }
            Ok(so_far + 1)
        }
        _ => Ok(0),
    }
}

/// What one stay in the guest came to, before the exit is decoded.
enum Stay {
    Exit,
    MemoryFault(u64),
    Error(kvm_ioctls::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eagain_in_a_row_ends_a_vcpu() {
        let errno = |errno| Stay::Error(kvm_ioctls::Error::new(errno));
        let mut count = 0;
        for _ in 0..MAX_RUN_AGAIN {
            count = count_again(count, &errno(libc::EAGAIN)).unwrap();
        }
        assert!(matches!(
            count_again(count, &errno(libc::EAGAIN)),
            Err(KvmError::RunAgain)
        ));
        assert_eq!(count_again(count, &errno(libc::EINTR)).unwrap(), 0);
        assert_eq!(count_again(count, &Stay::Exit).unwrap(), 0);
    }
}
