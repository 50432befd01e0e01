//! Guest memory: where it lies in the guest, where it lies in this process, and how it is touched.
//!
//! [`layout`] places backends in the guest's address space, [`slots`] is the one place where guest
//! addresses and pages of an image meet, and [`guest`] is the only code that reads or writes guest
//! RAM (by copy, never by reference). [`discard`] is asked before any of it is discarded. [`open`] opens the file of a backend, and [`provide`] makes all
//! memory of a machine that is neither template directory nor clone of one.

pub mod discard;
pub mod guest;
pub mod layout;
pub mod open;
pub mod provide;
pub mod slots;
