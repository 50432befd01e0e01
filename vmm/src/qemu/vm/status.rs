#![forbid(unsafe_code)]
//! What the machine is doing, in QEMU's words, and what may follow: pure.

use serde::{Deserialize, Serialize};

/// A run state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunStatus {
    /// Made with `-S`, never run.
    Prelaunch,
    /// Waiting for a state to be loaded.
    InMigrate,
    /// vCPUs run.
    Running,
    /// Stopped by a person or a program.
    Paused,
    /// Stopped while its state is saved.
    FinishMigrate,
    /// Stopped because its state was saved.
    PostMigrate,
    /// The guest has powered off (`-no-shutdown`).
    Shutdown,
    /// The guest could not go on.
    InternalError,
}

impl RunStatus {
    /// Its name for `query-status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
        }
    }

    /// Whether there is a machine whose vCPUs can run.
    pub fn can_run(self) -> bool {
        matches!(self, Self::Prelaunch | Self::Paused | Self::PostMigrate)
    }

    /// Why a state cannot be saved now; `None` when it can.
    pub fn save_refusal(self) -> Option<&'static str> {
        match self {
            Self::Prelaunch | Self::Running | Self::Paused => None,
            Self::InMigrate => Some("Guest is waiting for an incoming migration"),
            Self::PostMigrate => {
                Some("Can't migrate the vm that was paused due to previous migration")
            }
            Self::FinishMigrate => Some("There's a migration process in progress"),
            Self::Shutdown | Self::InternalError => {
                Some("the guest has ended: there is no state to save")
            }
        }
    }

    /// What a machine is when its state was loaded: `saved` is what it was when that was saved, and
    /// `start` whether it may run by itself.
    pub fn after_load(saved: Self, start: bool) -> Self {
        match saved {
            Self::Running if start => Self::Running,
            Self::Prelaunch => Self::Prelaunch,
            _ => Self::Paused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaded_machine_is_what_it_was() {
        use RunStatus::{Paused, Prelaunch, Running};
        assert_eq!(RunStatus::after_load(Running, true), Running);
        assert_eq!(RunStatus::after_load(Running, false), Paused);
        assert_eq!(RunStatus::after_load(Paused, true), Paused);
        assert_eq!(RunStatus::after_load(Prelaunch, true), Prelaunch);
    }
}
