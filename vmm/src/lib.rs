//! Pando: a userspace-paged virtual machine monitor. One template VM, many clones.

pub mod arch;
pub mod device;
pub mod memory;
pub mod payload;
