#![forbid(unsafe_code)]
//! Memory backends on their way to those that use them: each has one user.

use std::collections::HashSet;

use super::backend::BackendSpec;
use super::error::{DimmFault, SpecError};
use super::mem::MemFault;
use super::parts::DimmParts;

pub(super) fn refuse_twice(backends: &[BackendSpec]) -> Result<(), SpecError> {
    let mut seen = HashSet::new();
    match backends.iter().find(|backend| !seen.insert(backend.id())) {
        Some(twice) => Err(SpecError::DuplicateId {
            id: twice.id().to_owned(),
        }),
        None => Ok(()),
    }
}

/// Backends that wait for a user.
pub(super) struct Pool {
    backends: Vec<(BackendSpec, bool)>,
}

impl Pool {
    pub(super) fn new(backends: Vec<BackendSpec>) -> Result<Self, SpecError> {
        refuse_twice(&backends)?;
        let backends = backends.into_iter().map(|backend| (backend, false));
        Ok(Self {
            backends: backends.collect(),
        })
    }

    pub(super) fn take(
        &mut self,
        id: &str,
        user: impl Fn() -> String,
    ) -> Result<BackendSpec, SpecError> {
        let id = id.to_owned();
        let found = self.backends.iter_mut().find(|(b, _)| b.id() == id);
        match found {
            None => Err(SpecError::UnknownBackend { id, user: user() }),
            Some((_, true)) => Err(SpecError::BusyBackend { id, user: user() }),
            Some((backend, used)) => {
                *used = true;
                Ok(backend.clone())
            }
        }
    }

    pub(super) fn take_for(&mut self, dimm: &DimmParts) -> Result<BackendSpec, SpecError> {
        let taken = self.take(&dimm.backend, || format!("dimm {:?}", dimm.id));
        taken.map_err(|error| match error {
            SpecError::UnknownBackend { id: backend, .. } => SpecError::Dimm {
                id: dimm.id.clone(),
                reason: DimmFault::NoBackend { backend },
            },
            other => other,
        })
    }

    pub(super) fn take_for_memory(
        &mut self,
        device: &str,
        id: &str,
    ) -> Result<BackendSpec, SpecError> {
        self.take(id, String::new).map_err(|error| {
            let backend = id.to_owned();
            let fault = match error {
                SpecError::BusyBackend { .. } => MemFault::Busy { backend },
                _ => MemFault::NoBackend { backend },
            };
            SpecError::of_memory(device, fault)
        })
    }

    pub(super) fn refuse_rest(&self) -> Result<(), SpecError> {
        match self.backends.iter().find(|(_, used)| !used) {
            Some((backend, _)) => Err(SpecError::UnusedBackend {
                id: backend.id().to_owned(),
            }),
            None => Ok(()),
        }
    }
}
