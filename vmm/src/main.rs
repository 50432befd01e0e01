#![forbid(unsafe_code)]
//! The `pando` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Refused or not, all else works: only the message of that one error depends on it.
    let _ = pando_vmm::host::report_file_size_limit();
    ExitCode::from(pando_vmm::cli::main())
}
