#![forbid(unsafe_code)]
//! Making a machine: the steps of a boot and of a restore, in their order.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded, unbounded};

use crate::arch::x86_64::boot::{self, BootSource};
use crate::arch::x86_64::cpuid::{self, CpuidEntry};
use crate::arch::x86_64::msr;
use crate::arch::x86_64::regs::InitialRegisters;
use crate::kvm::irq::{Chip, is_timer_masked};
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::kvm::{self, KvmError};
use crate::memory::guest::GuestRam;
use crate::sandbox::sigbus;
use crate::spec::MachineSpec;
use crate::vcpu::run::Outside;
use crate::vcpu::state::TscShift;
use crate::vcpu::thread::{FirstOrder, VcpuSetup, VcpuThread, install_kick_handler};

use super::connections::Connections;
use super::devices::Devices;
use super::driver::{Driver, Message};
use super::error::MachineError;
use super::lifecycle::{DriverThread, Machine, MachineHandle, Paused, Running};
use super::stages::{StageTimer, Stages};
use super::state::{MachineState, VmState};

/// Whether this host was already compared with what a saved state needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCheck {
    /// It was not: the restore does it.
    Due,
    /// It was, by whoever starts many machines from one state. Asking KVM what it supports takes
    /// longer than the rest of a vCPU's restore where CPUID leaves an outer VM.
    Done,
}

/// Has done once what each fork of this process would do again for its machine: KVM asked what it
/// is, signal handlers installed, what the C library does for its first threads. Leaves no thread
/// and no VM.
pub fn prepare_for_forks() -> Result<(), MachineError> {
    kvm::learn().map_err(MachineError::vm("cannot ask kvm what it is"))?;
    sigbus::install().map_err(MachineError::Sigbus)?;
    install_kick_handler()
        .and_then(|()| start_and_end_threads())
        .map_err(|source| MachineError::Thread {
            thread: "vcpu0".to_owned(),
            source,
        })
}

/// Threads of a machine with one vCPU: vCPU, console, driver, and whoever attends.
const THREADS_AT_FIRST: usize = 4;
/// How long a thread that has ended may be seen.
const THREAD_GONE: Duration = Duration::from_secs(2);

/// Starts threads and ends them: from then on the C library knows how and has stacks for as many.
fn start_and_end_threads() -> io::Result<()> {
    let tasks = || std::fs::read_dir("/proc/self/task").map(Iterator::count);
    let before = tasks()?;
    let (all_run, wait) = bounded::<()>(0);
    thread::scope(|scope| {
        let all_run = all_run;
        for _ in 0..THREADS_AT_FIRST {
            let wait = wait.clone();
            thread::Builder::new().spawn_scoped(scope, move || {
                // Until the other end is closed.
                let _ = wait.recv();
            })?;
        }
        drop(all_run);
        io::Result::Ok(())
    })?;
    // A thread that was joined is on its way out of the kernel's list still.
    let deadline = Instant::now() + THREAD_GONE;
    while tasks()? > before && Instant::now() < deadline {
        thread::yield_now();
    }
    Ok(())
}

impl Machine<Paused> {
    /// A new machine that will start the kernel in `source`.
    pub fn boot(
        spec: &MachineSpec,
        ram: GuestRam,
        source: &BootSource,
        connections: impl Into<Connections>,
    ) -> Result<Self, MachineError> {
        // Before the first byte is written: RAM may be in a file whose disk is full.
        sigbus::install().map_err(MachineError::Sigbus)?;
        let mut timer = StageTimer::start();
        let entry = boot::load(&ram, source, spec).map_err(MachineError::Boot)?;
        timer.done("load");
        new_machine(spec, ram, &entry.registers, connections.into(), timer)
    }

    /// A new machine whose RAM already holds all that the first vCPU needs to start with these
    /// registers; the other vCPUs wait to be started by it.
    pub fn boot_at(
        spec: &MachineSpec,
        ram: GuestRam,
        registers: &InitialRegisters,
        connections: impl Into<Connections>,
    ) -> Result<Self, MachineError> {
        new_machine(
            spec,
            ram,
            registers,
            connections.into(),
            StageTimer::start(),
        )
    }

    /// A machine that goes on where `state` was saved, with the RAM of that moment.
    ///
    /// Whoever fills `ram` on demand must be doing so already: setting some registers makes KVM
    /// read pages of the guest (its clock, its page tables). Nothing here does.
    pub fn restore(
        spec: &MachineSpec,
        ram: GuestRam,
        state: &MachineState,
        connections: impl Into<Connections>,
        host_check: HostCheck,
    ) -> Result<Self, MachineError> {
        restored(spec, ram, state, connections.into(), host_check)?.start()
    }
}

impl Machine<Running> {
    /// As [`Machine::<Paused>::restore`], and the guest runs as soon as it can: what [`Machine::resume`] does
    /// is done without a hand-over between threads, and the vCPUs' threads are the first to be
    /// started. `before` is called before that.
    pub fn restore_and_run(
        spec: &MachineSpec,
        ram: GuestRam,
        state: &MachineState,
        connections: impl Into<Connections>,
        host_check: HostCheck,
        before: impl FnOnce(&MachineHandle),
    ) -> Result<Self, MachineError> {
        restored(spec, ram, state, connections.into(), host_check)?.start_running(before)
    }
}

/// All of a restored machine but its threads.
fn restored(
    spec: &MachineSpec,
    ram: GuestRam,
    state: &MachineState,
    connections: Connections,
    host_check: HostCheck,
) -> Result<Unstarted, MachineError> {
    let cpus = spec.cpus().get();
    if state.cpus.len() != usize::from(cpus) {
        return Err(MachineError::CpuCount {
            saved: state.cpus.len(),
            machine: cpus,
        });
    }
    let mut timer = StageTimer::start();
    // First, because it fails without any work done: a socket in use, a damaged record.
    let devices = Devices::from_records(spec, connections, &state.devices)?;
    let mut shell = Shell::make(spec, ram, devices, &mut timer)?;
    match host_check {
        HostCheck::Due => refuse_missing_features(&shell.vm, state)?,
        HostCheck::Done => (),
    }
    let cpuids = state.cpus.iter().map(|cpu| cpu.cpuid()).collect();
    let vcpus = shell.make_vcpus(cpuids)?;
    timer.done("vcpus");
    let shift = shift_since_save(state);
    for (number, (vcpu, saved)) in (0_u8..).zip(vcpus.iter().zip(&state.cpus)) {
        restore_tsc_rate(&vcpu.vcpu, state.tsc_khz)
            .and_then(|()| saved.restore(&vcpu.vcpu, shift))
            .map_err(|source| MachineError::RestoreVcpu {
                cpu: number,
                source,
            })?;
    }
    // After the vCPUs: an interrupt chip that is set delivers what it holds to local APICs.
    restore_vm(&shell.vm, &state.vm)
        .map_err(MachineError::vm("cannot restore the interrupt chips"))?;
    // Devices last: what they have raised meets chips and vCPUs that are complete.
    shell.connect_devices()?;
    shell.devices.renew_identity(&shell.vm, &shell.ram)?;
    timer.done("state");
    Ok(Unstarted {
        shell,
        vcpus,
        timer,
        tsc_khz: state.tsc_khz,
    })
}

/// The steps that a boot does once RAM is ready.
fn new_machine(
    spec: &MachineSpec,
    ram: GuestRam,
    registers: &InitialRegisters,
    connections: Connections,
    mut timer: StageTimer,
) -> Result<Machine<Paused>, MachineError> {
    let devices = Devices::new(spec, connections)?;
    let mut shell = Shell::make(spec, ram, devices, &mut timer)?;
    shell
        .vm
        .mask_pics()
        .map_err(MachineError::vm("cannot set up the interrupt chips"))?;
    shell.connect_devices()?;
    shell.devices.write_generation(&shell.ram)?;
    let cpus = spec.cpus().get();
    let supported = shell
        .vm
        .supported_cpuid()
        .map_err(MachineError::vm("cannot ask kvm for its cpu features"))?;
    let package_bits = spec.numa().package_bits(spec.cpus());
    let cpuids = (0..cpus)
        .map(|cpu| cpuid::guest_cpuid_in_nodes(&supported, cpu, cpus, package_bits))
        .collect();
    let vcpus = shell.make_vcpus(cpuids)?;
    timer.done("vcpus");
    for (cpu, vcpu) in (0_u8..).zip(&vcpus) {
        set_initial(&vcpu.vcpu, (cpu == 0).then_some(registers))
            .map_err(|source| MachineError::MakeVcpu { cpu, source })?;
    }
    timer.done("state");
    let unstarted = Unstarted {
        shell,
        vcpus,
        timer,
        tsc_khz: None,
    };
    unstarted.start()
}

/// A VM with everything but vCPUs.
#[derive(Debug)]
struct Shell {
    devices: Devices,
    vm: Vm,
    ram: Arc<GuestRam>,
}

impl Shell {
    fn make(
        spec: &MachineSpec,
        ram: GuestRam,
        devices: Devices,
        timer: &mut StageTimer,
    ) -> Result<Self, MachineError> {
        if ram.layout() != spec.layout() {
            return Err(MachineError::RamLayout);
        }
        for device in spec.devices() {
            ram.gate().require_for(device)?;
        }
        sigbus::install().map_err(MachineError::Sigbus)?;
        let ram = Arc::new(ram);
        timer.done("devices");
        let vm = Vm::create().map_err(MachineError::vm("cannot make a vm"))?;
        timer.done("vm");
        vm.set_slots(&ram)
            .map_err(MachineError::vm("cannot give the vm its memory"))?;
        vm.create_chips()
            .map_err(MachineError::vm("cannot make the interrupt chips"))?;
        devices.connect_timer(vm.timer());
        timer.done("slots+irqchip");
        Ok(Self { devices, vm, ram })
    }

    fn connect_devices(&mut self) -> Result<(), MachineError> {
        self.devices
            .connect(&self.vm, &self.ram)
            .map_err(MachineError::vm("cannot connect the interrupt lines"))?;
        self.devices.plug_first()
    }

    /// Makes one vCPU per CPUID table.
    fn make_vcpus(&self, cpuids: Vec<Vec<CpuidEntry>>) -> Result<Vec<VcpuSetup>, MachineError> {
        (0_u8..)
            .zip(cpuids)
            .map(|(number, cpuid)| {
                let vcpu = self
                    .vm
                    .create_vcpu(number)
                    .and_then(|vcpu| vcpu.set_cpuid(&cpuid).map(|()| vcpu))
                    .map_err(|source| MachineError::MakeVcpu {
                        cpu: number,
                        source,
                    })?;
                Ok(VcpuSetup {
                    number,
                    vcpu,
                    cpuid,
                    outside: Outside {
                        pio: self.devices.pio(),
                        mmio: self.devices.mmio(),
                        ram: Arc::clone(&self.ram),
                    },
                })
            })
            .collect()
    }
}

/// A machine without its threads.
#[derive(Debug)]
struct Unstarted {
    shell: Shell,
    vcpus: Vec<VcpuSetup>,
    timer: StageTimer,
    /// Rate that the TSC was set to, in kHz; `None` for the host's.
    tsc_khz: Option<u32>,
}

impl Unstarted {
    /// Starts the threads; the machine is paused.
    fn start(self) -> Result<Machine<Paused>, MachineError> {
        self.start_threads(FirstOrder::Wait, |_| ())
    }

    /// Starts the threads; the machine runs. `before` comes first.
    fn start_running(
        self,
        before: impl FnOnce(&MachineHandle),
    ) -> Result<Machine<Running>, MachineError> {
        self.start_threads(FirstOrder::Run, before)
    }

    fn start_threads<State>(
        self,
        first_order: FirstOrder,
        before: impl FnOnce(&MachineHandle),
    ) -> Result<Machine<State>, MachineError> {
        let Self {
            shell:
                Shell {
                    mut devices,
                    vm,
                    ram,
                },
            vcpus: setups,
            mut timer,
            tsc_khz,
        } = self;
        let (requests, inbox) = unbounded();
        let pty = devices.pty_path().map(Path::to_owned);
        let handle = MachineHandle::new(requests.clone());
        devices.tell_of_slots(&requests);
        before(&handle);
        let on_quit = handle.clone();
        // What waits on the console is in COM1 before the guest looks.
        devices.attach(Box::new(move || on_quit.stop("asked to at its terminal")))?;
        let listed = vm
            .msr_list()
            .map_err(MachineError::vm("cannot ask kvm for its registers"))?;
        let tsc_khz = setups
            .first()
            .and_then(|setup| setup.vcpu.tsc_khz_after(tsc_khz));
        if first_order == FirstOrder::Run {
            devices.resume();
        }
        // The guest first: the other threads are in nobody's way meanwhile.
        let vcpus = setups
            .into_iter()
            .map(|setup| spawn_vcpu(setup, first_order, requests.clone()))
            .collect::<Result<_, _>>()?;
        if first_order == FirstOrder::Run {
            // On a busy host the guest would wait for this thread's next pause.
            thread::yield_now();
        }
        devices.feed()?;
        let driver = Driver {
            vcpus,
            devices,
            vm,
            msrs: msr::to_save(listed),
            tsc_khz,
            handle,
        };
        let name = "machine".to_owned();
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || driver.run(&inbox, first_order))
            .map_err(|source| MachineError::Thread {
                thread: name,
                source,
            })?;
        timer.done("threads");
        let stages: Stages = timer.finish();
        Ok(Machine::new(
            DriverThread::new(requests, thread),
            ram,
            stages,
            pty,
        ))
    }
}

fn spawn_vcpu(
    setup: VcpuSetup,
    first_order: FirstOrder,
    driver: Sender<Message>,
) -> Result<VcpuThread, MachineError> {
    let thread = format!("vcpu{}", setup.number);
    VcpuThread::spawn(setup, first_order, move |number, report| {
        // The driver is gone only when it has stopped caring.
        let _ = driver.send(Message::Vcpu { number, report });
    })
    .map_err(|source| MachineError::Thread { thread, source })
}

/// The state with which a vCPU starts: `registers` for the first, reset state for the others,
/// which wait for their start-up interrupt.
fn set_initial(vcpu: &Vcpu, registers: Option<&InitialRegisters>) -> Result<(), KvmError> {
    vcpu.set_msrs(&msr::boot_msrs(), msr::name)?;
    match registers {
        Some(registers) => vcpu.set_initial_registers(registers),
        None => Ok(()),
    }
}

fn refuse_missing_features(vm: &Vm, state: &MachineState) -> Result<(), MachineError> {
    let host = vm
        .supported_cpuid()
        .map_err(MachineError::vm("cannot ask kvm for its cpu features"))?;
    let missing = cpuid::missing_features(&state.cpuid(), &host);
    if missing.is_empty() {
        Ok(())
    } else {
        Err(MachineError::MissingFeatures(missing))
    }
}

fn restore_tsc_rate(vcpu: &Vcpu, khz: Option<u32>) -> Result<(), KvmError> {
    khz.map_or(Ok(()), |khz| vcpu.set_tsc_khz(khz))
}

/// How far the guest's counters must go forward to keep in step with its clock: by the time that
/// the state was on disk.
fn shift_since_save(state: &MachineState) -> TscShift {
    state.tsc_khz.map_or_else(TscShift::default, |khz| {
        TscShift::from_elapsed(state.vm.clock().elapsed_ns(), khz)
    })
}

fn restore_vm(vm: &Vm, state: &VmState) -> Result<(), KvmError> {
    vm.set_clock(&state.clock())?;
    vm.set_chip(Chip::PicMaster, &state.pic_master)?;
    vm.set_chip(Chip::PicSlave, &state.pic_slave)?;
    vm.set_chip(Chip::IoApic, &state.io_apic)?;
    let is_masked = is_timer_masked(&state.pic_master, &state.io_apic);
    vm.timer().restore(&state.pit, is_masked)
}
