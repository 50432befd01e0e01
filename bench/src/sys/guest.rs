// UNSAFETY: KVM is given guest memory by raw address: `TinyVm` borrows the memory for as long as it
// lives, so the mapping outlives the slot. One loop is written in assembly, to be the same
// instruction that the guest runs.
#![expect(
    unsafe_code,
    reason = "registers a KVM memory slot by raw address; one loop in assembly"
)]
//! The smallest VM that runs 64-bit code: one slot, the interrupt controllers, one vCPU.

use std::marker::PhantomData;

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::memory::GuestMemory;

/// Room for the tables and the code.
pub(crate) const MIN_MEMORY_BYTES: u64 = 2 << 20;

const GDT: usize = 0x1000;
const PAGE_TABLES: usize = 0x2000;
const CODE: usize = 0x8000;
/// The port whose write ends a run.
const END_PORT: u8 = 0x10;

/// Code that writes to `pages` pages from `first_address` on, then to the port.
pub(crate) fn write_pages(first_address: u32, pages: u32) -> Vec<u8> {
    let mut code = vec![0xbf]; // mov edi, first_address
    code.extend_from_slice(&first_address.to_le_bytes());
    code.push(0xb9); // mov ecx, pages
    code.extend_from_slice(&pages.to_le_bytes());
    code.extend_from_slice(&[0x48, 0x89, 0x0f]); // next: mov [rdi], rcx
    code.extend_from_slice(&[0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]); // add rdi, 4096
    code.extend_from_slice(&[0xe2, 0xf4]); // loop next
    code.extend_from_slice(&[0xe6, END_PORT, 0xf4]); // out END_PORT, al; hlt
    code
}

/// Code that runs a one-instruction loop, then writes to the port; and so on for ever.
pub(crate) fn count_down(turns: u32) -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, turns
    code.extend_from_slice(&turns.to_le_bytes());
    code.extend_from_slice(&[0xe2, 0xfe]); // self: loop self
    code.extend_from_slice(&[0xe6, END_PORT, 0xeb, 0xf5]); // out END_PORT, al; jmp to the start
    code
}

/// The loop of [`count_down`], run here.
pub(crate) fn count_down_here(turns: u32) {
    // SAFETY: counts a register down to zero and touches nothing else.
    unsafe {
        std::arch::asm!(
            "2: loop 2b",
            inout("rcx") u64::from(turns.max(1)) => _,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// Writes code, a flat GDT, and page tables that map the first GiB to itself.
pub(crate) fn load(memory: &mut GuestMemory, code: &[u8]) {
    let bytes = memory.as_mut_slice();
    let mut word = |address: usize, word: u64| {
        bytes[address..address + 8].copy_from_slice(&word.to_le_bytes());
    };
    word(GDT, 0);
    word(GDT + 8, 0x00af_9b00_0000_ffff);
    word(GDT + 16, 0x00cf_9300_0000_ffff);
    // Present, writable, accessed, dirty; the last level in 2 MiB pages.
    word(PAGE_TABLES, (PAGE_TABLES as u64 + 0x1000) | 0x63);
    word(PAGE_TABLES + 0x1000, (PAGE_TABLES as u64 + 0x2000) | 0x63);
    for entry in 0..512 {
        word(
            PAGE_TABLES + 0x2000 + entry * 8,
            (entry as u64) << 21 | 0xe3,
        );
    }
    bytes[CODE..CODE + code.len()].copy_from_slice(code);
}

/// A VM about to run the loaded code.
#[derive(Debug)]
pub(crate) struct TinyVm<'a> {
    vcpu: VcpuFd,
    // Dropped after the vCPU.
    _vm: VmFd,
    _memory: PhantomData<&'a GuestMemory>,
}

impl<'a> TinyVm<'a> {
    /// Makes the VM: slot first, then the interrupt controllers (the other order is slower), then
    /// the vCPU with its registers.
    pub(crate) fn new(memory: &'a GuestMemory) -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = loop {
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                made => break made.context("cannot make a KVM VM")?,
            }
        };
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.bytes(),
            userspace_addr: memory.host_address(),
        };
        // SAFETY: the range is all of `memory`, which is borrowed as long as this VM lives.
        unsafe { vm.set_user_memory_region(slot) }.context("cannot set the memory slot")?;
        vm.create_irq_chip().context("cannot make the irqchip")?;
        let vcpu = vm.create_vcpu(0).context("cannot make a vCPU")?;
        enter_long_mode(&vcpu).context("cannot set the registers")?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: PhantomData,
        })
    }

    /// Runs until the code writes to its port.
    pub(crate) fn run_to_port_write(&mut self) -> Result<()> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(END_PORT) => return Ok(()),
                Ok(exit) => bail!("the guest left with {exit:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error).context("cannot run the vCPU"),
            }
        }
    }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let segment = |selector, type_, l, db| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l,
        db,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    let data = segment(16, 3, 0, 1);
    sregs.cs = segment(8, 11, 1, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT as u64, 23);
    sregs.cr3 = PAGE_TABLES as u64;
    sregs.cr4 |= 1 << 5; // PAE
    sregs.cr0 = 1 << 31 | 1 << 4 | 1; // paging, extension type, protection
    sregs.efer = 1 << 10 | 1 << 8; // long mode, enabled and active
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE as u64, 2);
    vcpu.set_regs(&regs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_writes_its_pages_and_no_other() {
        let mut memory = GuestMemory::new(4 << 20).unwrap();
        load(&mut memory, &write_pages(2 << 20, 10));
        let mut vm = TinyVm::new(&memory).unwrap();
        vm.run_to_port_write().unwrap();
        drop(vm);
        let pages = memory.as_mut_slice().chunks(4096).skip(512);
        let written: Vec<usize> = pages
            .enumerate()
            .filter(|(_, page)| page.iter().any(|&byte| byte != 0))
            .map(|(number, _)| number)
            .collect();
        assert_eq!(written, (0..10).collect::<Vec<_>>());
    }
}
