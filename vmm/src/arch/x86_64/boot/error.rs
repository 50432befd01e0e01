#![forbid(unsafe_code)]
//! Why a machine cannot boot from what it was given.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::memory::guest::GuestMemoryError;

/// Why a machine cannot boot. Sizes are in bytes.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel's file cannot be opened or is no regular file.
    #[error("cannot open kernel {name}")]
    OpenKernel {
        /// Its path.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel's file cannot be read.
    #[error("cannot read kernel {name}")]
    ReadKernel {
        /// Its path.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error(
        "{name} is no kernel: expected a bzImage (vmlinuz) or a 64-bit x86 ELF (vmlinux), found {found}"
    )]
    NotAKernel {
        /// Its path.
        name: String,
        /// What it looks like.
        found: String,
    },
    /// A kernel, but one that cannot be loaded.
    #[error("kernel {name} cannot be loaded: {reason}")]
    BadKernel {
        /// Its path.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// RAM ends before the kernel does.
    #[error(
        "kernel {name} needs RAM up to {needed_end:#x} ({} MiB), the machine's low RAM ends at {ram_end:#x}: give it more memory",
        needed_end.div_ceil(1 << 20)
    )]
    KernelDoesNotFit {
        /// Its path.
        name: String,
        /// First address behind what it needs.
        needed_end: u64,
        /// First address behind the RAM below the gap.
        ram_end: u64,
    },
    /// The initrd's file cannot be opened or is no regular file.
    #[error("cannot open initrd {}", path.display())]
    OpenInitrd {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The initrd's file is empty.
    #[error("initrd {} is empty", path.display())]
    EmptyInitrd {
        /// Its path.
        path: PathBuf,
    },
    /// No room between the kernel and the end of RAM.
    #[error(
        "initrd {} of {bytes} bytes does not fit: {room} bytes are free behind the kernel; give the machine more memory",
        path.display()
    )]
    InitrdDoesNotFit {
        /// Its path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What is free.
        room: u64,
    },
    /// The initrd's file cannot be read to its end.
    #[error("cannot read initrd {} of {bytes} bytes: {reason}", path.display())]
    ReadInitrd {
        /// Its path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What `vm-memory` said.
        reason: String,
    },
    /// The command line exceeds what the kernel takes.
    #[error("the kernel's command line has {bytes} bytes, this kernel takes at most {limit}")]
    CommandLineTooLong {
        /// Its length.
        bytes: u32,
        /// The kernel's limit, without the terminating zero.
        limit: u32,
    },
    /// The command line would end early.
    #[error("the kernel's command line has a zero byte at position {position}")]
    CommandLineZero {
        /// Where.
        position: usize,
    },
    /// RAM could not be written.
    #[error("cannot write boot data to guest memory")]
    Memory(#[from] GuestMemoryError),
}
