#![forbid(unsafe_code)]
//! The loop that runs a vCPU: one match that answers each exit.

use std::fmt;
use std::sync::Arc;

use crate::device::bus::{DeviceEvent, MmioBus, PioBus};
use crate::kvm::vcpu::Vcpu;
use crate::memory::guest::GuestRam;

use super::exit::{FaultAddress, VmEntry, VmExit};

/// What a vCPU reaches outside the kernel.
#[derive(Debug, Clone)]
pub struct Outside {
    /// Devices at ports.
    pub pio: Arc<PioBus>,
    /// Devices at memory addresses.
    pub mmio: Arc<MmioBus>,
    /// RAM, to tell its addresses from those of devices.
    pub ram: Arc<GuestRam>,
}

/// Why a vCPU stopped running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// An order is waiting.
    Ordered,
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest cannot go on.
    Failed(Failure),
}

/// Why a guest cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// A page of guest memory is poisoned or its backing is gone.
    MemoryError {
        /// vCPU that touched it.
        cpu: u8,
        /// Guest physical address, where it is known.
        guest_address: Option<u64>,
        /// Instruction that touched it, where it is known.
        rip: Option<u64>,
    },
    /// An exception while handling an exception while handling an exception.
    TripleFault {
        /// vCPU that had it.
        cpu: u8,
        /// Where it was, if known.
        rip: Option<u64>,
    },
    /// The processor refused to enter the guest.
    EntryFailed {
        /// Which vCPU.
        cpu: u8,
        /// The processor's reason.
        reason: u64,
    },
    /// KVM could not go on.
    InternalError {
        /// Which vCPU.
        cpu: u8,
        /// KVM's suberror.
        suberror: u32,
        /// Where it was, if known.
        rip: Option<u64>,
    },
    /// An exit that was never asked for.
    UnexpectedExit {
        /// Which vCPU.
        cpu: u8,
        /// KVM's number of the exit.
        reason: u32,
    },
    /// The vCPU could not be entered.
    Kvm {
        /// Which vCPU.
        cpu: u8,
        /// What KVM said, with its causes.
        message: String,
    },
    /// A thread of this process ended unexpectedly.
    ThreadDied {
        /// What the thread was for.
        thread: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |f: &mut fmt::Formatter<'_>, rip: &Option<u64>| match rip {
            Some(rip) => write!(f, " at rip {rip:#x}"),
            None => Ok(()),
        };
        match self {
            Self::MemoryError {
                cpu,
                guest_address,
                rip,
            } => {
                match guest_address {
                    Some(address) => write!(f, "guest memory at {address:#x} cannot be read")?,
                    None => write!(f, "guest memory cannot be read")?,
                }
                write!(f, " (vcpu {cpu}")?;
                at(f, rip)?;
                write!(f, ")")
            }
            Self::TripleFault { cpu, rip } => {
                write!(f, "vcpu {cpu} had a triple fault")?;
                at(f, rip)
            }
            Self::EntryFailed { cpu, reason } => {
                write!(
                    f,
                    "the processor refused to run vcpu {cpu}: reason {reason:#x}"
                )
            }
            Self::InternalError { cpu, suberror, rip } => {
                write!(
                    f,
                    "kvm could not run vcpu {cpu}: {}",
                    suberror_text(*suberror)
                )?;
                write!(f, " (internal error, suberror {suberror})")?;
                at(f, rip)
            }
            Self::UnexpectedExit { cpu, reason } => {
                write!(
                    f,
                    "vcpu {cpu} left the guest for an unknown reason {reason}"
                )
            }
            Self::Kvm { cpu, message } => write!(f, "vcpu {cpu} cannot run: {message}"),
            Self::ThreadDied { thread } => write!(f, "{thread} ended unexpectedly"),
        }
    }
}

/// Linux, include/uapi/linux/kvm.h, `KVM_INTERNAL_ERROR_*`.
fn suberror_text(suberror: u32) -> &'static str {
    match suberror {
        1 => "it met an instruction that it cannot emulate",
        2 => "two exceptions came at once",
        3 => "delivering an event made it exit",
        4 => "the processor left the guest for a reason that kvm does not know",
        _ => "no reason given",
    }
}

/// How a vCPU stopped running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// Why.
    pub stop: Stop,
    /// Whether its state may be saved ([`VmExit::is_consistent`]).
    pub is_consistent: bool,
}

/// Runs vCPU `number` until an order waits or the guest ends.
///
/// Unless the guest fails the loop is left at `Interrupted` or `Halted` only: the access that the
/// last exit left open is retired first, so that state can be saved. `is_ordered` says whether an
/// order waits; it is asked after the exit flag has been cleared, so that a kick is never lost (see
/// [`super::thread`]).
pub fn run(vcpu: &mut Vcpu, number: u8, outside: &Outside, is_ordered: impl Fn() -> bool) -> Left {
    let mut ending = None;
    loop {
        let entry = match ending {
            None => VmEntry::Run,
            Some(_) => VmEntry::Retire,
        };
        let exit = match vcpu.enter(entry) {
            Ok(exit) => exit,
            Err(error) => {
                return Left {
                    stop: failed(kvm_failure(number, &error)),
                    // Nobody knows how far it came.
                    is_consistent: false,
                };
            }
        };
        let is_consistent = exit.is_consistent();
        let left = |stop| Left {
            stop,
            is_consistent,
        };
        match exit {
            VmExit::PioRead { port, width, data } => {
                for element in data.chunks_mut(width) {
                    outside.pio.read(port, element);
                }
            }
            VmExit::PioWrite { port, width, data } => {
                for element in data.chunks(width) {
                    ending = ending.or(after_write(outside.pio.write(port, element)));
                }
            }
            VmExit::MmioRead {
                guest_address,
                data,
            } => {
                if is_ram(&outside.ram, guest_address) {
                    let address = FaultAddress::Guest(guest_address);
                    return left(memory_error(vcpu, number, outside, address));
                }
                outside.mmio.read(guest_address, data);
            }
            VmExit::MmioWrite {
                guest_address,
                data,
            } => {
                // What is written to read-only memory is lost, as on a PC.
                if outside.ram.view().slots().is_rom_at(guest_address) {
                    continue;
                }
                if is_ram(&outside.ram, guest_address) {
                    let address = FaultAddress::Guest(guest_address);
                    return left(memory_error(vcpu, number, outside, address));
                }
                ending = ending.or(after_write(outside.mmio.write(guest_address, data)));
            }
            VmExit::Interrupted | VmExit::Halted => {
                // In this order: an order that is given after the question sets the flag again.
                vcpu.exit_flag().clear();
                if let Some(stop) = ending {
                    return left(stop);
                }
                if is_ordered() {
                    return left(Stop::Ordered);
                }
            }
            VmExit::MemoryError { address } => {
                return left(memory_error(vcpu, number, outside, address));
            }
            VmExit::Shutdown => {
                let rip = vcpu.rip();
                return left(failed(Failure::TripleFault { cpu: number, rip }));
            }
            VmExit::EntryFailed { reason } => {
                return left(failed(Failure::EntryFailed {
                    cpu: number,
                    reason,
                }));
            }
            VmExit::InternalError { suberror } => {
                return left(failed(Failure::InternalError {
                    cpu: number,
                    suberror,
                    rip: vcpu.rip(),
                }));
            }
            VmExit::SystemEvent { event: reason } | VmExit::Unexpected { reason } => {
                return left(failed(Failure::UnexpectedExit {
                    cpu: number,
                    reason,
                }));
            }
        }
    }
}

fn after_write(event: DeviceEvent) -> Option<Stop> {
    match event {
        DeviceEvent::None => None,
        DeviceEvent::Reset => Some(Stop::Reset),
        DeviceEvent::PowerOff => Some(Stop::PowerOff),
    }
}

fn failed(failure: Failure) -> Stop {
    Stop::Failed(failure)
}

fn kvm_failure(cpu: u8, error: &dyn std::error::Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        message = format!("{message}: {inner}");
        cause = inner.source();
    }
    Failure::Kvm { cpu, message }
}

/// KVM takes RAM that it cannot reach while it emulates an instruction for a device: an access
/// "to a device" at an address of RAM is a memory error.
fn is_ram(ram: &GuestRam, guest_address: u64) -> bool {
    ram.view().slots().page_at(guest_address).is_some()
}

fn memory_error(vcpu: &Vcpu, number: u8, outside: &Outside, address: FaultAddress) -> Stop {
    let guest_address = match address {
        FaultAddress::Guest(address) => Some(address),
        FaultAddress::Host(address) => guest_address_of(&outside.ram, address),
        FaultAddress::Unknown => None,
    };
    failed(Failure::MemoryError {
        cpu: number,
        guest_address,
        rip: vcpu.rip(),
    })
}

/// Where the guest sees a host address, if it lies in RAM.
fn guest_address_of(ram: &GuestRam, host_address: u64) -> Option<u64> {
    ram.view()
        .slots()
        .iter()
        .find(|slot| (slot.host_address..slot.host_address + slot.bytes).contains(&host_address))
        .map(|slot| slot.guest_address + (host_address - slot.host_address))
}
