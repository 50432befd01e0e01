#![forbid(unsafe_code)]
//! QEMU's command lines and its monitor, on Pando: the options of the VM templating page and what
//! surrounds them.
//!
//! ```text
//! argv -> words (pure) -> line::Wanted -> MachineParts -> MachineSpec -> vm::Plan -> vm::Vm
//! QMP  -> qmp::json -> qmp::message -> qmp::commands -> the thread of vm::Vm -> answer, events
//! ```
//!
//! What QEMU does and Pando cannot is refused by name, never ignored. `docs/qemu.md` has every
//! option, command and difference; the tests compare it with the tables here.

pub mod background;
pub mod error;
pub mod hmp;
pub mod line;
pub mod link;
pub mod migration;
pub mod outputs;
mod processes;
pub mod qmp;
pub mod run;
pub mod vm;
pub mod words;

use std::path::Path;

/// How the names begin by which QEMU's system emulator is known, and by which a link to Pando acts as it.
const EMULATORS: [&str; 3] = ["qemu-system-x86_64", "qemu-kvm", "kvm"];

/// The name by which this program was started, if it is that of QEMU's emulator.
pub fn run_name() -> Option<String> {
    Some(program_name()).filter(|name| is_emulator(name))
}

fn is_emulator(name: &str) -> bool {
    EMULATORS.iter().any(|emulator| {
        let rest = name.strip_prefix(emulator);
        // `kvmtool` is another program.
        rest.is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
    })
}

/// The last part of the name by which this program was started.
pub fn program_name() -> String {
    let first = std::env::args_os().next().unwrap_or_default();
    Path::new(&first).file_name().map_or_else(
        || "pando".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_emulator_are_known() {
        for name in [
            "qemu-system-x86_64",
            "qemu-system-x86_64-9.2",
            "qemu-kvm",
            "kvm",
            "kvm-spice",
        ] {
            assert!(is_emulator(name), "{name}");
        }
        for name in ["pando", "qemu-img", "kvmtool", "qemu-system-aarch64", ""] {
            assert!(!is_emulator(name), "{name}");
        }
    }
}
