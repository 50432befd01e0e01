// UNSAFETY: the harness gives KVM a memory slot by raw address; `Guest` owns the mapping and keeps
// it until the VM is gone.
#![expect(unsafe_code, reason = "a KVM memory slot is registered by raw address")]
//! The embedded guest on real KVM, in the smallest machine that can hold it: no device of Pando,
//! no loader but `linux-loader`, so that a failure here is the payload's own.

use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use pando_vmm::payload::model::{DataPages, pages, place_bytes, word};
use pando_vmm::payload::protocol::{
    COM1_PORT, Command, Outcome, POWER_OFF, Pattern, READY_LINE, RESET, Reason, Reply, Visit,
};
use pando_vmm::payload::{self, LAYOUT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A guest that says nothing for this long hangs.
const HANG: Duration = Duration::from_secs(60);
const RAM_BYTES: usize = 64 << 20;
const END_PAGE: u64 = RAM_BYTES as u64 / 4096;
const PAGE_TABLES: u64 = 0x9000;
const GDT: u64 = 0x500;
const BOOT_PARAMS: u64 = 0x7000;
const COM1_END: u16 = COM1_PORT + 7;

/// How the guest ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    PowerOff,
    Reset,
}

/// A machine of one vCPU and one slot that runs the embedded guest on a thread of its own.
struct Guest {
    memory: GuestMemoryMmap<()>,
    vm: Arc<VmFd>,
    input: Arc<Mutex<VecDeque<u8>>>,
    lines: Receiver<String>,
    exits: Arc<AtomicU64>,
    thread_id: i32,
    thread: JoinHandle<End>,
}

impl Guest {
    fn start(prepare: impl FnOnce(&GuestMemoryMmap<()>)) -> Self {
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
    fn ready() -> Self {
        let guest = Self::start(|_| {});
        assert_eq!(guest.line(), READY_LINE.trim_end());
        guest
    }

    /// Whether the vCPU thread is asleep (state `S` of proc_pid_stat(5)).
    fn vcpu_sleeps(&self) -> bool {
        let stat = format!("/proc/self/task/{}/stat", self.thread_id);
        let stat = std::fs::read_to_string(stat).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('S')
    }

    fn line(&self) -> String {
        self.lines
            .recv_timeout(HANG)
            .expect("the guest says nothing")
    }

    fn send(&self, bytes: &[u8]) {
        self.input.lock().unwrap().extend(bytes);
        self.vm.set_irq_line(4, true).unwrap();
        self.vm.set_irq_line(4, false).unwrap();
    }

    fn ask_raw(&self, line: &str) -> Reply {
        self.send(line.as_bytes());
        Reply::parse(&self.line()).unwrap()
    }

    fn ask(&self, command: &Command) -> Outcome {
        self.send(&command.encode());
        Reply::parse(&self.line()).unwrap().outcome
    }

    fn end(self, command: &Command) -> End {
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
                for &byte in data {
                    if byte == b'\n' {
                        let text = String::from_utf8(std::mem::take(&mut line)).unwrap();
                        let _ = lines.send(text);
                    } else {
                        line.push(byte);
                    }
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
fn write_memory_map(memory: &GuestMemoryMmap<()>, entries: &[(u64, u64, u32)]) {
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

fn patterns() -> [Pattern; 3] {
    [
        Pattern::Sequential,
        Pattern::Strided { stride_pages: 7 },
        Pattern::Random { seed: 0xa59e4 },
    ]
}

#[test]
fn every_command_answers_as_the_model_says() {
    let guest = Guest::ready();
    let mut model = DataPages::new(END_PAGE);
    let first_page = LAYOUT.first_data_page;
    for (turn, pattern) in patterns().into_iter().enumerate() {
        let visit = Visit {
            first_page: first_page + 100 * turn as u64,
            range_pages: 77,
            count: 50,
            pattern,
        };
        let salt = 0x1111_2222_3333_4444 * (turn as u64 + 1);
        let whole = Visit { count: 77, ..visit };
        for command in [
            Command::Write { visit, salt },
            Command::Verify { visit, salt },
            Command::Verify { visit: whole, salt },
            Command::Verify {
                visit,
                salt: salt + 1,
            },
            Command::Touch(whole),
            Command::Scan {
                first_page: visit.first_page - u64::from(turn > 0),
                pages: 90,
            },
            Command::Checksum {
                first_page: visit.first_page,
                pages: 3,
            },
        ] {
            let expected = model.obey(&command).unwrap();
            assert_eq!(guest.ask(&command), expected, "{command:?}");
        }
        for page in pages(&visit) {
            let mut bytes = [0; 4096];
            guest
                .memory
                .read_slice(&mut bytes, GuestAddress(page * 4096))
                .unwrap();
            assert_eq!(bytes, model.page(page), "page {page:#x}, {pattern:?}");
        }
    }
    for command in [
        Command::Echo(vec![]),
        Command::Echo(vec![0, 1, 0x1_0000_0000, u64::MAX, 5, 6, 7, 8]),
        Command::Spin { turns: 0 },
        Command::Spin { turns: 1000 },
    ] {
        assert_eq!(
            guest.ask(&command),
            model.obey(&command).unwrap(),
            "{command:?}"
        );
    }
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn identity_is_what_the_host_wrote_and_ports_are_what_they_are() {
    let guest = Guest::start(|memory| {
        for (word, value) in [7_u64, 0xaaaa, 0xbbbb].into_iter().enumerate() {
            let address = LAYOUT.identity_address + 8 * word as u64;
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }
    });
    assert_eq!(guest.line(), READY_LINE.trim_end());
    let Outcome::Identity {
        generation,
        id,
        apic_id: _,
        tsc,
    } = guest.ask(&Command::Identity)
    else {
        panic!("no identity");
    };
    assert_eq!((generation, id), (7, [0xaaaa, 0xbbbb]));
    assert_ne!(tsc, 0);
    guest
        .memory
        .write_obj(8_u64, GuestAddress(LAYOUT.identity_address))
        .unwrap();
    let Outcome::Identity {
        generation,
        tsc: later,
        ..
    } = guest.ask(&Command::Identity)
    else {
        panic!("no identity");
    };
    assert_eq!(generation, 8);
    assert!(later > tsc, "time goes on");

    assert_eq!(
        guest.ask(&Command::In { port: 0x80 }),
        Outcome::In { value: 0x5a }
    );
    assert_eq!(
        guest.ask(&Command::Out {
            port: 0x80,
            value: b'\n'
        }),
        Outcome::Out
    );
    assert_eq!(guest.end(&Command::Reset), End::Reset);
}

#[test]
fn what_cannot_be_obeyed_is_refused_and_the_next_line_is_obeyed() {
    let guest = Guest::ready();
    let first = LAYOUT.first_data_page;
    let refusal = |line: &str| match guest.ask_raw(line).outcome {
        Outcome::Refused { command, reason } => (command, reason),
        other => panic!("{line:?} was obeyed: {other:?}"),
    };
    for line in ["q\n", "a 1\n", "d\n"] {
        assert_eq!(
            refusal(line),
            (line.chars().next().unwrap(), Reason::Unknown)
        );
    }
    for line in ["?\n", "W 1\n", "\x7f\n", "\u{fc}\n", "{\n"] {
        assert_eq!(refusal(line), ('?', Reason::Unknown), "{line:?}");
    }
    let mut long = "9 ".repeat(500);
    long.insert(0, 'e');
    for line in [
        "w\n",
        "w 200 1 1 0 0\n",
        "w 200 1 1 0 0 0 0\n",
        "s\n",
        "s g\n",
        "s 1-\n",
        "s 12345678123456781\n",
        "e 1 2 3 4 5 6 7 8 9\n",
        "i 1\n",
        "s 1\x01\n",
        &format!("{long}\n"),
        &format!("s {}\n", "0".repeat(4000)),
    ] {
        let command = line.chars().next().unwrap();
        assert_eq!(refusal(line), (command, Reason::Parameters), "{line:?}");
    }
    let own = LAYOUT.image_first_page;
    for line in [
        format!("w {own:x} 1 1 0 0 0\n"),
        format!("w {:x} 2 1 0 0 0\n", first - 1),
        "w 0 1 1 0 0 0\n".into(),
        format!("w {first:x} 0 0 0 0 0\n"),
        format!("w {first:x} 1 0 0 0 0\n"),
        format!("w {first:x} 4 5 0 0 0\n"),
        format!("w {first:x} 4 4 3 0 0\n"),
        format!("w {first:x} 4 4 ffffffffffffffff 0 0\n"),
        format!("w {first:x} 4 4 1 0 0\n"),
        format!("w {first:x} 4 4 1 5 0\n"),
        format!("w {first:x} ffffffffffffffff 1 0 0 0\n"),
        format!("w {first:x} bfe01 1 0 0 0\n"),
        "w c0000 1 1 0 0 0\n".into(),
        "w fffff 2 1 0 0 0\n".into(),
        "w ffffffffffffffff 1 1 0 0 0\n".into(),
        format!("w {:x} 1 1 0 0 0\n", LAYOUT.mapped_end_page),
        "c 0 1\n".into(),
        format!("c {first:x} 0\n"),
        "z 100 1\n".into(),
        "o 10000 0\n".into(),
        "o 80 100\n".into(),
        "n 10000\n".into(),
    ] {
        let command = line.chars().next().unwrap();
        assert_eq!(refusal(&line), (command, Reason::Range), "{line:?}");
    }
    // Empty lines and returns are no commands and get no answer.
    assert_eq!(
        guest.ask_raw("\n\r\n \n  e  a \r\n").outcome,
        Outcome::Echo(vec![10])
    );
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn a_line_may_come_in_pieces_and_lines_may_come_at_once() {
    let guest = Guest::ready();
    for piece in ["e", " 1", "2", "", " ", "3"] {
        guest.send(piece.as_bytes());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        guest.ask_raw("4\n").outcome,
        Outcome::Echo(vec![0x12, 0x34])
    );
    let lines: Vec<u8> = (0..100)
        .flat_map(|n| Command::Echo(vec![n]).encode())
        .collect();
    guest.send(&lines);
    for n in 0..100 {
        assert_eq!(
            Reply::parse(&guest.line()).unwrap().outcome,
            Outcome::Echo(vec![n])
        );
    }
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn pages_outside_of_the_memory_map_are_refused() {
    let guest = Guest::start(|memory| {
        write_memory_map(
            memory,
            &[
                (0, 0x9fc00, 1),
                (0x10_0000, 63 << 20, 1),
                (0xfec0_0000, 0x1000, 2),
                (1 << 32, 1 << 30, 1),
                (8 << 32, 1 << 40, 2),
            ],
        );
    });
    assert_eq!(guest.line(), READY_LINE.trim_end());
    let write = |first_page, range_pages| {
        guest.ask(&Command::Write {
            visit: Visit {
                first_page,
                range_pages,
                count: 1,
                pattern: Pattern::Sequential,
            },
            salt: 1,
        })
    };
    let refused = Outcome::Refused {
        command: 'w',
        reason: Reason::Range,
    };
    assert_eq!(write(END_PAGE - 1, 1), Outcome::Written { count: 1 });
    assert_eq!(write(END_PAGE - 1, 2), refused);
    assert_eq!(write(END_PAGE, 1), refused);
    assert_eq!(write((5 << 18) - 1, 2), refused);
    assert_eq!(write(5 << 18, 1), refused);
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn an_idle_guest_sleeps_in_the_kernel() {
    let guest = Guest::ready();
    let deadline = Instant::now() + HANG;
    loop {
        let before = guest.exits.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(100));
        if before == guest.exits.load(Ordering::SeqCst) && guest.vcpu_sleeps() {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "an idle guest keeps its vCPU busy"
        );
    }
    assert_eq!(guest.ask(&Command::Echo(vec![])), Outcome::Echo(vec![]));
    guest.ask(&Command::Halt);
    while !guest.vcpu_sleeps() {
        assert!(
            Instant::now() < deadline,
            "a halted guest keeps its vCPU busy"
        );
    }
}

#[test]
fn an_exception_is_reported_and_survived() {
    let guest = Guest::start(|memory| write_memory_map(memory, &[(0, 2 << 30, 1)]));
    assert_eq!(guest.line(), READY_LINE.trim_end());
    // The guest's own page tables: behind its writable page, the root and then the table whose
    // second word is the directory of the second GiB.
    let pointers = LAYOUT.identity_address + 2 * 4096;
    guest
        .memory
        .write_obj(0_u64, GuestAddress(pointers + 8))
        .unwrap();
    let visit = Visit::all((1 << 30) / 4096, 1);
    for _ in 0..2 {
        let Outcome::Refused {
            command: 'w',
            reason:
                Reason::Fault {
                    vector: 14,
                    error_code: 2,
                    instruction,
                    address,
                },
        } = guest.ask(&Command::Write { visit, salt: 0 })
        else {
            panic!("no page fault");
        };
        assert_eq!(address & !0xfff, 1 << 30);
        assert_eq!(instruction / 4096 / 2, LAYOUT.image_first_page / 2);
    }
    assert_eq!(guest.ask(&Command::Echo(vec![1])), Outcome::Echo(vec![1]));
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}

#[test]
fn the_last_words_of_a_page_are_where_the_model_has_them() {
    let guest = Guest::ready();
    let visit = Visit::all(LAYOUT.first_data_page, 600);
    guest.ask(&Command::Write { visit, salt: 9 });
    let mut places = std::collections::BTreeSet::new();
    for page in pages(&visit) {
        let found: u64 = guest
            .memory
            .read_obj(GuestAddress(page * 4096 + place_bytes(page)))
            .unwrap();
        assert_eq!(found, word(page, 9));
        places.insert(place_bytes(page));
    }
    assert!(
        places.len() > 400,
        "words lie in {} places only",
        places.len()
    );
    assert_eq!(guest.end(&Command::PowerOff), End::PowerOff);
}
