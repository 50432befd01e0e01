//! Guest memory: where it lies in the guest, where it lies in this process, and how it is touched.
//!
//! [`layout`] places backends in the guest's address space, [`slots`] is the one place where guest
//! addresses and pages of an image meet, and [`guest`] is the only code that reads or writes guest
//! RAM (by copy, never by reference).

pub mod guest;
pub mod layout;
pub mod slots;
