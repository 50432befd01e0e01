//! Memory modules that come and go while the guest runs (ACPI 6.5, 9.11): the registers by which methods of
//! the ACPI tables find what is in a slot, learn what came and what is to go, and take modules out.
//!
//! The memory itself is not here: who hears of an ejection takes it away.

pub mod registers;
pub mod state;
