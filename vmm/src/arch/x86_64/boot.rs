#![forbid(unsafe_code)]
//! Loads a kernel and everything it expects to find into guest RAM.

use std::path::PathBuf;

use thiserror::Error;

use super::regs::InitialRegisters;
use crate::memory::guest::GuestRam;

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelImage {
    /// A bzImage or an ELF64 on disk.
    File(PathBuf),
    /// An ELF64 in memory.
    Embedded {
        /// What error texts call it.
        name: String,
        /// The whole file.
        bytes: Vec<u8>,
    },
}

/// Everything that a machine boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootSource {
    /// The kernel.
    pub kernel: KernelImage,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, complete.
    pub append: String,
}

/// How the first CPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootEntry {
    /// Registers of the first CPU.
    pub registers: InitialRegisters,
}

/// Why a machine cannot boot.
#[derive(Debug, Error)]
pub enum BootError {}

/// Writes kernel, initrd, command line, memory map, ACPI tables, descriptor and page tables to RAM.
pub fn load(ram: &GuestRam, boot: &BootSource, cpus: u8) -> Result<BootEntry, BootError> {
    let _ = (ram, boot, cpus);
    todo!()
}
