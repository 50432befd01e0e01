#![forbid(unsafe_code)]
//! The initial RAM disk: as high as the kernel allows, so that the kernel's own room stays free.

use std::fs::File;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use super::kernel::Kernel;
use super::open_regular;
use crate::memory::guest::GuestRam;
use crate::memory::layout::PAGE_BYTES;

/// Where the initrd is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initrd {
    /// First guest physical address, a multiple of the page size.
    pub(super) address: u64,
    /// Length in bytes.
    pub(super) bytes: u64,
}

/// An initrd's file.
#[derive(Debug)]
pub(super) struct Opened<'a> {
    path: &'a Path,
    file: File,
    bytes: u64,
}

/// Opens the file at `path`.
pub(super) fn open(path: &Path) -> Result<Opened<'_>, BootError> {
    let open = |source| BootError::OpenInitrd {
        path: path.to_owned(),
        source,
    };
    let (file, bytes) = open_regular(path).map_err(open)?;
    if bytes == 0 {
        return Err(BootError::EmptyInitrd {
            path: path.to_owned(),
        });
    }
    Ok(Opened { path, file, bytes })
}

/// Reads it into RAM.
pub(super) fn load(
    ram: &GuestRam,
    opened: Opened<'_>,
    kernel: &Kernel,
) -> Result<Initrd, BootError> {
    let Opened {
        path,
        mut file,
        bytes,
    } = opened;
    let end = ram.layout().low_ram_end().min(kernel.initrd_end_limit);
    let address = place(bytes, kernel.end, end).map_err(|room| BootError::InitrdDoesNotFit {
        path: path.to_owned(),
        bytes,
        room,
    })?;
    // `place` checked that it fits into RAM, which fits into the address space of this process.
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    ram.as_vm_memory()
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|error| BootError::ReadInitrd {
            path: path.to_owned(),
            bytes,
            reason: error.to_string(),
        })?;
    Ok(Initrd { address, bytes })
}

/// The highest page at which `bytes` fit between `kernel_end` and `end`; the room there is, if
/// they do not.
fn place(bytes: u64, kernel_end: u64, end: u64) -> Result<u64, u64> {
    let first = kernel_end.next_multiple_of(PAGE_BYTES);
    match end.checked_sub(bytes).map(|at| at - at % PAGE_BYTES) {
        Some(address) if address >= first => Ok(address),
        _ => Err((end - end % PAGE_BYTES).saturating_sub(first)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_initrd_goes_as_high_as_it_can() {
        assert_eq!(place(5000, 0x10_0000, 0x40_0000), Ok(0x3f_e000));
        assert_eq!(place(0x30_0000, 0x10_0000, 0x40_0000), Ok(0x10_0000));
        assert_eq!(place(0x30_0001, 0x10_0000, 0x40_0000), Err(0x30_0000));
        assert_eq!(place(1, 0x40_0000, 0x40_0000), Err(0));
        assert_eq!(place(1, 0x50_0000, 0x40_0000), Err(0));
        assert_eq!(place(u64::MAX, 0x10_0000, 0x40_0000), Err(0x30_0000));
    }

    proptest! {
        #[test]
        fn what_is_placed_lies_between_kernel_and_end(
            bytes in 1_u64..1 << 32, kernel_end in 0_u64..1 << 32, end in 0_u64..1 << 32,
        ) {
            match place(bytes, kernel_end, end) {
                Ok(address) => {
                    prop_assert!(address >= kernel_end && address + bytes <= end);
                    prop_assert!(address % PAGE_BYTES == 0);
                    prop_assert!(end - (address + bytes) < PAGE_BYTES);
                }
                Err(room) => prop_assert!(room < bytes),
            }
        }
    }
}
