//! Pando: a userspace-paged virtual machine monitor. One template VM, many clones.

pub mod arch;
pub mod cli;
pub mod clone;
pub mod config;
pub mod console;
pub mod demo;
pub mod device;
pub mod host;
pub mod kvm;
pub mod launch;
pub mod machine;
pub mod memory;
pub mod observe;
pub mod pager_process;
pub mod payload;
pub mod qemu;
pub mod report;
pub mod root;
pub mod sandbox;
pub mod size;
pub mod spec;
pub mod sys;
pub mod template;
pub mod vcpu;
