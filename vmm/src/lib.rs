//! Pando: a userspace-paged virtual machine monitor. One template VM, many clones.

pub mod memory;
pub mod payload;
