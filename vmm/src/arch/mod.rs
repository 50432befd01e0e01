//! Facts of the guest's architecture, as plain data: nothing here names a KVM type or a device.

pub mod x86_64;
