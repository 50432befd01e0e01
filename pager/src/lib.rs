//! The pager: serves the pages of a template image on fault.

/// Anonymous memory of a clone, filled by the pager.
#[derive(Debug)]
pub struct CloneMemory(());

impl CloneMemory {
    /// First address in this process.
    pub fn host_address(&self) -> *mut u8 {
        std::ptr::null_mut()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        0
    }
}
