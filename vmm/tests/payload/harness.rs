// UNSAFETY: the harness gives KVM a memory slot by raw address; `Guest` owns the mapping and keeps
// it until the VM is gone.
#![expect(unsafe_code, reason = "a KVM memory slot is registered by raw address")]
//! The smallest machine that can run the embedded guest.

use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use pando_vmm::payload;
use pando_vmm::payload::protocol::{
    COM1_PORT, Command, Outcome, POWER_OFF, READY_LINE, RESET, Reply,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A guest that says nothing for this long hangs.
pub(crate) const HANG: Duration = Duration::from_secs(60);
pub(crate) const RAM_BYTES: usize = 64 << 20;
/// First page number behind the RAM.
pub(crate) const END_PAGE: u64 = RAM_BYTES as u64 / 4096;
const PAGE_TABLES: u64 = 0x9000;
const GDT: u64 = 0x500;
const BOOT_PARAMS: u64 = 0x7000;
const COM1_END: u16 = COM1_PORT + 7;

/// How the guest ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    PowerOff,
    Reset,
}

/// A machine of one vCPU and one slot that runs the embedded guest on a thread of its own.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap<()>,
    vm: Arc<VmFd>,
    input: Arc<Mutex<VecDeque<u8>>>,
    lines: Receiver<String>,
    /// How often the vCPU came out of the guest.
    pub(crate) exits: Arc<AtomicU64>,
    thread_id: i32,
    thread: JoinHandle<End>,
}

impl Guest {
    pub(crate) fn start(prepare: impl FnOnce(&GuestMemoryMmap<()>)) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();
        let loaded = Elf::load(&memory, None, &mut Cursor::new(payload::image()), None).unwrap();
        write_tables(&memory);
        prepare(&memory);

        let kvm = Kvm::new().unwrap();
        let vm = Arc::new(kvm.create_vm().unwrap());
        let region = memory.iter().next().unwrap();
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is as long as the slot says, and `Guest` keeps it.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap())
            .unwrap();
        enter_long_mode(&vcpu, loaded.kernel_load.0);

        let input = Arc::new(Mutex::new(VecDeque::new()));
        let (line_sender, lines) = channel();
        let (thread_id_sender, thread_ids) = channel();
        let exits = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let (input, exits) = (Arc::clone(&input), Arc::clone(&exits));
            move || {
                thread_id_sender.send(rustix::thread::gettid()).unwrap();
                run(vcpu, &input, &line_sender, &exits)
            }
        });
        let thread_id = thread_ids.recv().unwrap().as_raw_nonzero().get();
        Self {
            memory,
            vm,
            input,
            lines,
            exits,
            thread_id,
            thread,
        }
    }

    /// A guest that has said it is ready.
    pub(crate) fn ready() -> Self {
        let guest = Self::start(|_| {});
        assert_eq!(guest.line(), READY_LINE.trim_end());
        guest
    }

    /// Whether the vCPU thread is asleep (state `S` of proc_pid_stat(5)).
    pub(crate) fn vcpu_sleeps(&self) -> bool {
        let stat = format!("/proc/self/task/{}/stat", self.thread_id);
        let stat = std::fs::read_to_string(stat).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('S')
    }

    pub(crate) fn line(&self) -> String {
        self.lines
            .recv_timeout(HANG)
            .expect("the guest says nothing")
    }

    pub(crate) fn send(&self, bytes: &[u8]) {
        self.input.lock().unwrap().extend(bytes);
        self.vm.set_irq_line(4, true).unwrap();
        self.vm.set_irq_line(4, false).unwrap();
    }

    pub(crate) fn ask_raw(&self, line: &str) -> Reply {
        self.send(line.as_bytes());
        Reply::parse(&self.line()).unwrap()
    }

    pub(crate) fn ask(&self, command: &Command) -> Outcome {
        self.send(&command.encode());
        Reply::parse(&self.line()).unwrap().outcome
    }

    pub(crate) fn end(self, command: &Command) -> End {
        self.send(&command.encode());
        self.thread.join().unwrap()
    }
}

fn run(
    mut vcpu: VcpuFd,
    input: &Mutex<VecDeque<u8>>,
    lines: &Sender<String>,
    exits: &AtomicU64,
) -> End {
    let mut line = Vec::new();
    loop {
        exits.fetch_add(1, Ordering::SeqCst);
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(COM1_PORT, data) => {
                // `rep outsb` leaves the guest once for each byte: a device needs no more.
                let &[byte] = data else {
                    panic!("{} bytes at once", data.len())
                };
                if byte == b'\n' {
                    let text = String::from_utf8(std::mem::take(&mut line)).unwrap();
                    let _ = lines.send(text);
                } else {
                    line.push(byte);
                }
            }
            VcpuExit::IoIn(COM1_PORT, data) => {
                data.fill(input.lock().unwrap().pop_front().unwrap_or(0));
            }
            VcpuExit::IoOut(port, data) if (port, data[0]) == POWER_OFF => return End::PowerOff,
            VcpuExit::IoOut(port, data) if (port, data[0]) == RESET => return End::Reset,
            VcpuExit::IoOut(COM1_PORT..=COM1_END, _) => {}
            // Port 0x80 is the test's scratch port.
            VcpuExit::IoOut(0x80, data) => input.lock().unwrap().push_back(data[0]),
            VcpuExit::IoIn(0x80, data) => data.fill(0x5a),
            exit => panic!("the guest left with {exit:?}"),
        }
    }
}

/// Identity-mapped page tables of the first 4 GiB and a flat GDT.
fn write_tables(memory: &GuestMemoryMmap<()>) {
    let word = |address: u64, word: u64| memory.write_obj(word, GuestAddress(address)).unwrap();
    word(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 3);
    for gib in 0..4 {
        let directory = PAGE_TABLES + 0x2000 + gib * 0x1000;
        word(PAGE_TABLES + 0x1000 + gib * 8, directory | 3);
        for entry in 0..512 {
            word(directory + entry * 8, (gib << 30) | (entry << 21) | 0x83);
        }
    }
    word(GDT + 8, 0x00af_9b00_0000_ffff);
    word(GDT + 16, 0x00cf_9300_0000_ffff);
}

fn enter_long_mode(vcpu: &VcpuFd, entry: u64) {
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
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = segment(8, 11, 1, 0);
    let data = segment(16, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x17);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= 1 << 5;
    sregs.cr0 = 1 << 31 | 1 << 4 | 1;
    sregs.efer = 1 << 10 | 1 << 8;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rsi, regs.rflags) = (entry, BOOT_PARAMS, 2);
    vcpu.set_regs(&regs).unwrap();
}

/// Says in `boot_params` which RAM there is.
pub(crate) fn write_memory_map(memory: &GuestMemoryMmap<()>, entries: &[(u64, u64, u32)]) {
    memory
        .write_slice(b"HdrS", GuestAddress(BOOT_PARAMS + 0x202))
        .unwrap();
    memory
        .write_obj(
            u8::try_from(entries.len()).unwrap(),
            GuestAddress(BOOT_PARAMS + 0x1e8),
        )
        .unwrap();
    for (&(address, bytes, kind), at) in entries.iter().zip((BOOT_PARAMS + 0x2d0..).step_by(20)) {
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(bytes, GuestAddress(at + 8)).unwrap();
        memory.write_obj(kind, GuestAddress(at + 16)).unwrap();
    }
}
