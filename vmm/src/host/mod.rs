//! What this host is and can do.

pub mod cgroups;
pub mod doctor;
mod limits;
mod memory;
mod paging;

use std::error::Error;

use pando_pager::PagerError;

use crate::kvm::{self, KvmError};
use crate::template::compat::HostOffer;

pub use limits::{raise_descriptor_limit, report_file_size_limit};
pub use paging::{require_paging, require_write_tracking};

/// What this host's KVM offers to a template.
pub fn offer() -> Result<HostOffer, KvmError> {
    Ok(HostOffer {
        cpuid: kvm::host_cpuid()?,
        msrs: kvm::host_msrs()?,
    })
}

/// Whether an error comes, somewhere down its chain, from something that this host does not offer.
pub fn is_lacking(error: &(dyn Error + 'static)) -> bool {
    let lacks_kvm = matches!(
        error.downcast_ref(),
        Some(KvmError::Open(_) | KvmError::ApiVersion { .. } | KvmError::Missing { .. })
    );
    let lacks_paging = matches!(
        error.downcast_ref(),
        Some(PagerError::Userfaultfd(_) | PagerError::Uring(_))
    );
    lacks_kvm || lacks_paging || error.source().is_some_and(is_lacking)
}
