#![forbid(unsafe_code)]
//! `pando run`: one VM, until its guest ends.

use std::io::IsTerminal;
use std::path::Path;

use super::args::{BootArgs, RunArgs};
use super::fail::Failure;
use super::out::note;
use crate::config::{self, MachineRequest};
use crate::launch;
use crate::report::{chain, exit};

/// Runs the VM.
pub fn run(args: &RunArgs) -> Result<u8, Failure> {
    let (spec, boot) =
        config::resolve(&request(&args.boot)).map_err(|error| Failure::usage(chain(&error)))?;
    if args.serial == "stdio" && std::io::stdin().is_terminal() {
        note!("this terminal is the VM's COM1; Ctrl-A x ends it");
    }
    let on_pty = &mut |path: &Path| note!("serial console: {}", path.display());
    launch::run(&spec, &boot, &args.serial, on_pty).map_err(|error| Failure::of(&error))?;
    Ok(exit::OK)
}

/// The machine that the flags ask for.
pub fn request(args: &BootArgs) -> MachineRequest {
    MachineRequest {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        append: args.append.clone(),
        memory_bytes: args.memory.0,
        cpus: args.cpus,
    }
}
