#![forbid(unsafe_code)]
//! Files that the program writes, kept apart from those that are memory or disks: a log, a PID file or what
//! COM1 prints would go into the guest's RAM or disk, or cut a template short under its clones.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::OptionError;
use super::line::Wanted;
use super::line::chardev::Chardev;
use crate::spec::{DeviceSpec, MachineSpec, PortTarget};
use crate::sys::lock::is_locked;

/// Refuses a command line that writes something else to the file of a memory backend or a disk.
pub fn check(wanted: &Wanted, spec: &MachineSpec) -> Result<(), OptionError> {
    for (what, output) in outputs(wanted) {
        let same = spec.backends().iter().find(|backend| {
            let file = backend.file();
            file.is_some_and(|file| is_same(file.path(), output))
        });
        // A log is not kept apart by a lock of its own.
        if what == "-D" && is_in_use(output) {
            return Err(OptionError::new(format!(
                "{what}: {} is the memory of a machine that is there: name another file",
                output.display()
            )));
        }
        // Those that wait for a device too.
        let mut images = wanted.memory.pci.images().map(|(image, _)| image);
        if let Some(image) = images.find(|image| is_same(&image.disk.path, output)) {
            return Err(OptionError::new(format!(
                "{what}: {} is the image {}, which nothing else may write: name another file",
                output.display(),
                image.id
            )));
        }
        if let Some(backend) = same {
            return Err(OptionError::new(format!(
                "{what}: {} is the file of memory backend {}, which nothing else may write: name another file",
                output.display(),
                backend.id()
            )));
        }
    }
    ports(wanted, spec)
}

/// Refuses a port's file that is a memory backend's or a disk's.
fn ports(wanted: &Wanted, spec: &MachineSpec) -> Result<(), OptionError> {
    let consoles = spec.devices().iter().filter_map(DeviceSpec::console);
    for port in consoles.flat_map(|console| &console.ports) {
        let PortTarget::File(output) = &port.target else {
            continue;
        };
        let memory = spec.backends().iter().filter_map(|backend| backend.file());
        let memory = memory.map(|file| file.path());
        let images = wanted.memory.pci.images();
        let images = images.map(|(image, _)| image.disk.path.as_path());
        if memory.chain(images).any(|path| is_same(path, output)) {
            return Err(OptionError::new(format!(
                "chardev: {} is memory or a disk of the machine, which nothing else may write: name another file",
                output.display()
            )));
        }
    }
    Ok(())
}

/// What this program writes to a file, where it does.
pub fn writer_of(wanted: &Wanted, file: &Path) -> Option<&'static str> {
    let mut outputs = outputs(wanted).into_iter();
    outputs.find_map(|(what, output)| is_same(file, output).then_some(what))
}

fn outputs(wanted: &Wanted) -> Vec<(&'static str, &Path)> {
    let program = &wanted.program;
    let named = [("-D", &program.log_file), ("-pidfile", &program.pid_file)];
    let mut all: Vec<_> = named
        .into_iter()
        .filter_map(|(what, path)| Some((what, path.as_deref()?)))
        .collect();
    let monitors = wanted.monitors.iter().map(|monitor| &monitor.chardev);
    let hubs = wanted.hubs.all();
    let logs = hubs.iter().filter_map(|hub| hub.log.as_ref());
    all.extend(logs.map(|log| ("logfile", log.path.as_path())));
    for (what, chardev) in monitors
        .map(|chardev| ("monitor", chardev))
        .chain(hubs.iter().map(|hub| ("chardev", &hub.chardev)))
        .chain(wanted.serial.iter().map(|chardev| ("serial port", chardev)))
    {
        if let Chardev::File { path, .. } = chardev {
            all.push((what, path));
        }
    }
    all
}

/// Whether two paths are one file, or will be when it is made.
fn is_same(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        (Err(_), Err(_)) => place(one).is_some_and(|place| Some(place) == self::place(other)),
        _ => false,
    }
}

fn is_in_use(path: &Path) -> bool {
    let is_file = fs::metadata(path).is_ok_and(|facts| facts.is_file());
    is_file && fs::File::open(path).is_ok_and(|file| is_locked(&file).unwrap_or(false))
}

/// The directory that a file is to be made in, and its name there.
fn place(path: &Path) -> Option<(PathBuf, OsString)> {
    let name = path.file_name()?.to_owned();
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
    Some((directory, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_has_many_paths() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "").unwrap();
        fs::hard_link(path("a"), path("b")).unwrap();
        std::os::unix::fs::symlink(path("a"), path("c")).unwrap();
        assert!(is_same(&path("a"), &path("b")) && is_same(&path("a"), &path("c")));
        assert!(is_same(&path("new"), &path("./new")));
        assert!(!is_same(&path("new"), &path("a")) && !is_same(&path("new"), &path("newer")));
    }
}
