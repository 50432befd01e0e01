#![forbid(unsafe_code)]
//! Memory backends: those of the machine, and those that a monitor added. The latter exist, with
//! their files open, and belong to no device until one comes that names them.

use super::{Vm, order};
use crate::memory::open::{OpenedFile, open};
use crate::qemu::qmp::message::QmpError;
use crate::report::one_line;
use crate::spec::{BackendSpec, MAX_BACKENDS};

/// A backend that a monitor added.
#[derive(Debug)]
pub(super) struct Added {
    pub(super) spec: BackendSpec,
    /// Open as long as the object is there.
    pub(super) file: Option<OpenedFile>,
}

impl Vm {
    /// Memory backends.
    pub(in crate::qemu) fn objects(&self) -> impl Iterator<Item = &BackendSpec> {
        let machine = self.plan.spec.backends().iter();
        machine.chain(self.added.iter().map(|added| &added.spec))
    }

    /// Memory backends in the order in which QEMU lists them.
    pub(in crate::qemu) fn listed_objects(&self) -> Vec<&BackendSpec> {
        let typed = self.plan.wanted.backend_ids();
        let place = |backend: &&BackendSpec| typed.iter().position(|id| *id == backend.id());
        let mut made: Vec<&BackendSpec> = self.objects().collect();
        made.sort_by_key(|backend| place(backend).unwrap_or(usize::MAX));
        let ids: Vec<&str> = made.iter().map(|backend| backend.id()).collect();
        let order = order::listed(&ids).into_iter();
        order.filter_map(|at| made.get(at).copied()).collect()
    }

    /// `object-add`
    pub(in crate::qemu) fn add_object(&mut self, spec: BackendSpec) -> Result<(), QmpError> {
        let id = spec.id();
        if self.objects().any(|backend| backend.id() == id) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        if self.added.len() >= MAX_BACKENDS {
            return Err(QmpError::generic(format!(
                "{MAX_BACKENDS} objects were added, the most that there can be: use object-del"
            )));
        }
        let opened = spec.file().map(|source| open(&spec, source)).transpose();
        let file = opened.map_err(|error| QmpError::generic(one_line(&error)))?;
        self.added.push(Added { spec, file });
        Ok(())
    }

    /// `object-del`
    pub(in crate::qemu) fn delete_object(&mut self, id: &str) -> Result<(), QmpError> {
        if let Some(at) = self.added.iter().position(|added| added.spec.id() == id) {
            self.added.remove(at);
            return Ok(());
        }
        let is_there = self.objects().any(|backend| backend.id() == id);
        Err(QmpError::generic(if is_there {
            format!("object '{id}' is in use, can not be deleted")
        } else {
            format!("object '{id}' not found")
        }))
    }
}
