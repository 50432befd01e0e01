//! The embedded guest: a tiny long-mode program of our own, assembled when it is needed.
//!
//! It prints [`protocol::READY_LINE`] on COM1, halts until a command line arrives, obeys it, and
//! prints one line of reply. `demo`, the benchmarks and the KVM tests run it, so none of them needs
//! a kernel image. It keeps to integer and string instructions and port I/O, so that it also runs
//! where KVM emulates every instruction.
//!
//! [`image`] gives the program as an ELF64, [`protocol`] what to say to it and what it answers,
//! [`model`] what it must answer, [`LAYOUT`] where it lies and which pages are free for data.

mod code;
mod elf;
pub mod layout;
pub mod model;
pub mod protocol;
mod reply;
mod tables;

pub use layout::LAYOUT;

/// Name of the embedded guest where a kernel is named (manifests, messages).
pub const NAME: &str = "pando-guest";

/// The embedded guest as an ELF64 executable with a 64-bit entry.
///
/// It expects what a loader of such a kernel gives: long mode, an identity map of itself, and
/// `boot_params` (or null) in `rsi`, of which it reads the memory map alone.
pub fn image() -> Vec<u8> {
    let program = code::assemble();
    let mut segment = vec![0; layout::offset(layout::END)];
    tables::write(&mut segment, &program);
    elf::wrap(&segment, layout::BASE, program.entry)
}
