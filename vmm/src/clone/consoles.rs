#![forbid(unsafe_code)]
//! Where the host reaches the ports of each clone's consoles.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::supervise::Supervisor;
use crate::device::socket::{Socket, SocketError};
use crate::device::virtio::console::backend::{ConsoleConnection, PortEnd};
use crate::spec::{DeviceSpec, MachineSpec, PortParts};

/// The ports of all clones of a set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsolePlan {
    /// Where their sockets are; without it they lead to nobody.
    pub dir: Option<PathBuf>,
}

impl ConsolePlan {
    /// What a clone is told.
    pub fn orders(&self) -> ConsoleOrders {
        ConsoleOrders {
            dir: self.dir.clone().map(Dir),
        }
    }
}

impl Supervisor {
    /// Says where the ports of clones are reached. Before the first is started.
    pub fn use_consoles(&mut self, plan: ConsolePlan) {
        self.consoles = plan;
    }
}

/// What one clone is told of its ports.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConsoleOrders {
    dir: Option<Dir>,
}

/// A path of any bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Dir(#[serde(with = "super::control::path_bytes")] PathBuf);

/// Why a clone's ports cannot be connected.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// There is no device.
    #[error(
        "the template has no virtio-console: make it with --console unix:PATH, or leave --console out"
    )]
    NoDevice,
    /// A socket cannot be made.
    #[error("cannot make the socket of port {number} of the clone's console {id:?}")]
    Socket {
        /// Name of the device.
        id: String,
        /// The port's number.
        number: u8,
        /// Why not.
        #[source]
        source: SocketError,
    },
}

impl ConsoleOrders {
    /// Connects the ports of a clone, by the ids of its console devices. Without a place for sockets they
    /// lead to nobody, whatever the template's did.
    pub(super) fn connect(
        &self,
        clone: u64,
        spec: &MachineSpec,
    ) -> Result<Vec<(String, ConsoleConnection)>, ConsoleError> {
        let mut connections = Vec::new();
        for device in spec.devices() {
            let Some(console) = device.console() else {
                continue;
            };
            let mut connection = ConsoleConnection::default();
            for port in &console.ports {
                let Some(Dir(dir)) = &self.dir else {
                    continue;
                };
                let number = port.number.unwrap_or_default();
                let socket = Socket::listen(&socket_path(dir, clone, device, port));
                let socket = socket.map_err(|source| ConsoleError::Socket {
                    id: device.id().to_owned(),
                    number,
                    source,
                })?;
                connection.ends.push((number, PortEnd::Socket(socket)));
            }
            connections.push((device.id().to_owned(), connection));
        }
        Ok(connections)
    }
}

/// Refuses a plan that is for no device of a machine.
pub fn check(plan: &ConsolePlan, spec: &MachineSpec) -> Result<(), ConsoleError> {
    let has_console = spec
        .devices()
        .iter()
        .any(|device| device.console().is_some());
    if has_console || *plan == ConsolePlan::default() {
        Ok(())
    } else {
        Err(ConsoleError::NoDevice)
    }
}

/// Where the socket of a clone's port is: by its name, or by its device and its number.
fn socket_path(dir: &Path, clone: u64, device: &DeviceSpec, port: &PortParts) -> PathBuf {
    let number = port.number.unwrap_or_default();
    let called = (port.name.clone()).unwrap_or_else(|| format!("{}-{number}", device.id()));
    dir.join(format!("clone-{clone}.{called}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendSpec, ConsoleParts, CpuCount, DeviceKind, DeviceParts};

    fn spec(has_console: bool) -> MachineSpec {
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let named = PortParts {
            name: Some("agent".into()),
            ..PortParts::default()
        };
        let console = has_console.then(|| DeviceParts {
            id: None,
            slot: None,
            kind: DeviceKind::Console(ConsoleParts {
                ports: vec![PortParts::default(), named],
            }),
        });
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        spec.with_devices(console.into_iter().collect()).unwrap()
    }

    #[test]
    fn each_clone_has_sockets_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let plan = ConsolePlan {
            dir: Some(dir.path().to_owned()),
        };
        let orders = plan.orders();
        let bytes = postcard::to_stdvec(&orders).unwrap();
        assert_eq!(
            postcard::from_bytes::<ConsoleOrders>(&bytes).unwrap(),
            orders
        );
        let seven = orders.connect(7, &spec(true)).unwrap();
        let eight = orders.connect(8, &spec(true)).unwrap();
        assert_eq!((seven.len(), seven[0].1.ends.len()), (1, 2));
        for name in ["clone-7.agent.sock", "clone-8.console0-1.sock"] {
            assert!(dir.path().join(name).exists(), "{name}");
        }
        let again = orders.connect(7, &spec(true)).unwrap_err();
        assert!(again.to_string().contains("port 1 of"), "{again}");
        drop((seven, eight));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let nobody = ConsolePlan::default()
            .orders()
            .connect(7, &spec(true))
            .unwrap();
        assert_eq!((nobody.len(), nobody[0].1.ends.len()), (1, 0));
    }

    #[test]
    fn a_plan_without_a_device_is_refused_before_anything_starts() {
        let plan = ConsolePlan {
            dir: Some("d".into()),
        };
        check(&plan, &spec(true)).unwrap();
        check(&ConsolePlan::default(), &spec(false)).unwrap();
        let error = check(&plan, &spec(false)).unwrap_err().to_string();
        assert!(error.contains("has no virtio-console"), "{error}");
    }
}
