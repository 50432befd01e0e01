#![forbid(unsafe_code)]
//! Which context ID each clone has, and where the host reaches it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::supervise::Supervisor;
use crate::device::socket::SocketError;
use crate::device::virtio::vsock::backend::{HostSide, VsockConnection};
use crate::spec::{LAST_CID, MachineSpec};

/// The vsock devices of all clones of a set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VsockPlan {
    /// The context ID of clone 0, from which the others count; `None` for the template's.
    pub first_cid: Option<u32>,
    /// Where their sockets are; without it they reach nobody.
    pub dir: Option<PathBuf>,
}

impl VsockPlan {
    /// What a clone is told.
    pub fn orders(&self, clone: u64) -> VsockOrders {
        let socket = self.dir.as_ref().map(|dir| socket_path(dir, clone));
        VsockOrders {
            first_cid: self.first_cid,
            socket: socket.map(SocketPath),
        }
    }
}

impl Supervisor {
    /// Says where the vsock devices of clones are reached. Before the first is started.
    pub fn use_vsock(&mut self, plan: VsockPlan) {
        self.vsock = plan;
    }
}

/// What one clone is told of its vsock device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VsockOrders {
    first_cid: Option<u32>,
    socket: Option<SocketPath>,
}

/// A path of any bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct SocketPath(#[serde(with = "super::control::path_bytes")] PathBuf);

/// Why a clone's vsock device cannot be connected.
#[derive(Debug, Error)]
pub enum VsockError {
    /// There are not as many context IDs.
    #[error(
        "there is no context id for clone {clone} when clone 0 has {first}: the last is {LAST_CID}; give \
         --vsock-cid a smaller one"
    )]
    NoCid {
        /// The clone's number.
        clone: u64,
        /// The first ID.
        first: u32,
    },
    /// There is no device.
    #[error(
        "the template has no virtio-vsock: make it with --vsock CID, or leave --vsock and --vsock-cid out"
    )]
    NoDevice,
    /// Its socket cannot be made.
    #[error("cannot make the socket of the clone's vsock")]
    Socket(#[from] SocketError),
}

impl VsockOrders {
    /// The context ID of a clone; `None` where the machine has none.
    pub(super) fn cid(&self, clone: u64, spec: &MachineSpec) -> Result<Option<u32>, VsockError> {
        let of_template = template_cid(spec);
        let first = of_template.map(|of_template| self.first_cid.unwrap_or(of_template));
        first.map(|first| cid_of(first, clone)).transpose()
    }

    /// Connects the vsock device of a clone; `None` where the machine has none.
    pub(super) fn connect(
        &self,
        clone: u64,
        spec: &MachineSpec,
    ) -> Result<Option<VsockConnection>, VsockError> {
        let Some(cid) = self.cid(clone, spec)? else {
            return Ok(None);
        };
        let cid = Some(cid);
        let path = self.socket.as_ref().map(|socket| &*socket.0);
        let host = path.map(HostSide::listen).transpose()?;
        Ok(Some(VsockConnection { cid, host }))
    }
}

/// Refuses a plan that cannot be for so many clones of a machine.
pub fn check(plan: &VsockPlan, clones: u32, spec: &MachineSpec) -> Result<(), VsockError> {
    let Some(of_template) = template_cid(spec) else {
        return if *plan == VsockPlan::default() {
            Ok(())
        } else {
            Err(VsockError::NoDevice)
        };
    };
    let first = plan.first_cid.unwrap_or(of_template);
    let last = u64::from(clones.saturating_sub(1));
    cid_of(first, last).map(|_| ())
}

fn template_cid(spec: &MachineSpec) -> Option<u32> {
    let mut devices = spec.devices().iter();
    devices.find_map(|device| Some(device.vsock()?.cid))
}

fn cid_of(first: u32, clone: u64) -> Result<u32, VsockError> {
    let number = u32::try_from(clone).ok();
    let cid = number.and_then(|number| first.checked_add(number));
    cid.filter(|&cid| cid <= LAST_CID)
        .ok_or(VsockError::NoCid { clone, first })
}

/// Where the socket of a clone is, as [`VsockPlan`] has it.
fn socket_path(dir: &Path, clone: u64) -> PathBuf {
    dir.join(format!("clone-{clone}.vsock"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackendSpec, CpuCount, DeviceKind, DeviceParts, FIRST_CID, VsockParts};

    fn spec(cid: Option<u32>) -> MachineSpec {
        let ram = BackendSpec::new("ram0", 64 << 20).unwrap();
        let vsock = cid.map(|cid| DeviceParts {
            id: None,
            slot: None,
            kind: DeviceKind::Vsock(VsockParts { cid, path: None }),
        });
        let spec = MachineSpec::new(CpuCount::ONE, vec![ram]).unwrap();
        spec.with_devices(vsock.into_iter().collect()).unwrap()
    }

    #[test]
    fn each_clone_has_a_context_id_and_a_socket_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let plan = VsockPlan {
            first_cid: None,
            dir: Some(dir.path().to_owned()),
        };
        let connect = |plan: &VsockPlan, clone| {
            let orders = plan.orders(clone);
            let bytes = postcard::to_stdvec(&orders).unwrap();
            assert_eq!(postcard::from_bytes::<VsockOrders>(&bytes).unwrap(), orders);
            orders.connect(clone, &spec(Some(7))).unwrap().unwrap()
        };
        let (zero, two) = (connect(&plan, 0), connect(&plan, 2));
        assert_eq!((zero.cid, two.cid), (Some(7), Some(9)));
        assert!(zero.host.is_some() && socket_path(dir.path(), 2).exists());
        drop(two);
        assert!(!socket_path(dir.path(), 2).exists());
        let given = VsockPlan {
            first_cid: Some(100),
            dir: None,
        };
        let four = connect(&given, 4);
        assert_eq!((four.cid, four.host.is_some()), (Some(104), false));
        assert!(given.orders(0).connect(0, &spec(None)).unwrap().is_none());
    }

    #[test]
    fn a_plan_that_cannot_be_is_refused_before_anything_starts() {
        let refused = |first_cid, clones, spec: &MachineSpec| {
            let plan = VsockPlan {
                first_cid,
                dir: None,
            };
            check(&plan, clones, spec).map_err(|error| error.to_string())
        };
        assert_eq!(refused(None, 9, &spec(None)), Ok(()));
        let error = refused(Some(FIRST_CID), 1, &spec(None)).unwrap_err();
        assert!(error.contains("has no virtio-vsock"), "{error}");
        assert_eq!(refused(Some(LAST_CID), 1, &spec(Some(3))), Ok(()));
        let error = refused(Some(LAST_CID), 2, &spec(Some(3))).unwrap_err();
        assert!(error.contains("no context id for clone 1"), "{error}");
    }
}
