//! Reads the project's own source as text, for the test that keeps the house rules.
//!
//! The rules are about shape: which module names which, where unsafe code may be, how long things
//! are. Text is enough for that, and it needs no compiler, no device and no network.

pub mod declared;
pub mod layers;
pub mod shape;
pub mod source;
mod text;
pub mod unsafety;

pub use source::{Project, SourceFile};

/// One place that breaks a rule: `path:line: what`.
pub type Finding = String;

/// Rules that a file breaks on purpose, with the reason: (rule, path, reason).
///
/// An entry that excuses nothing is itself a finding.
pub const EXCEPTIONS: &[(&str, &str, &str)] = &[
    (
        "queues",
        "vmm/src/machine/build.rs",
        "every sender waits for its answer: as many requests as there are callers",
    ),
    (
        "queues",
        "vmm/src/vcpu/thread.rs",
        "one order at a time, from the one thread that drives the machine",
    ),
];
