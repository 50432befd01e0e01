//! What this host is and can do.

pub mod doctor;
mod limits;
mod paging;

use crate::kvm::{self, KvmError};
use crate::template::compat::HostOffer;

pub use limits::raise_descriptor_limit;

/// What this host's KVM offers to a template.
pub fn offer() -> Result<HostOffer, KvmError> {
    Ok(HostOffer {
        cpuid: kvm::host_cpuid()?,
        msrs: kvm::host_msrs()?,
    })
}
