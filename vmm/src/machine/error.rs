#![forbid(unsafe_code)]
//! Why a machine could not be made, run or saved.

use std::io;

use thiserror::Error;

use crate::arch::x86_64::boot::BootError;
use crate::arch::x86_64::cpuid::MissingFeature;
use crate::device::socket::SocketError;
use crate::device::virtio::block::backend::DiskError;
use crate::device::virtio::console::backend::PortError;
use crate::device::virtio::net::backend::TapError;
use crate::device::virtio::vhost_user::error::VhostUserError;
use crate::kvm::KvmError;
use crate::memory::discard::DiscardRefusal;

use super::lifecycle::Outcome;
use super::request::Refusal;

/// Why a machine could not be made, run or saved.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The VM, its slots or its interrupt chips.
    #[error("{doing}")]
    Vm {
        /// What could not be done.
        doing: &'static str,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// A vCPU could not be made.
    #[error("cannot make vcpu {cpu}")]
    MakeVcpu {
        /// Its number.
        cpu: u8,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// A vCPU's state could not be read.
    #[error("cannot save vcpu {cpu}")]
    SaveVcpu {
        /// Its number.
        cpu: u8,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// A vCPU's state could not be set.
    #[error("cannot restore vcpu {cpu}")]
    RestoreVcpu {
        /// Its number.
        cpu: u8,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// The thread of a vCPU is gone.
    #[error("the thread of vcpu {cpu} is gone")]
    VcpuGone {
        /// Its number.
        cpu: u8,
    },
    /// The kernel could not be loaded.
    #[error("cannot load the guest's kernel")]
    Boot(#[source] BootError),
    /// The RAM does not look as the machine describes it.
    #[error("the memory given to the machine is not laid out as the machine describes it")]
    RamLayout,
    /// Saved for another number of vCPUs.
    #[error(
        "the saved state has {saved} vcpus, the machine {machine}: the state belongs to another machine"
    )]
    CpuCount {
        /// vCPUs in the state.
        saved: usize,
        /// vCPUs of the machine.
        machine: u8,
    },
    /// This host lacks features that the saved guest was told of.
    #[error(
        "this host lacks cpu features that the saved guest uses: {}; restore on a host that has \
         them, or make the template again here",
        list(.0)
    )]
    MissingFeatures(Vec<MissingFeature>),
    /// Saved state of a device that this machine does not have.
    #[error("the saved state has a device {kind:?} that this machine does not have")]
    UnknownDevice {
        /// Name of the device.
        kind: String,
    },
    /// Saved state lacks a device.
    #[error("the saved state lacks the device {kind:?}: it is damaged or of another version")]
    MissingDevice {
        /// Name of the device.
        kind: String,
    },
    /// The socket of a vsock device.
    #[error("cannot connect the vsock device {id:?}")]
    Vsock {
        /// Name of the device.
        id: String,
        /// Why not.
        #[source]
        source: SocketError,
    },
    /// A port of a console device.
    #[error("cannot connect port {number} of the console device {id:?}")]
    Port {
        /// Name of the device.
        id: String,
        /// The port's number.
        number: u8,
        /// Why not.
        #[source]
        source: PortError,
    },
    /// The image of a disk.
    #[error("cannot make the disk {id:?}")]
    Disk {
        /// Name of the disk.
        id: String,
        /// Why not.
        #[source]
        source: DiskError,
    },
    /// A disk of the machine for which nobody brought an image.
    #[error("there is no image for the disk {id:?}")]
    NoDisk {
        /// Name of the disk.
        id: String,
    },
    /// The tap of a network device.
    #[error("cannot connect the network device {id:?}")]
    Tap {
        /// Name of the device.
        id: String,
        /// What is wrong.
        #[source]
        source: TapError,
    },
    /// The process that a device is in.
    #[error("cannot make the vhost-user device {id:?}")]
    VhostUser {
        /// Name of the device.
        id: String,
        /// What is wrong.
        #[source]
        source: VhostUserError,
    },
    /// Saved device state of another version.
    #[error("saved state of device {kind:?} has version {saved}, this build reads {ours}")]
    DeviceVersion {
        /// Name of the device.
        kind: String,
        /// Version of the state.
        saved: u32,
        /// Version of this build.
        ours: u32,
    },
    /// Saved device state that cannot be decoded or cannot be.
    #[error("saved state of device {kind:?} is damaged: {reason}")]
    DeviceState {
        /// Name of the device.
        kind: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A device could not be made.
    #[error("cannot make the device {kind:?}")]
    Device {
        /// Name of the device.
        kind: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A thread could not be started.
    #[error("cannot start the thread {thread}: is the limit of processes (ulimit -u) reached?")]
    Thread {
        /// Name of the thread.
        thread: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The SIGBUS handler could not be installed.
    #[error("cannot install the handler of SIGBUS")]
    Sigbus(#[source] io::Error),
    /// A device cannot be plugged or unplugged where there is no bus.
    #[error("the machine has no pci bus: give it one (pci = true) or a device from the start")]
    NoPci,
    /// Another device has its name or its place.
    #[error("device {id:?} cannot be plugged: its name or PCI slot {slot} is taken")]
    Taken {
        /// What it is called.
        id: String,
        /// Its place.
        slot: u8,
    },
    /// There is no memory module, or no slot.
    #[error(
        "memory slot {slot} has no module that could go, or is none: slots are those of -m slots="
    )]
    NoModule {
        /// The slot.
        slot: u32,
    },
    /// A slot that is taken.
    #[error("memory slot {slot} has a module already: name another")]
    ModuleTaken {
        /// The slot.
        slot: u32,
    },
    /// A memory module that cannot be shown to the guest.
    #[error("the memory cannot be shown to the guest")]
    Module(#[source] super::modules::PlugError),
    /// A device that needs what its memory cannot give.
    #[error(transparent)]
    Discard(#[from] DiscardRefusal),
    /// There is no such device.
    #[error("there is no device {id:?}")]
    NoDevice {
        /// What it would be called.
        id: String,
    },
    /// Not in this phase.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The guest ended before the request was done.
    #[error("the machine has ended: {0}")]
    Ended(Outcome),
    /// The machine ended before the request was done.
    #[error("the machine has ended")]
    Gone,
    /// Somebody else still holds the RAM.
    #[error("the machine's memory is still in use")]
    RamInUse,
}

impl MachineError {
    /// Names what was being done to the VM.
    pub(super) fn vm(doing: &'static str) -> impl FnOnce(KvmError) -> Self {
        move |source| Self::Vm { doing, source }
    }
}

fn list(features: &[MissingFeature]) -> String {
    let names: Vec<String> = features.iter().map(ToString::to_string).collect();
    names.join(", ")
}
