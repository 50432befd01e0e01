#![forbid(unsafe_code)]
//! Errors of the crate's edge.

use std::io;

use thiserror::Error;

use crate::client::{ClientId, SpecError};

/// Why a pager could not be made, or ended.
#[derive(Debug, Error)]
pub enum PagerError {
    /// No userfaultfd for this process.
    #[error(
        "userfaultfd is refused; give this user access to /dev/userfaultfd, CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
    )]
    Userfaultfd(#[source] io::Error),
    /// io_uring was demanded and cannot be had.
    #[error(
        "io_uring is refused; see kernel.io_uring_disabled and the container's seccomp profile, or use pread"
    )]
    Uring(#[source] io::Error),
    /// Memory of a clone could not be mapped.
    #[error("cannot map {bytes} bytes for memory {image}")]
    Map {
        /// Id of the image.
        image: String,
        /// Its size.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Memory of a clone could not be registered.
    #[error("cannot register {bytes} bytes of memory {image} with userfaultfd")]
    Register {
        /// Id of the image.
        image: String,
        /// Its size.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel registers the memory of a clone, but not for all that serving it takes.
    #[error("memory {image} cannot be served: the userfaultfd of this kernel offers no {} for it", missing.join(", "))]
    Ioctls {
        /// Id of the image.
        image: String,
        /// Names of the missing ioctls.
        missing: Vec<&'static str>,
    },
    /// Memory that a fork inherited could not be registered.
    #[error("cannot register the holes of memory {image} with userfaultfd")]
    Holes {
        /// Id of the image.
        image: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An image without a page.
    #[error("memory {image} is empty")]
    Empty {
        /// Id of the image.
        image: String,
    },
    /// Buffers, descriptors or threads could not be made.
    #[error("cannot set up the pager: {what}")]
    Setup {
        /// What could not be made.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pager ended by itself.
    #[error("the pager failed: {reason}")]
    Failed {
        /// Why, as in `Health::failure`.
        reason: String,
    },
    /// A client cannot be served, or is none.
    #[error("client {client} is refused")]
    Client {
        /// Who.
        client: ClientId,
        /// Why.
        #[source]
        reason: SpecError,
    },
}
