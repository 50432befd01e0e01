//! KVM as this project uses it: the only files that name `kvm_ioctls` or `kvm_bindings`.
//!
//! Nothing here decides anything. [`host`] says what this host's KVM offers, [`vm`] makes a VM with
//! its slots and interrupt chips, [`irq`] reads and writes the state of those, [`timer`] is there
//! when it is needed, [`vcpu`] is
//! one vCPU (entering the guest, kicking it out, its registers), and [`abi`] turns kernel
//! structures into bytes and back. In which order state is saved and restored is
//! [`crate::vcpu::state`]'s business.

pub mod abi;
pub mod host;
pub mod irq;
pub mod regs;
pub mod timer;
pub mod vcpu;
pub mod vm;

use std::io;

use thiserror::Error;

use crate::vcpu::state::Section;

pub use host::{host_cpuid, host_msrs, learn};

/// Why KVM could not do something.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm: enable virtualization in the firmware, load kvm_intel or kvm_amd, \
         and give this user read and write access to the device"
    )]
    Open(#[source] io::Error),
    /// The kernel speaks another KVM API.
    #[error(
        "/dev/kvm speaks API version {actual} where {expected} is needed: it is not the device of \
         this kernel's KVM"
    )]
    ApiVersion {
        /// What the kernel said.
        actual: i32,
        /// What this build speaks.
        expected: u32,
    },
    /// KVM lacks something that no machine can do without.
    #[error("this host's KVM lacks {capability}: a newer kernel is needed")]
    Missing {
        /// Name of the capability.
        capability: &'static str,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The first entry of a VM starts a task in the kernel, and that fails each time.
    #[error(
        "kvm cannot start a thread of its own: is the limit of processes reached (ulimit -u, \
         pids.max)?"
    )]
    RunAgain,
    /// Saved bytes that are no such structure.
    #[error(
        "saved {what} has {actual} bytes where {expected} are needed: the state is damaged or of another version"
    )]
    BadLength {
        /// Which structure.
        what: &'static str,
        /// The kernel's size of it.
        expected: usize,
        /// How many bytes there were.
        actual: usize,
    },
    /// Saved state without one of its parts.
    #[error("the saved vCPU has no {section:?}: the state is damaged or of another version")]
    MissingSection {
        /// Which part.
        section: Section,
    },
    /// State that is not final.
    #[error("vcpu {vcpu} stopped in the middle of an access: its state cannot be saved")]
    Inconsistent {
        /// Which vCPU.
        vcpu: u8,
    },
    /// More entries than KVM takes.
    #[error("{actual} {what} are more than the {limit} that KVM takes")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there were.
        actual: usize,
        /// How many KVM takes.
        limit: usize,
    },
    /// A model specific register that this host refuses.
    #[error(
        "msr {index:#x} ({name}) cannot be set to {value:#x} on this host: restore on a host of \
         the same kind, or make the template again here"
    )]
    SetMsr {
        /// Number of the register.
        index: u32,
        /// Its name where it is known.
        name: &'static str,
        /// The value it had.
        value: u64,
    },
    /// The TSC of the saved machine runs at a rate that this host cannot give.
    #[error(
        "the saved machine's TSC runs at {wanted_khz} kHz, this host's at {host_khz} kHz and its \
         KVM cannot scale it: restore on a host of the same rate"
    )]
    TscRate {
        /// Rate that the guest was told, in kHz.
        wanted_khz: u32,
        /// Rate of this host, in kHz.
        host_khz: u32,
    },
    /// A vCPU's `kvm_run` page could not be mapped a second time.
    #[error("cannot map the kvm_run page of a vCPU")]
    MapRun(#[source] io::Error),
}

/// Names the ioctl in an error of `kvm_ioctls`.
fn ioctl(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Ioctl {
        ioctl,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}
