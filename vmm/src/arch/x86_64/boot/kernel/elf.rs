#![forbid(unsafe_code)]
//! ELF64: an uncompressed Linux kernel, or a guest of our own.

use std::io::{Read, Seek};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::ReadVolatile;

use super::{Image, Kernel, Protocol};
use crate::arch::x86_64::boot::error::BootError;
use crate::arch::x86_64::layout::HIGH_MEMORY_ADDRESS;
use crate::memory::guest::GuestRam;

/// First bytes of every ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";
/// Longest command line, without its zero (`COMMAND_LINE_SIZE` of Linux on x86).
const COMMAND_LINE_LIMIT_BYTES: u32 = 2047;
/// Length of the ELF64 header.
const HEADER_BYTES: u64 = 64;
/// Length of an ELF64 program header.
const PROGRAM_HEADER_BYTES: u16 = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;

/// A program header, as far as loading needs it.
struct Segment {
    kind: u32,
    file_offset: u64,
    file_bytes: u64,
    address: u64,
    memory_bytes: u64,
}

impl Segment {
    fn is_loaded(&self) -> bool {
        self.kind == SEGMENT_LOAD && self.memory_bytes > 0
    }
}

/// Loads every segment at its physical address.
pub(super) fn load<F: Read + ReadVolatile + Seek>(
    ram: &GuestRam,
    image: &mut Image<'_, F>,
) -> Result<Kernel, BootError> {
    let header = image.read_at(0, HEADER_BYTES)?;
    let (table_offset, count) = check_header(image, &header)?;
    let segments = read_segments(image, table_offset, count)?;
    let mut end = 0;
    for segment in segments.iter().filter(|s| s.is_loaded()) {
        end = end.max(check_segment(image, segment)?);
    }
    if end == 0 {
        return Err(image.bad("it has no loadable segment"));
    }
    image.check_fit(ram, end)?;

    let loaded = Elf::load(&*ram.as_vm_memory(), None, image.file, None)
        .map_err(|error| image.bad(error.to_string()))?;
    let protocol = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Protocol::Pvh { entry: entry.0 },
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Protocol::Linux64 {
                entry: loaded.kernel_load.0,
                header: None,
            }
        }
    };
    let (Protocol::Pvh { entry } | Protocol::Linux64 { entry, .. }) = protocol;
    let inside = |s: &Segment| entry.wrapping_sub(s.address) < s.memory_bytes;
    if !segments.iter().any(|s| s.is_loaded() && inside(s)) {
        return Err(image.bad(format!("its entry {entry:#x} lies outside its segments")));
    }
    Ok(Kernel {
        protocol,
        end,
        initrd_end_limit: u64::MAX,
        command_line_limit_bytes: COMMAND_LINE_LIMIT_BYTES,
    })
}

/// Where the program headers are, and how many.
fn check_header<F: Read + ReadVolatile + Seek>(
    image: &Image<'_, F>,
    header: &[u8],
) -> Result<(u64, u16), BootError> {
    if header.len() as u64 != HEADER_BYTES {
        return Err(image.bad("it is truncated in the ELF header"));
    }
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || u16_at(header, 18) != MACHINE_X86_64 {
        return Err(image.bad("it is an ELF for another machine than x86-64"));
    }
    let (table_offset, entry_bytes, count) =
        (u64_at(header, 32), u16_at(header, 54), u16_at(header, 56));
    let table_end = table_offset.checked_add(u64::from(count) * u64::from(PROGRAM_HEADER_BYTES));
    if entry_bytes != PROGRAM_HEADER_BYTES
        || table_offset < HEADER_BYTES
        || table_end.is_none_or(|end| end > image.bytes)
    {
        return Err(image.bad("its program headers are damaged or truncated"));
    }
    Ok((table_offset, count))
}

fn read_segments<F: Read + ReadVolatile + Seek>(
    image: &mut Image<'_, F>,
    table_offset: u64,
    count: u16,
) -> Result<Vec<Segment>, BootError> {
    let entry_bytes = usize::from(PROGRAM_HEADER_BYTES);
    let table = image.read_at(
        table_offset,
        u64::from(count) * u64::from(PROGRAM_HEADER_BYTES),
    )?;
    let mut segments = Vec::new();
    for raw in table.chunks_exact(entry_bytes) {
        let segment = Segment {
            kind: u32_at(raw, 0),
            file_offset: u64_at(raw, 8),
            address: u64_at(raw, 24),
            file_bytes: u64_at(raw, 32),
            memory_bytes: u64_at(raw, 40),
        };
        let followed = matches!(segment.kind, SEGMENT_LOAD | SEGMENT_NOTE);
        let file_end = segment.file_offset.checked_add(segment.file_bytes);
        if followed && file_end.is_none_or(|end| end > image.bytes) {
            return Err(image.bad(format!(
                "it is truncated: a segment of {} bytes at {:#x} reaches past the end of the file",
                segment.file_bytes, segment.file_offset
            )));
        }
        segments.push(segment);
    }
    Ok(segments)
}

/// First address behind a loadable segment.
fn check_segment<F: Read + ReadVolatile + Seek>(
    image: &Image<'_, F>,
    segment: &Segment,
) -> Result<u64, BootError> {
    let end = segment.address.checked_add(segment.memory_bytes);
    match end {
        Some(end)
            if segment.address >= HIGH_MEMORY_ADDRESS
                && segment.file_bytes <= segment.memory_bytes =>
        {
            Ok(end)
        }
        _ => Err(image.bad(format!(
            "a segment of {} bytes at {:#x} cannot be placed (kernels lie above {HIGH_MEMORY_ADDRESS:#x})",
            segment.memory_bytes, segment.address
        ))),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
