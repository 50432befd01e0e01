#![forbid(unsafe_code)]
//! The one thread that owns a machine: requests and reports of vCPUs come in through one queue.
//!
//! ```text
//!            Resume                    Pause
//!  Paused ------------> Running ------------------> Pausing{who waits, who still runs}
//!    ^                                                  | last vCPU parked: answer all
//!    +--------------------------------------------------+
//!  any phase: Stop, or a vCPU whose guest ended -> tear down -> Outcome
//! ```

use crossbeam::channel::{Receiver, Sender};

use crate::device::legacy::console::SerialTarget;
use crate::device::virtio::console::backend::ConsoleConnection;
use crate::device::virtio::net::backend::NetConnection;
use crate::device::virtio::vsock::backend::VsockConnection;
use crate::kvm::KvmError;
use crate::kvm::irq::Chip;
use crate::kvm::vm::Vm;
use crate::vcpu::run::Stop;
use crate::vcpu::thread::{FirstOrder, Report, VcpuThread};

use super::devices::Devices;
use super::error::MachineError;
use super::hotplug::DeviceMessage;
use super::lifecycle::{MachineHandle, Outcome};
use super::modules::ModuleMessage;
use super::request::{Phase, Refusal, Request, Verdict, decide};
use super::state::{MachineState, VmState};

/// What comes in through the queue.
#[derive(Debug)]
pub(super) enum Message {
    /// Let the guest run.
    Resume(Sender<Result<(), Refusal>>),
    /// Stop the guest.
    Pause(Sender<Result<(), Refusal>>),
    /// Read the state.
    Save(Sender<Result<MachineState, MachineError>>),
    /// COM1 goes there from now on; it was to be said later.
    BindSerial(SerialTarget, Sender<Result<(), MachineError>>),
    /// The vsock is connected to this; it was to be said later.
    BindVsock(VsockConnection, Sender<()>),
    /// Cables of network devices end there from now on.
    BindNets(Vec<(String, NetConnection)>, Sender<()>),
    /// The document says this; it was to be said later.
    BindDocument(Vec<u8>, Sender<()>),
    /// Ports of consoles lead to these; it was to be said later.
    BindConsoles(Vec<(String, ConsoleConnection)>, Sender<()>),
    /// Press the power button.
    PressPowerButton,
    /// Something about devices that come and go.
    Device(DeviceMessage),
    /// Something about memory modules.
    Module(ModuleMessage),
    /// End the machine.
    Stop { reason: String },
    /// A vCPU has something to say.
    Vcpu { number: u8, report: Report },
}

/// A machine from the inside. Fields are dropped in this order: vCPUs stop before their devices go,
/// and the VM, which holds on to its memory until it is closed, goes last.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) vcpus: Vec<VcpuThread>,
    pub(super) devices: Devices,
    pub(super) vm: Vm,
    /// Registers to save, in the order in which to write them back.
    pub(super) msrs: Vec<u32>,
    pub(super) tsc_khz: Option<u32>,
    /// The way into this driver, for those that its devices call.
    pub(super) handle: MachineHandle,
}

/// What the machine is doing, with what belongs to it.
#[derive(Debug)]
enum Doing {
    Paused,
    Running,
    Pausing {
        running: Vec<u8>,
        waiters: Vec<Sender<Result<(), Refusal>>>,
    },
}

impl Doing {
    fn phase(&self) -> Phase {
        match self {
            Self::Paused => Phase::Paused,
            Self::Running => Phase::Running,
            Self::Pausing { .. } => Phase::Pausing,
        }
    }
}

impl Driver {
    /// The body of the thread: from what the vCPUs were told first until the machine ends.
    pub(super) fn run(mut self, inbox: &Receiver<Message>, first_order: FirstOrder) -> Outcome {
        let mut doing = match first_order {
            FirstOrder::Wait => Doing::Paused,
            FirstOrder::Run => Doing::Running,
        };
        let outcome = loop {
            // Every handle is gone: nobody can ever ask for anything again.
            let Ok(message) = inbox.recv() else {
                break Outcome::Stopped;
            };
            match self.handle(doing, message) {
                Ok(next) => doing = next,
                Err(outcome) => break outcome,
            }
        };
        self.tear_down();
        outcome
    }

    fn handle(&mut self, doing: Doing, message: Message) -> Result<Doing, Outcome> {
        match message {
            Message::Resume(reply) => Ok(self.resume(doing, &reply)),
            Message::Pause(reply) => Ok(self.pause(doing, reply)),
            Message::Save(reply) => {
                // A caller that is gone does not want the state any more.
                let _ = reply.send(match decide(doing.phase(), Request::Save) {
                    Verdict::Refuse(refusal) => Err(refusal.into()),
                    _ => self.save(),
                });
                Ok(doing)
            }
            Message::BindSerial(target, reply) => {
                let _ = reply.send(self.bind_serial(target));
                Ok(doing)
            }
            Message::BindVsock(connection, reply) => {
                self.devices.bind_vsock(connection);
                let _ = reply.send(());
                Ok(doing)
            }
            Message::BindNets(nets, reply) => {
                self.devices.bind_nets(nets);
                let _ = reply.send(());
                Ok(doing)
            }
            Message::BindDocument(content, reply) => {
                self.devices.bind_document(Some(content));
                let _ = reply.send(());
                Ok(doing)
            }
            Message::BindConsoles(consoles, reply) => {
                self.devices.bind_consoles(consoles);
                let _ = reply.send(());
                Ok(doing)
            }
            Message::PressPowerButton => {
                self.devices.press_power_button();
                Ok(doing)
            }
            Message::Device(message) => {
                self.devices.take_message(message, doing.phase(), &self.vm);
                Ok(doing)
            }
            Message::Module(message) => {
                self.devices.take_module_message(message, &self.vm);
                Ok(doing)
            }
            Message::Stop { reason } => {
                tracing::info!(reason, "stopping the machine");
                Err(Outcome::Stopped)
            }
            Message::Vcpu { number, report } => match report {
                Report::Parked => Ok(self.parked(doing, number)),
                Report::Ended(stop) => match stop {
                    Stop::Reset => Err(Outcome::Reset),
                    Stop::PowerOff => Err(Outcome::PowerOff),
                    Stop::Failed(failure) => Err(Outcome::Failed(failure)),
                    Stop::Ordered => Ok(doing),
                },
            },
        }
    }

    fn bind_serial(&mut self, target: SerialTarget) -> Result<(), MachineError> {
        self.devices.bind_serial(target)?;
        let on_quit = self.handle.clone();
        self.devices
            .attach(Box::new(move || on_quit.stop("asked to at its terminal")))?;
        self.devices.feed()
    }

    fn resume(&self, doing: Doing, reply: &Sender<Result<(), Refusal>>) -> Doing {
        let (next, answer) = match decide(doing.phase(), Request::Resume) {
            Verdict::Start => {
                self.devices.resume();
                for vcpu in &self.vcpus {
                    vcpu.run();
                }
                (Doing::Running, Ok(()))
            }
            Verdict::Refuse(refusal) => (doing, Err(refusal)),
            _ => (doing, Ok(())),
        };
        let _ = reply.send(answer);
        next
    }

    fn pause(&self, mut doing: Doing, reply: Sender<Result<(), Refusal>>) -> Doing {
        match decide(doing.phase(), Request::Pause) {
            Verdict::BeginPause => {
                for vcpu in &self.vcpus {
                    vcpu.park();
                }
                Doing::Pausing {
                    running: (0..).take(self.vcpus.len()).collect(),
                    waiters: vec![reply],
                }
            }
            Verdict::JoinPause => {
                if let Doing::Pausing { waiters, .. } = &mut doing {
                    waiters.push(reply);
                }
                doing
            }
            Verdict::Refuse(refusal) => {
                let _ = reply.send(Err(refusal));
                doing
            }
            _ => {
                let _ = reply.send(Ok(()));
                doing
            }
        }
    }

    fn parked(&self, mut doing: Doing, number: u8) -> Doing {
        let Doing::Pausing { running, waiters } = &mut doing else {
            return doing;
        };
        running.retain(|&cpu| cpu != number);
        if !running.is_empty() {
            return doing;
        }
        // Whoever waits may take RAM at once.
        self.devices.pause();
        for waiter in waiters.drain(..) {
            let _ = waiter.send(Ok(()));
        }
        Doing::Paused
    }

    /// Reads all state. All vCPUs are parked, and devices are paused unless they never had anything to do.
    fn save(&self) -> Result<MachineState, MachineError> {
        // Devices before the chips: what a device raises from now on belongs to the time after.
        let devices = self.devices.save()?;
        self.devices
            .flush_irqs(&self.vm)
            .map_err(MachineError::vm("cannot settle interrupts"))?;
        // All vCPUs at once: each thread reads its own, as the kernel likes it best.
        let answers: Vec<_> = self.vcpus.iter().map(|v| v.save(&self.msrs)).collect();
        let mut cpus = Vec::with_capacity(answers.len());
        for (cpu, answer) in (0_u8..).zip(answers) {
            let state = answer.recv().map_err(|_| MachineError::VcpuGone { cpu })?;
            cpus.push(state.map_err(|source| MachineError::SaveVcpu { cpu, source })?);
        }
        let vm = save_vm(&self.vm).map_err(MachineError::vm("cannot save the interrupt chips"))?;
        Ok(MachineState {
            cpus,
            vm,
            devices,
            tsc_khz: self.tsc_khz,
        })
    }

    /// Stops all vCPUs at once, then everything in the order of the fields.
    fn tear_down(mut self) {
        for vcpu in &self.vcpus {
            vcpu.quit();
        }
        for vcpu in &mut self.vcpus {
            vcpu.join();
        }
    }
}

fn save_vm(vm: &Vm) -> Result<VmState, KvmError> {
    let pic_master = vm.chip(Chip::PicMaster)?;
    let pic_slave = vm.chip(Chip::PicSlave)?;
    let io_apic = vm.chip(Chip::IoApic)?;
    let pit = vm.timer().save()?;
    // Last, so that what was read before is not older than the clock says by more than it must.
    let clock = vm.clock()?;
    Ok(VmState {
        pic_master,
        pic_slave,
        io_apic,
        pit,
        clock_ns: clock.clock_ns,
        realtime_ns: clock.realtime_ns,
    })
}
