#![forbid(unsafe_code)]
//! Loads a kernel and everything it expects to find into guest RAM.
//!
//! Three protocols, chosen by what the file is: a **bzImage** starts at its 64-bit entry with
//! `boot_params`; an **ELF64 with a PVH note** at its 32-bit entry with `hvm_start_info`; any other
//! **ELF64** at its entry point in long mode with `boot_params` in RSI. In long mode the first
//! 4 GiB are mapped one to one.

mod error;
mod initrd;
mod kernel;
mod map;
mod params;
mod reset;
mod tables;

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use error::BootError;
pub use map::{MapEntry, MapKind, memory_map};

use self::kernel::{Kernel, Protocol};
use super::acpi;
use super::layout::{ACPI_ADDRESS, BOOT_PARAMS_ADDRESS, COMMAND_LINE_ADDRESS};
use super::regs::InitialRegisters;
use super::smbios;
use crate::memory::guest::{GuestMemoryError, GuestRam};
use crate::memory::layout::{PCI_CONFIG_MEMORY, RamLayout};
use crate::spec::{BackendSpec, MachineSpec};

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

/// What the kernel is told beside its own header.
#[derive(Debug)]
struct Handover<'a> {
    map: &'a [MapEntry],
    initrd: Option<initrd::Initrd>,
    rsdp_address: u64,
    command_line_bytes: u32,
}

/// Writes kernel, initrd, command line, memory map, ACPI and SMBIOS tables, descriptor and page tables to RAM.
///
/// RAM must be fresh (all zero): what a kernel expects to be zero is not written. Every error names
/// the file or the size that is wrong; RAM may be partly written then.
pub fn load(ram: &GuestRam, boot: &BootSource, spec: &MachineSpec) -> Result<BootEntry, BootError> {
    // Before anything is written: RAM may be the file of a template, of which nothing is to be lost for a name
    // that is wrong.
    let opened = boot.initrd.as_deref().map(initrd::open).transpose()?;
    let kernel = kernel::load(ram, &boot.kernel)?;
    let command_line_bytes = write_command_line(ram, &boot.append, &kernel)?;
    let initrd = opened
        .map(|opened| initrd::load(ram, opened, &kernel))
        .transpose()?;
    ram.write(ACPI_ADDRESS, &acpi::tables(ACPI_ADDRESS, spec))?;
    smbios::write(ram, spec.identity())?;
    reset::write_reset_vector(ram)?;
    let is_rom = |backend: usize| {
        let backend = spec.backends().get(backend);
        backend.is_some_and(BackendSpec::is_rom)
    };
    let reserved: &[Range<u64>] = if spec.devices().is_empty() {
        &[]
    } else {
        &[PCI_CONFIG_MEMORY]
    };
    // Memory that grows is not there yet: its device tells of it.
    let growing = (0..spec.backends().len()).rev();
    let growing = growing.filter(|&backend| spec.is_growing(backend));
    let there = growing.fold(ram.layout(), RamLayout::without_module);
    let map = memory_map(&there, &is_rom, reserved);
    let handover = Handover {
        map: &map,
        initrd,
        rsdp_address: ACPI_ADDRESS,
        command_line_bytes,
    };
    let registers = match kernel.protocol {
        Protocol::Linux64 { entry, header } => {
            params::write_boot_params(ram, header.as_deref(), &handover)?;
            tables::write_page_tables(ram)?;
            InitialRegisters::linux64(entry)
        }
        Protocol::Pvh { entry } => {
            params::write_pvh(ram, &handover)?;
            InitialRegisters::pvh(entry)
        }
    };
    tables::write_descriptor_table(ram, &registers)?;
    Ok(BootEntry { registers })
}

/// Writes a program that halts for ever, and returns the registers that begin it.
pub fn idle(ram: &GuestRam) -> Result<InitialRegisters, GuestMemoryError> {
    #[rustfmt::skip]
    let code = [
        0xfa,       // cli
        0xf4,       // hlt
        0xeb, 0xfd, // jmp back to hlt
    ];
    ram.write(BOOT_PARAMS_ADDRESS, &code)?;
    Ok(InitialRegisters::pvh(BOOT_PARAMS_ADDRESS))
}

/// Writes the command line with its terminating zero; returns its length without.
fn write_command_line(ram: &GuestRam, append: &str, kernel: &Kernel) -> Result<u32, BootError> {
    if let Some(position) = append.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineZero { position });
    }
    let limit = kernel.command_line_limit_bytes;
    let bytes = u32::try_from(append.len()).unwrap_or(u32::MAX);
    if bytes > limit {
        return Err(BootError::CommandLineTooLong { bytes, limit });
    }
    let mut line = append.as_bytes().to_vec();
    line.push(0);
    ram.write(COMMAND_LINE_ADDRESS, &line)?;
    Ok(bytes)
}

/// Opens a file to load, and says how long it is. Anything but a regular file is refused before it
/// is opened: opening a FIFO would wait for its other end.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

#[cfg(test)]
mod tests;
