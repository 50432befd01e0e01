#![forbid(unsafe_code)]
//! From what was typed to a machine that cannot be wrong: the only place where a machine's
//! parameters are checked against the host.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::arch::x86_64::boot::{BootSource, KernelImage};
use crate::observe::memory::total_bytes;
use crate::payload;
use crate::spec::{BackendSpec, CpuCount, MachineSpec, SpecError};

/// The kernel name that means the built-in guest.
pub const EMBEDDED_KERNEL: &str = "embedded";
/// Name of the one memory backend of a machine made here.
pub const BACKEND_ID: &str = "ram0";

/// A machine as it was asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineRequest {
    /// A file, or [`EMBEDDED_KERNEL`].
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
}

/// Why a machine cannot be as it was asked for.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// No machine can be like that.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// This host is too small for it.
    #[error(
        "--memory {wanted_bytes} bytes is more than this host's {host_bytes} bytes: ask for less"
    )]
    MemoryAboveHost {
        /// What was asked for.
        wanted_bytes: u64,
        /// What the host has.
        host_bytes: u64,
    },
}

/// Checks a request against what machines and this host can be.
pub fn resolve(request: &MachineRequest) -> Result<(MachineSpec, BootSource), ConfigError> {
    let cpus = CpuCount::new(request.cpus)?;
    let backend = BackendSpec::new(BACKEND_ID, request.memory_bytes).map_err(SpecError::from)?;
    let spec = MachineSpec::new(cpus, vec![backend])?;
    if let Some(host_bytes) = total_bytes()
        && request.memory_bytes > host_bytes
    {
        return Err(ConfigError::MemoryAboveHost {
            wanted_bytes: request.memory_bytes,
            host_bytes,
        });
    }
    let kernel = if request.kernel == Path::new(EMBEDDED_KERNEL) {
        embedded_kernel()
    } else {
        KernelImage::File(request.kernel.clone())
    };
    let boot = BootSource {
        kernel,
        initrd: request.initrd.clone(),
        append: request.append.clone(),
    };
    Ok((spec, boot))
}

/// The built-in guest as a kernel.
pub fn embedded_kernel() -> KernelImage {
    KernelImage::Embedded {
        name: payload::NAME.to_owned(),
        bytes: payload::image(),
    }
}
