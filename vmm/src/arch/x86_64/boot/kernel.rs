#![forbid(unsafe_code)]
//! Finds out what a kernel file is, proves that it can be loaded, and loads it.
//!
//! The file is not trusted: its headers are checked here, against the file's length and the
//! machine's RAM, before `linux-loader` follows them.

mod bzimage;
mod elf;

use std::io::{Cursor, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ReadVolatile;

use super::error::BootError;
use super::{KernelImage, open_regular};
use crate::memory::guest::GuestRam;

/// How a kernel is started.
#[derive(Debug)]
pub(super) enum Protocol {
    /// Linux's 64-bit entry.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// The header of a bzImage; an ELF has none.
        header: Option<Box<setup_header>>,
    },
    /// The 32-bit PVH entry.
    Pvh {
        /// First instruction.
        entry: u64,
    },
}

/// A kernel in RAM.
#[derive(Debug)]
pub(super) struct Kernel {
    /// How it is started.
    pub(super) protocol: Protocol,
    /// First address behind everything that it needs before it knows the memory map.
    pub(super) end: u64,
    /// First address that an initrd may not reach.
    pub(super) initrd_end_limit: u64,
    /// Longest command line, without the terminating zero.
    pub(super) command_line_limit_bytes: u32,
}

/// A kernel's file while it is looked at.
struct Image<'a, F> {
    name: &'a str,
    bytes: u64,
    file: &'a mut F,
}

impl<F: Read + ReadVolatile + Seek> Image<'_, F> {
    /// The bytes from `offset` on, at most `bytes`; fewer at the end of the file.
    fn read_at(&mut self, offset: u64, bytes: u64) -> Result<Vec<u8>, BootError> {
        let mut buffer = Vec::new();
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.by_ref().take(bytes).read_to_end(&mut buffer))
            .map_err(|source| BootError::ReadKernel {
                name: self.name.to_owned(),
                source,
            })?;
        Ok(buffer)
    }

    /// The error for a kernel that is one but cannot be loaded.
    fn bad(&self, reason: impl Into<String>) -> BootError {
        BootError::BadKernel {
            name: self.name.to_owned(),
            reason: reason.into(),
        }
    }

    /// Refuses a kernel that needs RAM up to `needed_end` where there is less.
    fn check_fit(&self, ram: &GuestRam, needed_end: u64) -> Result<(), BootError> {
        let ram_end = ram.layout().low_ram_end();
        if needed_end <= ram_end {
            return Ok(());
        }
        Err(BootError::KernelDoesNotFit {
            name: self.name.to_owned(),
            needed_end,
            ram_end,
        })
    }
}

/// Loads a kernel into RAM.
pub(super) fn load(ram: &GuestRam, kernel: &KernelImage) -> Result<Kernel, BootError> {
    match kernel {
        KernelImage::File(path) => {
            let name = path.display().to_string();
            let (mut file, bytes) = open_regular(path).map_err(|source| BootError::OpenKernel {
                name: name.clone(),
                source,
            })?;
            load_image(
                ram,
                Image {
                    name: &name,
                    bytes,
                    file: &mut file,
                },
            )
        }
        KernelImage::Embedded { name, bytes } => load_image(
            ram,
            Image {
                name,
                bytes: bytes.len() as u64,
                file: &mut Cursor::new(bytes.as_slice()),
            },
        ),
    }
}

fn load_image<F: Read + ReadVolatile + Seek>(
    ram: &GuestRam,
    mut image: Image<'_, F>,
) -> Result<Kernel, BootError> {
    let head = image.read_at(0, bzimage::HEADER_END)?;
    if head.starts_with(elf::MAGIC) {
        elf::load(ram, &mut image)
    } else if bzimage::is_one(&head) {
        bzimage::load(ram, &mut image, &head)
    } else {
        Err(BootError::NotAKernel {
            name: image.name.to_owned(),
            found: describe(&head),
        })
    }
}

/// What a file that is no kernel looks like, for the error text.
fn describe(head: &[u8]) -> String {
    let known: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", "gzip data (decompress it first)"),
        (b"\xfd7zXZ", "xz data (decompress it first)"),
        (b"\x28\xb5\x2f\xfd", "zstd data (decompress it first)"),
        (b"!<arch>", "an archive (a Debian package?)"),
        (b"070701", "a cpio archive (an initrd?)"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"MZ", "a PE image without a Linux boot header"),
    ];
    if head.is_empty() {
        return "an empty file".to_owned();
    }
    if let Some((_, what)) = known.iter().find(|(magic, _)| head.starts_with(magic)) {
        return (*what).to_owned();
    }
    let first: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("bytes {}", first.join(" "))
}
