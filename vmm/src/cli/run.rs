#![forbid(unsafe_code)]
//! `pando run`: one VM, until its guest ends.

use std::io::IsTerminal;
use std::path::Path;

use super::args::{BootArgs, RunArgs};
use super::fail::Failure;
use super::out::{note, say};
use crate::config::file::{Bytes, MachineFile};
use crate::config::resolve_file;
use crate::launch;
use crate::report::{chain, exit};

/// Where COM1 goes unless told otherwise.
const DEFAULT_SERIAL: &str = "stdio";

/// Runs the VM, or prints it.
pub fn run(args: &RunArgs) -> Result<u8, Failure> {
    let mut file = machine_file(&args.boot)?;
    override_with(&mut file.serial, args.serial.as_ref());
    let (spec, boot) = resolve_file(&file).map_err(|error| Failure::usage(chain(&error)))?;
    if args.print_machine {
        let file = MachineFile::of(&spec, Some(&boot), file.serial.as_deref());
        let text = file.to_toml().map_err(|error| Failure::of(&error))?;
        say!("{}", text.trim_end());
        return Ok(exit::OK);
    }
    let serial = file.serial.as_deref().unwrap_or(DEFAULT_SERIAL);
    if serial == "stdio" && std::io::stdin().is_terminal() {
        note!("this terminal is the VM's COM1; Ctrl-A x ends it");
    }
    let on_pty = &mut |path: &Path| note!("serial console: {}", path.display());
    launch::run(&spec, &boot, serial, on_pty)?;
    Ok(exit::OK)
}

/// The machine that file and flags ask for.
pub fn machine_file(args: &BootArgs) -> Result<MachineFile, Failure> {
    let mut file = match &args.machine {
        Some(path) => MachineFile::read(path).map_err(|error| Failure::usage(chain(&error)))?,
        None => MachineFile::default(),
    };
    override_with(&mut file.kernel, args.kernel.as_ref());
    override_with(&mut file.initrd, args.initrd.as_ref());
    override_with(&mut file.append, args.append.as_ref());
    override_with(&mut file.cpus, args.cpus.as_ref());
    let memory = args.memory.map(|size| Bytes(size.0));
    override_with(&mut file.memory.size, memory.as_ref());
    override_with(&mut file.vmgenid, args.devices.vmgenid.as_ref());
    file.pci |= args.devices.pci;
    file.device.extend(args.devices.tables());
    Ok(file)
}

fn override_with<T: Clone>(file: &mut Option<T>, flag: Option<&T>) {
    if let Some(flag) = flag {
        *file = Some(flag.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;

    #[test]
    fn flags_count_more_than_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.toml");
        std::fs::write(&path, "kernel = 'a'\ncpus = 2\nappend = 'quiet'").unwrap();
        let args = BootArgs {
            machine: Some(path),
            cpus: Some(3),
            memory: Some(Size(64 << 20)),
            ..BootArgs::default()
        };
        let file = machine_file(&args).unwrap();
        assert_eq!(file.kernel.as_deref(), Some(Path::new("a")));
        assert_eq!(
            (file.cpus, file.memory.size),
            (Some(3), Some(Bytes(64 << 20)))
        );
        assert_eq!(file.append.as_deref(), Some("quiet"));
    }
}
