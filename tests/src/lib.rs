//! Tests of Pando as a whole. The library holds what tests share; the tests are in `tests/tests`.

pub mod command;
pub mod grove;
pub mod herd;
pub mod metrics;
pub mod network;
pub mod qemu;
pub mod qemu_differences;
pub mod rig;
pub mod style;
