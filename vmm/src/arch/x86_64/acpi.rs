#![forbid(unsafe_code)]
//! The ACPI tables.
