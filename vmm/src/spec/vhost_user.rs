#![forbid(unsafe_code)]
//! Devices in other processes, and the memory that they need: such a process maps all of guest memory, so all
//! of it must be in files that are the memory (`share=on`). A clone's memory never is.

use std::path::PathBuf;

use super::backend::{BackendSource, BackendSpec, FileAccess};
use super::device::{DeviceFault, DeviceKind, DeviceSpec};
use super::{MAX_SOCKET_PATH_BYTES, MacAddress, MachineSpec, SpecError};

/// Most pieces of memory that a backend takes (`VHOST_MEMORY_BASELINE_NREGIONS`).
const MAX_REGIONS: usize = 8;

/// A device in another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserParts {
    /// The Unix socket on which the process listens.
    pub socket: PathBuf,
    /// What the guest finds.
    pub function: VhostUserFunction,
}

/// What a device in another process is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VhostUserFunction {
    /// A disk.
    Block,
    /// A network device.
    Net {
        /// Its hardware address; without it, the first free one from [`MacAddress::DEFAULT`] on.
        mac: Option<MacAddress>,
    },
}

impl VhostUserFunction {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Block => "vhost-user-blk",
            Self::Net { .. } => "vhost-user-net",
        }
    }
}

impl VhostUserParts {
    pub(super) fn check(&self) -> Result<(), DeviceFault> {
        let bytes = self.socket.as_os_str().len();
        if (1..=MAX_SOCKET_PATH_BYTES).contains(&bytes) {
            return Ok(());
        }
        Err(DeviceFault::BadParts {
            reason: format!(
                "the path of the backend's socket is {bytes} bytes long: a socket's path has room for 1 to \
                 {MAX_SOCKET_PATH_BYTES}"
            ),
        })
    }
}

/// Why a process cannot share a backend's memory: what the backend is, and what to change.
pub fn fault_of_unshared(backend: &BackendSpec) -> Option<String> {
    let id = backend.id();
    let clone = "take the device off the line, or give the machine memory with share=on that is no template's";
    let (is, remedy) = match backend.source() {
        BackendSource::Memfd { share: true } => return None,
        BackendSource::File(file) => match file.access() {
            FileAccess::Template => return None,
            FileAccess::Clone => (
                "is a clone's (share=off,readonly=on,rom=off): what the guest writes is in no file, and the \
                 template's file would show the process stale memory",
                clone,
            ),
            FileAccess::Private => (
                "is private (share=off): what the guest writes is in no file, and the file would show the \
                 process stale memory",
                "say share=on",
            ),
            FileAccess::Rom { .. } => (
                "is read-only: the process could not write it",
                "leave the module out",
            ),
        },
        BackendSource::Memfd { share: false } => ("is private (share=off)", "say share=on"),
        BackendSource::Ram { .. } => (
            "has no file that another process could map",
            "consider using -object memory-backend-file share=on, or memory-backend-memfd",
        ),
    };
    Some(format!("memory backend {id:?} {is}: {remedy}"))
}

impl MachineSpec {
    /// Refuses a device in another process where that cannot reach all memory.
    pub(super) fn check_sharing(&self, devices: &[DeviceSpec]) -> Result<(), SpecError> {
        let Some(device) = devices.iter().find(|d| d.vhost_user().is_some()) else {
            return Ok(());
        };
        let fault = |reason| SpecError::Device {
            id: device.id().to_owned(),
            reason: DeviceFault::Unshared { reason },
        };
        let kind = device.kind().word();
        if let Some(reason) = self.backends().iter().find_map(fault_of_unshared) {
            return Err(fault(format!(
                "{kind} shares all guest memory with another process, and {reason}"
            )));
        }
        let regions = self.layout().segments().len();
        if regions > MAX_REGIONS {
            return Err(fault(format!(
                "{kind} shares all guest memory with another process, which takes {MAX_REGIONS} pieces of \
                 memory, and the machine has {regions}: give it fewer backends and modules"
            )));
        }
        Ok(())
    }
}

impl DeviceSpec {
    /// The device in another process, if it is one.
    pub fn vhost_user(&self) -> Option<&VhostUserParts> {
        match self.kind() {
            DeviceKind::VhostUser(parts) => Some(parts),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BackendKind, BackendOptions, CpuCount, DeviceParts, OnOffAuto};
    use super::*;

    fn device(socket: &str) -> DeviceParts {
        DeviceParts {
            id: Some("vu0".to_owned()),
            slot: None,
            kind: DeviceKind::VhostUser(VhostUserParts {
                socket: socket.into(),
                function: VhostUserFunction::Block,
            }),
        }
    }

    fn backend(kind: BackendKind, share: bool, readonly: bool) -> BackendSpec {
        BackendSpec::from_options(BackendOptions {
            kind,
            id: "pc.ram".to_owned(),
            path: (kind == BackendKind::File).then(|| "tpl".into()),
            bytes: 64 << 20,
            share: Some(share),
            readonly,
            rom: if readonly {
                OnOffAuto::Off
            } else {
                OnOffAuto::Auto
            },
            ..BackendOptions::default()
        })
        .unwrap()
    }

    fn machine(backends: Vec<BackendSpec>) -> Result<MachineSpec, SpecError> {
        let spec = MachineSpec::new(CpuCount::ONE, backends).unwrap();
        spec.with_devices(vec![device("/run/vu")])
    }

    #[test]
    fn memory_that_is_a_file_can_be_shared() {
        for kind in [BackendKind::File, BackendKind::Memfd] {
            let spec = machine(vec![backend(kind, true, false)]).unwrap();
            let device = &spec.devices()[0];
            assert_eq!(
                device.vhost_user().unwrap().socket,
                PathBuf::from("/run/vu")
            );
        }
    }

    #[test]
    fn memory_that_is_not_shared_is_refused_with_its_id_and_the_option() {
        let refused = |kind, share, readonly| {
            let error = machine(vec![backend(kind, share, readonly)]).unwrap_err();
            error.to_string()
        };
        assert_eq!(
            refused(BackendKind::File, false, true),
            "device \"vu0\": vhost-user-blk shares all guest memory with another process, and memory backend \
             \"pc.ram\" is a clone's (share=off,readonly=on,rom=off): what the guest writes is in no file, and \
             the template's file would show the process stale memory: take the device off the line, or give \
             the machine memory with share=on that is no template's"
        );
        assert_eq!(
            refused(BackendKind::Ram, false, false),
            "device \"vu0\": vhost-user-blk shares all guest memory with another process, and memory backend \
             \"pc.ram\" has no file that another process could map: consider using -object \
             memory-backend-file share=on, or memory-backend-memfd"
        );
        for (kind, share) in [(BackendKind::File, false), (BackendKind::Memfd, false)] {
            let text = refused(kind, share, false);
            assert!(text.contains("\"pc.ram\" is private (share=off)"), "{text}");
            assert!(text.ends_with(": say share=on"), "{text}");
        }
        // Anonymous memory that is shared has no descriptor either.
        assert!(refused(BackendKind::Ram, true, false).contains("has no file"));
    }

    #[test]
    fn one_backend_that_is_not_shared_is_one_too_many() {
        let other = BackendSpec::new("other", 64 << 20).unwrap();
        let error = machine(vec![backend(BackendKind::File, true, false), other]);
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("memory backend \"other\" has no file"),
            "{text}"
        );
    }

    #[test]
    fn more_pieces_than_a_backend_takes_are_refused() {
        let backends = (0..9).map(|number| {
            BackendSpec::from_options(BackendOptions {
                kind: BackendKind::Memfd,
                id: format!("m{number}"),
                bytes: 16 << 20,
                ..BackendOptions::default()
            })
            .unwrap()
        });
        let text = machine(backends.collect()).unwrap_err().to_string();
        assert!(
            text.contains("takes 8 pieces of memory, and the machine has 9"),
            "{text}"
        );
    }

    #[test]
    fn a_device_that_comes_later_is_refused_as_well() {
        let spec = MachineSpec::new(CpuCount::ONE, vec![backend(BackendKind::File, false, true)]);
        let error = spec.unwrap().with_device(device("/run/vu")).unwrap_err();
        assert!(error.to_string().contains("is a clone's"), "{error}");
    }

    #[test]
    fn a_socket_has_a_path_that_sockets_can_have() {
        let spec = MachineSpec::new(
            CpuCount::ONE,
            vec![backend(BackendKind::Memfd, true, false)],
        );
        let spec = spec.unwrap();
        for path in [String::new(), "x".repeat(200)] {
            let error = spec.with_device(device(&path)).unwrap_err().to_string();
            assert!(error.contains("bytes long"), "{error}");
        }
    }
}
