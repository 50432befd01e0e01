#![forbid(unsafe_code)]
//! Whether this process may have as many clones as it is asked for, found out before the first.

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

/// Descriptors that the supervisor holds for each clone at most: its control socket, its pidfd, its
/// console, and one more while it is being started.
const DESCRIPTORS_PER_CLONE: u64 = 4;
/// Descriptors that the supervisor holds for itself, with a reserve for the metrics' clients.
const DESCRIPTORS_OF_OWN: u64 = 64;

/// Why clones are not even begun.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum AdmitError {
    /// Too few descriptors for all of them.
    #[error(
        "{clones} clones need {DESCRIPTORS_PER_CLONE} x {clones} + {DESCRIPTORS_OF_OWN} = {needed} open \
         files and this process may have {limit}: ask for at most {possible} clones, or raise the limit \
         (ulimit -Hn {needed}, or LimitNOFILE={needed} in the service)"
    )]
    Descriptors {
        /// How many were asked for.
        clones: u64,
        /// How many descriptors they need.
        needed: u64,
        /// How many this process may have.
        limit: u64,
        /// How many clones that is enough for.
        possible: u64,
    },
}

/// Checks that `clones` clones can be supervised from this process. The soft limit counts: raise it
/// before.
pub fn admit(clones: u64) -> Result<(), AdmitError> {
    admit_within(clones, getrlimit(Resource::Nofile).current)
}

fn admit_within(clones: u64, limit: Option<u64>) -> Result<(), AdmitError> {
    let needed = clones
        .saturating_mul(DESCRIPTORS_PER_CLONE)
        .saturating_add(DESCRIPTORS_OF_OWN);
    match limit {
        Some(limit) if limit < needed => Err(AdmitError::Descriptors {
            clones,
            needed,
            limit,
            possible: limit.saturating_sub(DESCRIPTORS_OF_OWN) / DESCRIPTORS_PER_CLONE,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_met_exactly() {
        assert_eq!(admit_within(20, Some(144)), Ok(()));
        assert_eq!(admit_within(u64::MAX, None), Ok(()));
        let error = admit_within(20, Some(143)).unwrap_err().to_string();
        assert!(error.contains("4 x 20 + 64 = 144 open files"), "{error}");
        assert!(error.contains("at most 19 clones"), "{error}");
        assert!(admit_within(u64::MAX, Some(40)).is_err());
    }
}
