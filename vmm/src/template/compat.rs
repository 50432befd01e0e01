#![forbid(unsafe_code)]
//! Whether this host can run a template: every CPU feature that its guest was shown, every
//! model-specific register that its state holds.

use std::path::Path;

use super::error::TemplateError;
use super::manifest::Manifest;
use crate::arch::x86_64::cpuid::{CpuidEntry, missing_features};
use crate::arch::x86_64::msr;

/// What the host offers, as read from KVM.
#[derive(Debug, Clone, Default)]
pub struct HostOffer {
    /// `KVM_GET_SUPPORTED_CPUID`.
    pub cpuid: Vec<CpuidEntry>,
    /// `KVM_GET_MSR_INDEX_LIST`.
    pub msrs: Vec<u32>,
}

/// Refuses a template that this host cannot run, naming all that is missing.
pub fn check(dir: &Path, manifest: &Manifest, host: &HostOffer) -> Result<(), TemplateError> {
    let mut missing: Vec<String> = missing_features(&manifest.cpuid(), &host.cpuid)
        .iter()
        .map(|feature| format!("CPU feature {feature}"))
        .collect();
    missing.extend(
        manifest
            .file()
            .host
            .msrs
            .iter()
            .filter(|msr| !host.msrs.contains(msr))
            .map(|&index| match msr::name(index) {
                Some(name) => format!("MSR {index:#x} ({name})"),
                None => format!("MSR {index:#x}"),
            }),
    );
    if missing.is_empty() {
        Ok(())
    } else {
        Err(TemplateError::Host {
            dir: dir.to_owned(),
            missing,
        })
    }
}
