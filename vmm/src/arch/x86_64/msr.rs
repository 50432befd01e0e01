#![forbid(unsafe_code)]
//! Which model specific registers are saved, in which order they are restored, and their names.

/// The MSRs to save, in the order in which they are to be restored, out of those that the host
/// lists (`KVM_GET_MSR_INDEX_LIST`).
#[must_use]
pub fn to_save(index_list: &[u32]) -> Vec<u32> {
    let _ = index_list;
    todo!()
}

/// The manual's name of an MSR.
#[must_use]
pub fn name(index: u32) -> Option<&'static str> {
    let _ = index;
    todo!()
}

/// MSRs (index, value) that every CPU starts with and that are not as reset leaves them.
#[must_use]
pub fn boot_msrs() -> Vec<(u32, u64)> {
    todo!()
}
