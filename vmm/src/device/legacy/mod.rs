//! The devices that every PC has, in their smallest form.

pub mod console;
pub mod i8042;
pub mod power;
pub mod serial;
pub mod state;
