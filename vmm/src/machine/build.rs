#![forbid(unsafe_code)]
//! Making a machine: the steps of a boot and of a restore, in their order.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use crossbeam::channel::{Sender, unbounded};

use crate::arch::x86_64::boot::{self, BootSource};
use crate::arch::x86_64::cpuid::{self, CpuidEntry};
use crate::arch::x86_64::msr;
use crate::arch::x86_64::regs::InitialRegisters;
use crate::device::legacy::console::SerialTarget;
use crate::kvm::KvmError;
use crate::kvm::irq::Chip;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::memory::guest::GuestRam;
use crate::sandbox::sigbus;
use crate::spec::MachineSpec;
use crate::vcpu::run::Outside;
use crate::vcpu::state::TscShift;
use crate::vcpu::thread::{VcpuSetup, VcpuThread};

use super::devices::Devices;
use super::driver::{Driver, Message};
use super::error::MachineError;
use super::lifecycle::{DriverThread, Machine, MachineHandle, Paused};
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

impl Machine<Paused> {
    /// A new machine that will start the kernel in `source`.
    pub fn boot(
        spec: &MachineSpec,
        ram: GuestRam,
        source: &BootSource,
        serial: SerialTarget,
    ) -> Result<Self, MachineError> {
        // Before the first byte is written: RAM may be in a file whose disk is full.
        sigbus::install().map_err(MachineError::Sigbus)?;
        let mut timer = StageTimer::start();
        let entry = boot::load(&ram, source, spec).map_err(MachineError::Boot)?;
        timer.done("load");
        new_machine(spec, ram, &entry.registers, serial, timer)
    }

    /// A new machine whose RAM already holds all that the first vCPU needs to start with these
    /// registers; the other vCPUs wait to be started by it.
    pub fn boot_at(
        spec: &MachineSpec,
        ram: GuestRam,
        registers: &InitialRegisters,
        serial: SerialTarget,
    ) -> Result<Self, MachineError> {
        new_machine(spec, ram, registers, serial, StageTimer::start())
    }

    /// A machine that goes on where `state` was saved, with the RAM of that moment.
    ///
    /// Whoever fills `ram` on demand must be doing so already: setting some registers makes KVM
    /// read pages of the guest (its clock, its page tables). Nothing here does.
    pub fn restore(
        spec: &MachineSpec,
        ram: GuestRam,
        state: &MachineState,
        serial: SerialTarget,
        host_check: HostCheck,
    ) -> Result<Self, MachineError> {
        let cpus = spec.cpus().get();
        if state.cpus.len() != usize::from(cpus) {
            return Err(MachineError::CpuCount {
                saved: state.cpus.len(),
                machine: cpus,
            });
        }
        let mut timer = StageTimer::start();
        // First, because it fails without any work done: a socket in use, a damaged record.
        let devices = Devices::from_records(serial, &state.devices)?;
        let shell = Shell::make(spec, ram, devices, &mut timer)?;
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
        timer.done("state");
        shell.start(vcpus, timer)
    }
}

/// The steps that a boot does once RAM is ready.
fn new_machine(
    spec: &MachineSpec,
    ram: GuestRam,
    registers: &InitialRegisters,
    serial: SerialTarget,
    mut timer: StageTimer,
) -> Result<Machine<Paused>, MachineError> {
    let devices = Devices::new(serial)?;
    let shell = Shell::make(spec, ram, devices, &mut timer)?;
    shell
        .vm
        .mask_pics()
        .map_err(MachineError::vm("cannot set up the interrupt chips"))?;
    shell.connect_devices()?;
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
    shell.start(vcpus, timer)
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
        if *ram.layout() != spec.layout() {
            return Err(MachineError::RamLayout);
        }
        sigbus::install().map_err(MachineError::Sigbus)?;
        let ram = Arc::new(ram);
        timer.done("devices");
        let mut vm = Vm::create().map_err(MachineError::vm("cannot make a vm"))?;
        timer.done("vm");
        vm.set_slots(Arc::clone(&ram))
            .map_err(MachineError::vm("cannot give the vm its memory"))?;
        vm.create_chips()
            .map_err(MachineError::vm("cannot make the interrupt chips"))?;
        timer.done("slots+irqchip");
        Ok(Self { devices, vm, ram })
    }

    fn connect_devices(&self) -> Result<(), MachineError> {
        self.devices
            .connect_irqs(&self.vm)
            .map_err(MachineError::vm("cannot connect the interrupt lines"))
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

    /// Starts the threads; the machine is paused.
    fn start(
        mut self,
        setups: Vec<VcpuSetup>,
        mut timer: StageTimer,
    ) -> Result<Machine<Paused>, MachineError> {
        let (requests, inbox) = unbounded();
        let pty = self.devices.pty_path().map(Path::to_owned);
        let on_quit = MachineHandle::new(requests.clone());
        self.devices
            .attach(Box::new(move || on_quit.stop("asked to at its terminal")))?;
        let listed = self
            .vm
            .msr_list()
            .map_err(MachineError::vm("cannot ask kvm for its registers"))?;
        let tsc_khz = setups.first().and_then(|setup| setup.vcpu.tsc_khz());
        let vcpus = setups
            .into_iter()
            .map(|setup| spawn_vcpu(setup, requests.clone()))
            .collect::<Result<_, _>>()?;
        let driver = Driver {
            vcpus,
            devices: self.devices,
            vm: self.vm,
            msrs: msr::to_save(&listed),
            tsc_khz,
            handle: MachineHandle::new(requests.clone()),
        };
        let name = "machine".to_owned();
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || driver.run(&inbox))
            .map_err(|source| MachineError::Thread {
                thread: name,
                source,
            })?;
        timer.done("threads");
        let stages: Stages = timer.finish();
        Ok(Machine::new(
            DriverThread::new(requests, thread),
            self.ram,
            stages,
            pty,
        ))
    }
}

fn spawn_vcpu(setup: VcpuSetup, driver: Sender<Message>) -> Result<VcpuThread, MachineError> {
    let thread = format!("vcpu{}", setup.number);
    VcpuThread::spawn(setup, move |number, report| {
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
    vm.set_pit(&state.pit)
}
