#![forbid(unsafe_code)]
//! bzImage: the setup header, the protected-mode kernel behind it, and its 64-bit entry.
//!
//! Linux, Documentation/arch/x86/boot.rst.

use std::io::{Read, Seek};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress, ReadVolatile};

use super::{Image, Kernel, Protocol};
use crate::arch::x86_64::boot::error::BootError;
use crate::arch::x86_64::boot::params::HEADER_MAGIC;
use crate::arch::x86_64::layout::{COMMAND_LINE_ROOM_BYTES, HIGH_MEMORY_ADDRESS};
use crate::memory::guest::GuestRam;

/// The setup header begins here in the file.
const HEADER_START: usize = 0x1f1;
/// Nothing of the header lies behind this offset.
pub(super) const HEADER_END: u64 = 0x290;
/// The header's own length is told at this offset: it ends at 0x202 plus the byte there.
const HEADER_LENGTH_AT: usize = 0x201;
/// What that byte is added to.
const HEADER_LENGTH_BASE: usize = 0x202;
/// First protocol version with `xloadflags`.
const VERSION_WITH_XLOADFLAGS: u16 = 0x020c;
/// `loadflags`: the protected-mode code is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry in the protected-mode kernel.
const ENTRY_64_BYTES: u64 = 0x200;
/// Unit of `setup_sects`.
const SECTOR_BYTES: u64 = 512;
/// What `setup_sects` 0 stands for.
const DEFAULT_SETUP_SECTORS: u8 = 4;

/// Whether the first bytes of a file are those of a bzImage.
pub(super) fn is_one(head: &[u8]) -> bool {
    let magic_at = HEADER_LENGTH_BASE;
    head.get(magic_at..magic_at + 4) == Some(&HEADER_MAGIC.to_le_bytes())
}

/// Loads the protected-mode kernel at 1 MiB.
pub(super) fn load<F: Read + ReadVolatile + Seek>(
    ram: &GuestRam,
    image: &mut Image<'_, F>,
    head: &[u8],
) -> Result<Kernel, BootError> {
    let header = read_header(head);
    let version = header.version;
    if version < VERSION_WITH_XLOADFLAGS {
        return Err(image.bad(format!(
            "boot protocol {:x}.{:02x} is older than 2.12, which has the 64-bit entry",
            version >> 8,
            version & 0xff
        )));
    }
    if header.loadflags & LOADED_HIGH == 0 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(image.bad("it has no 64-bit entry (is it a 32-bit kernel?)"));
    }
    let setup_sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => sectors,
    };
    let setup_bytes = (u64::from(setup_sectors) + 1) * SECTOR_BYTES;
    let code_bytes = image
        .bytes
        .checked_sub(setup_bytes)
        .filter(|&bytes| bytes > ENTRY_64_BYTES)
        .ok_or_else(|| image.bad(format!("it is truncated at {} bytes", image.bytes)))?;
    check_length(image, &header, code_bytes)?;
    let end = needed_end(&header, code_bytes);
    image.check_fit(ram, end)?;

    let loaded = BzImage::load(
        &*ram.as_vm_memory(),
        Some(GuestAddress(HIGH_MEMORY_ADDRESS)),
        image.file,
        None,
    )
    .map_err(|error| image.bad(error.to_string()))?;
    let mut header = header;
    header.code32_start = u32::try_from(loaded.kernel_load.0).unwrap_or(u32::MAX);
    Ok(Kernel {
        protocol: Protocol::Linux64 {
            entry: HIGH_MEMORY_ADDRESS + ENTRY_64_BYTES,
            header: Some(Box::new(header)),
        },
        end,
        initrd_end_limit: u64::from(header.initrd_addr_max) + 1,
        command_line_limit_bytes: u64::from(header.cmdline_size)
            .min(COMMAND_LINE_ROOM_BYTES - 1)
            .try_into()
            .unwrap_or(u32::MAX),
    })
}

/// The header alone: what lies behind its own end in the file is code, not header.
fn read_header(head: &[u8]) -> setup_header {
    let mut header = setup_header::default();
    let end = HEADER_LENGTH_BASE + head.get(HEADER_LENGTH_AT).map_or(0, |&b| usize::from(b));
    let fields = head.get(HEADER_START..end.min(head.len())).unwrap_or(&[]);
    let bytes = header.as_mut_slice();
    let length = fields.len().min(bytes.len());
    bytes[..length].copy_from_slice(&fields[..length]);
    header
}

/// Refuses a file that ends before the compressed kernel does.
fn check_length<F: Read + ReadVolatile + Seek>(
    image: &Image<'_, F>,
    header: &setup_header,
    code_bytes: u64,
) -> Result<(), BootError> {
    let payload_end = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if payload_end <= code_bytes {
        return Ok(());
    }
    Err(image.bad(format!(
        "it is truncated: {} bytes are missing",
        payload_end - code_bytes
    )))
}

/// First address behind what the kernel needs to decompress itself.
fn needed_end(header: &setup_header, code_bytes: u64) -> u64 {
    let alignment = u64::from(header.kernel_alignment).max(1);
    let aligned = HIGH_MEMORY_ADDRESS
        .checked_next_multiple_of(alignment)
        .unwrap_or(u64::MAX);
    let runs_at = aligned.max(header.pref_address);
    runs_at
        .saturating_add(u64::from(header.init_size))
        .max(HIGH_MEMORY_ADDRESS + code_bytes)
}
