#![forbid(unsafe_code)]
//! What this host can do for a pager: asked of the kernel, never deduced from its version.

use std::io;

use crate::health::PoisonMethod;
use crate::port::IoPath;
pub use crate::sys::features::UffdFeatures;
use crate::sys::uring::{self, UffdWait};
pub use crate::sys::userfaultfd::UffdAccess;

/// What userfaultfd offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UffdFacts {
    /// How it is to be had.
    pub access: UffdAccess,
    /// What it can do.
    pub features: UffdFeatures,
    /// What touching a page that cannot be had does.
    pub poison: PoisonMethod,
}

/// A refusal, with the setting that may be behind it.
#[derive(Debug)]
pub struct Refusal {
    /// What the kernel said.
    pub error: io::Error,
    /// The sysctl that decides and its value, where it could be read.
    pub sysctl: Option<(&'static str, String)>,
}

/// Facts for `pando doctor`.
#[derive(Debug)]
pub struct HostFacts {
    /// userfaultfd for kernel faults too, as KVM raises them.
    pub userfaultfd: Result<UffdFacts, Refusal>,
    /// The path that reads take with io_uring. Needs userfaultfd to be found out.
    pub io_uring: Result<IoPath, Refusal>,
}

/// Asks. Changes nothing; takes well under a millisecond.
pub fn probe() -> HostFacts {
    let userfaultfd = crate::sys::userfaultfd::probe()
        .map(|(access, features)| UffdFacts {
            access,
            features,
            poison: if features.poison() {
                PoisonMethod::Marker
            } else {
                PoisonMethod::Protect
            },
        })
        .map_err(|error| refusal(error, "vm.unprivileged_userfaultfd"));
    let io_uring = uring::probe()
        .map(|wait| match wait {
            UffdWait::Read => IoPath::UringRead,
            UffdWait::Poll => IoPath::UringPoll,
        })
        .map_err(|error| refusal(error, "kernel.io_uring_disabled"));
    HostFacts {
        userfaultfd,
        io_uring,
    }
}

fn refusal(error: io::Error, sysctl: &'static str) -> Refusal {
    let path = format!("/proc/sys/{}", sysctl.replace('.', "/"));
    let value = std::fs::read_to_string(path).ok();
    Refusal {
        error,
        sysctl: value.map(|value| (sysctl, value.trim().to_owned())),
    }
}
