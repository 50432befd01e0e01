#![forbid(unsafe_code)]
//! Why a memory backend cannot be as it was asked for.

use thiserror::Error;

use crate::memory::layout::PAGE_BYTES;

/// Why a memory backend cannot be as it was asked for. Texts contain those of QEMU.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum BackendError {
    /// An id that cannot name a file and a metric.
    #[error(
        "memory backend id {id:?} cannot be used: take 1 to 64 letters, digits, '-', '_' or '.', \
         not beginning with '.'"
    )]
    Id {
        /// The id asked for.
        id: String,
    },
    /// No bytes at all.
    #[error(
        "memory backend {id}: property 'size' of {kind} doesn't take value '0': 0 bytes are no memory"
    )]
    Empty {
        /// Its id.
        id: String,
        /// Its kind in QEMU's words.
        kind: &'static str,
    },
    /// A size that is no whole number of pages.
    #[error(
        "memory backend {id}: backend '{kind}' memory size must be multiple of 4 KiB, {bytes} bytes are no multiple of 4096"
    )]
    Size {
        /// Its id.
        id: String,
        /// Its kind in QEMU's words.
        kind: &'static str,
        /// The size asked for.
        bytes: u64,
    },
    /// A file backend without a file.
    #[error("memory backend {id}: mem-path property not set: name the file")]
    NoPath {
        /// Its id.
        id: String,
    },
    /// An option that only files have.
    #[error("memory backend {id}: Property '{kind}.{option}' not found: only a file has it")]
    NotAFile {
        /// Its id.
        id: String,
        /// Its kind in QEMU's words.
        kind: &'static str,
        /// The option.
        option: &'static str,
    },
    /// Discarding to zero where the memory is the file, or the guest cannot write it.
    #[error(
        "memory backend {id}: discard=zero is for the memory of a clone: say share=off,readonly=on,rom=off, \
         or leave it out"
    )]
    DiscardZero {
        /// Its id.
        id: String,
    },
    /// ROM from a file that is open for writing.
    #[error("memory backend {id}: property 'rom' = 'on' is not supported with 'readonly' = 'off'")]
    RomWritable {
        /// Its id.
        id: String,
    },
    /// RAM on a shared mapping that cannot be written.
    #[error(
        "memory backend {id}: property 'rom' = 'off' is incompatible with 'readonly' = 'on' and \
         'share' = 'on'; a clone has share=off, a template readonly=off"
    )]
    SharedReadonlyRam {
        /// Its id.
        id: String,
    },
    /// An alignment of no whole pages.
    #[error(
        "memory backend {id}: alignment {align_bytes:#x} must be multiples of page size {PAGE_BYTES:#x}"
    )]
    AlignPages {
        /// Its id.
        id: String,
        /// The alignment asked for.
        align_bytes: u64,
    },
    /// An alignment that is no power of two.
    #[error("memory backend {id}: alignment {align_bytes:#x} must be a power of two")]
    AlignPower {
        /// Its id.
        id: String,
        /// The alignment asked for.
        align_bytes: u64,
    },
    /// A beginning inside a page.
    #[error(
        "memory backend {id}: offset {offset_bytes:#x} must be multiples of page size {PAGE_BYTES:#x}"
    )]
    Offset {
        /// Its id.
        id: String,
        /// The offset asked for.
        offset_bytes: u64,
    },
    /// An end behind everything.
    #[error("memory backend {id}: offset {offset_bytes:#x} and size {bytes:#x} exceed 2^63 bytes")]
    TooFar {
        /// Its id.
        id: String,
        /// The offset asked for.
        offset_bytes: u64,
        /// The size asked for.
        bytes: u64,
    },
    /// Pages of ROM cannot be written ahead.
    #[error(
        "memory backend {id}: prealloc=on writes to every page, and this backend is read-only \
         memory (readonly=on without rom=off): leave prealloc out, or add rom=off"
    )]
    PreallocRom {
        /// Its id.
        id: String,
    },
}
