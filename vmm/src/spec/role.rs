#![forbid(unsafe_code)]
//! What a machine as a whole is to its files: the template that they become, or a clone of it. One
//! backend that is something else makes it neither.

use std::fmt;

use thiserror::Error;

use super::MachineSpec;
use super::backend::{BackendSource, BackendSpec, FileAccess};

/// What the memory of a machine is to its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// All that the guest writes is in the files.
    Template,
    /// All memory begins as the files and goes its own way.
    Clone,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Template => f.write_str("template"),
            Self::Clone => f.write_str("clone"),
        }
    }
}

/// A backend that keeps a machine from a role.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error("memory backend {id:?} {is}, so this machine cannot be a {role}: {remedy}")]
pub struct RoleError {
    /// The backend.
    pub id: String,
    /// The role.
    pub role: Role,
    /// What the backend is.
    pub is: &'static str,
    /// What to change.
    pub remedy: &'static str,
}

impl MachineSpec {
    /// Whether every backend fits a role; the first that does not is named.
    pub fn check_role(&self, role: Role) -> Result<(), RoleError> {
        self.backends()
            .iter()
            .try_for_each(|backend| check(backend, role))
    }
}

fn check(backend: &BackendSpec, role: Role) -> Result<(), RoleError> {
    let is = match (backend.source(), role) {
        (BackendSource::Ram { .. } | BackendSource::Memfd { .. }, _) => "has no file",
        (BackendSource::File(file), role) => match (file.access(), role) {
            (FileAccess::Template, Role::Template)
            | (FileAccess::Private | FileAccess::Clone, Role::Clone)
            // Nobody writes it, so it is the same before and after.
            | (FileAccess::Rom { .. }, _) => return Ok(()),
            (FileAccess::Template, Role::Clone) => "writes its file (share=on)",
            (FileAccess::Private | FileAccess::Clone, Role::Template) => {
                "keeps what is written for itself (share=off)"
            }
        },
    };
    Err(RoleError {
        id: backend.id().to_owned(),
        role,
        is,
        remedy: match role {
            Role::Template => "give it memory-backend-file with share=on",
            Role::Clone => "give it memory-backend-file with share=off,readonly=on,rom=off",
        },
    })
}
