#![forbid(unsafe_code)]
//! Limits of this process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Has a file that grows beyond the limit of file sizes be an error (`EFBIG`) rather than the end of
/// this process.
pub fn report_file_size_limit() -> io::Result<()> {
    // Any handler will do: nobody asks for the flag. Unlike SIG_IGN it is not inherited.
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::signal::SIGXFSZ, flag).map(drop)
}

/// Raises the soft limit of open files to the hard one: each clone takes three descriptors.
pub fn raise_descriptor_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Refused or not, a descriptor that cannot be had is an error of its own.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        );
    }
}
