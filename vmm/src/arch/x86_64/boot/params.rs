#![forbid(unsafe_code)]
//! What the kernel is told: `boot_params` of the Linux boot protocol, `hvm_start_info` of PVH.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::Handover;
use super::error::BootError;
use super::map::MapEntry;
use crate::arch::x86_64::layout::{
    BOOT_PARAMS_ADDRESS, COMMAND_LINE_ADDRESS, PVH_MEMORY_MAP_ADDRESS, PVH_MODULES_ADDRESS,
    PVH_START_INFO_ADDRESS,
};
use crate::memory::guest::GuestRam;

/// `type_of_loader` of a loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `boot_flag` of a valid header.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS", the header's magic.
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
/// Version of the boot protocol that an ELF, which has no header, is told.
const PROTOCOL_VERSION: u16 = 0x020f;
/// Version of `hvm_start_info` that has a memory map.
const START_INFO_VERSION: u32 = 1;

/// Writes `boot_params` with the kernel's own header, or with a minimal one for an ELF.
pub(super) fn write_boot_params(
    ram: &GuestRam,
    header: Option<&setup_header>,
    handover: &Handover<'_>,
) -> Result<(), BootError> {
    let mut params = boot_params {
        acpi_rsdp_addr: handover.rsdp_address,
        hdr: header.copied().unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: PROTOCOL_VERSION,
            cmdline_size: handover.command_line_bytes,
            kernel_alignment: 0x100_0000,
            ..setup_header::default()
        }),
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low32(COMMAND_LINE_ADDRESS);
    if let Some(initrd) = handover.initrd {
        params.hdr.ramdisk_image = low32(initrd.address);
        params.hdr.ramdisk_size = low32(initrd.bytes);
    }
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(handover.map) {
        *entry = e820(range);
        params.e820_entries += 1;
    }
    params.e820_table = table;
    Ok(ram.write(BOOT_PARAMS_ADDRESS, params.as_slice())?)
}

fn e820(range: &MapEntry) -> boot_e820_entry {
    boot_e820_entry {
        addr: range.start,
        size: range.bytes,
        r#type: range.kind.code(),
    }
}

/// Everything told to a kernel lies in RAM below 4 GiB.
fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Writes `hvm_start_info`, the module list and the memory map.
pub(super) fn write_pvh(ram: &GuestRam, handover: &Handover<'_>) -> Result<(), BootError> {
    let modules: Vec<hvm_modlist_entry> = handover
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.bytes,
            ..hvm_modlist_entry::default()
        })
        .collect();
    let map: Vec<hvm_memmap_table_entry> = handover
        .map
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.bytes,
            type_: range.kind.code(),
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        nr_modules: u32::from(handover.initrd.is_some()),
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            PVH_MODULES_ADDRESS
        },
        cmdline_paddr: COMMAND_LINE_ADDRESS,
        rsdp_paddr: handover.rsdp_address,
        memmap_paddr: PVH_MEMORY_MAP_ADDRESS,
        memmap_entries: low32(map.len() as u64),
        ..hvm_start_info::default()
    };
    ram.write(PVH_MODULES_ADDRESS, &to_bytes(&modules))?;
    ram.write(PVH_MEMORY_MAP_ADDRESS, &to_bytes(&map))?;
    Ok(ram.write(PVH_START_INFO_ADDRESS, info.as_slice())?)
}

fn to_bytes<T: ByteValued>(entries: &[T]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.as_slice().to_vec())
        .collect()
}
