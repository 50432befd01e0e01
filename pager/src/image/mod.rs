#![forbid(unsafe_code)]
//! Template memory on disk: which pages a RAM file holds, what they must hash to, and a handle
//! that can read it and nothing else.

pub(crate) mod cursor;
pub mod frame;
mod index;
mod reader;
mod scan;

pub use frame::FrameError;
pub use index::{BackendIndex, CHUNK_PAGES, ChunkIndex, Index, PageKind};
pub use reader::Image;

#[cfg(test)]
pub(crate) use index::tests::index_of;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why an image or its index was refused.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file could not be opened.
    #[error("cannot open memory file {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file could not be read or measured.
    #[error("cannot read memory file at byte {offset}")]
    Read {
        /// Where in the file.
        offset: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something other than a regular file.
    #[error("memory file {} is not a regular file", path.display())]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// The descriptor can write: a clone must not be able to change its template.
    #[error("memory file {} is open for writing; open it read-only", path.display())]
    Writable {
        /// The path given.
        path: PathBuf,
    },
    /// The file is shorter or longer than the index says.
    #[error("memory file {} has {actual} bytes where its index says {expected}; make the template again", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// What the index says.
        expected: u64,
        /// What the file has.
        actual: u64,
    },
    /// RAM that is no whole number of pages.
    #[error("{bytes} bytes of memory are no whole number of 4096-byte pages")]
    PartialPage {
        /// The size given.
        bytes: u64,
    },
    /// The file changed its size while it was read.
    #[error("memory file ended at byte {offset} while it was scanned, {bytes} were expected")]
    Truncated {
        /// Where it ended.
        offset: u64,
        /// The size expected.
        bytes: u64,
    },
    /// Not an index, one of another time, or a damaged one.
    #[error(
        "the page index is not one that this build wrote; restore it from a copy, or make the template again"
    )]
    Frame(#[from] FrameError),
    /// A body whose checksum is right but whose content is not: written by something else.
    #[error("page index is inconsistent at byte {offset} of its body: {reason}")]
    Body {
        /// Where in the body.
        offset: usize,
        /// What is wrong there.
        reason: &'static str,
    },
}

impl From<cursor::Nonsense> for ImageError {
    fn from(cursor::Nonsense { offset, reason }: cursor::Nonsense) -> Self {
        Self::Body { offset, reason }
    }
}
