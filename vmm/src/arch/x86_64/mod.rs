//! What an x86-64 guest needs before its first instruction, and what its virtual CPUs are.
//!
//! [`boot`] writes a kernel and all that it expects into RAM and says with which [`regs`] the first
//! CPU starts; [`acpi`] describes the machine to it; [`cpuid`] and [`msr`] choose CPU features and
//! registers so that a frozen machine can go on elsewhere; [`ports`] and [`layout`] say where the
//! legacy devices and the boot-time structures are.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod ports;
pub mod regs;
pub mod smbios;
