#![forbid(unsafe_code)]
//! Why a device in another process cannot be had, or does not go on.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a device in another process cannot be had, or does not go on.
#[derive(Debug, Error)]
pub enum VhostUserError {
    /// Nobody listens.
    #[error("failed to connect to '{}'", path.display())]
    Connect {
        /// The process's socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It does not answer.
    #[error(
        "the vhost-user backend at {} does not answer {request} within {limit_ms} ms: it is given up; \
         start it again, and reset the guest's device or the machine",
        path.display()
    )]
    Silent {
        /// Its socket.
        path: PathBuf,
        /// What it was asked.
        request: &'static str,
        /// How long it was waited for.
        limit_ms: u128,
    },
    /// It does not say what can be said, or refuses, or is gone.
    #[error("the vhost-user backend at {} breaks off at {request}", path.display())]
    Request {
        /// Its socket.
        path: PathBuf,
        /// What it was asked.
        request: &'static str,
        /// What is wrong with the answer.
        #[source]
        source: vhost::Error,
    },
    /// It says what cannot be.
    #[error("the vhost-user backend at {} {reason}", path.display())]
    Wrong {
        /// Its socket.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It is gone.
    #[error(
        "the vhost-user backend at {} has closed its socket: start it again, and reset the guest's device \
         or the machine",
        path.display()
    )]
    Gone {
        /// Its socket.
        path: PathBuf,
    },
    /// The guest's rings cannot be handed over.
    #[error("queue {queue} of the guest cannot be handed to the vhost-user backend: {reason}")]
    Ring {
        /// Its number.
        queue: usize,
        /// Why not.
        reason: String,
    },
    /// Some memory cannot be handed over.
    #[error(
        "guest memory at {guest_address:#x} is not shared, so the vhost-user backend at {} cannot reach it",
        path.display()
    )]
    Memory {
        /// The process's socket.
        path: PathBuf,
        /// Where the memory begins in the guest.
        guest_address: u64,
    },
    /// This host does not give what is needed.
    #[error("cannot make what a vhost-user device needs of this host")]
    Host(#[from] io::Error),
}
