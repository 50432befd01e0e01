#![forbid(unsafe_code)]
//! Why the file of a memory backend cannot be used. Texts contain those of QEMU where it has one.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why the file of a memory backend cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It cannot be opened or made.
    #[error(
        "can't open backing store {} for guest RAM: {why}{hint}",
        path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: String,
        /// What to do, on a line of its own; may be empty.
        hint: &'static str,
    },
    /// A link to nothing.
    #[error(
        "can't open backing store {} for guest RAM: it is a symbolic link to a file that does not exist: \
         make that file, or remove the link", path.display()
    )]
    Dangling {
        /// The link.
        path: PathBuf,
    },
    /// Not something that holds memory.
    #[error(
        "unable to map backing store for guest RAM: No such device: {} is {what}, not a regular file",
        path.display()
    )]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Nothing to begin with.
    #[error(
        "{id} backing store {} is empty: a clone begins as the file of a template; name that file, \
         or make it with share=on", path.display()
    )]
    Empty {
        /// The backend.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// Not enough.
    #[error(
        "{id} backing store size {actual_bytes:#x} is too small for 'size' option {bytes:#x} plus \
         'offset' option {offset_bytes:#x}: {} is another backend's file, or was cut", path.display()
    )]
    TooSmall {
        /// The backend.
        id: String,
        /// The file.
        path: PathBuf,
        /// Its size.
        actual_bytes: u64,
        /// The backend's size.
        bytes: u64,
        /// Where the backend begins in it.
        offset_bytes: u64,
    },
    /// Pages of another size than the numbers fit.
    #[error(
        "memory backend {id}: {what} {value:#x} must be multiples of page size {page_bytes:#x}, that \
         of the file system of {}", path.display()
    )]
    PageSize {
        /// The backend.
        id: String,
        /// The file.
        path: PathBuf,
        /// Which number.
        what: &'static str,
        /// The number.
        value: u64,
        /// Size of a page there.
        page_bytes: u64,
    },
    /// Somebody writes it.
    #[error(
        "memory backend {id}: {} is in use by {who}: end it first, or what the guest reads would \
         change under it", path.display()
    )]
    InUse {
        /// The backend.
        id: String,
        /// The file.
        path: PathBuf,
        /// By whom.
        who: &'static str,
    },
    /// Something else about the file.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}
