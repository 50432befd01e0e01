//! Pando: a userspace-paged virtual machine monitor. One template VM, many clones.

pub mod arch;
pub mod device;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod payload;
pub mod sandbox;
pub mod spec;
pub mod vcpu;
