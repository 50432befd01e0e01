#![forbid(unsafe_code)]
//! The `pando` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(pando_vmm::cli::main())
}
