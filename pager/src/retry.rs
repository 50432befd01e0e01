#![forbid(unsafe_code)]
//! Which failed reads are tried again, and how often. Pure.

use std::time::Duration;

use rustix::io::Errno;

use crate::health::PoisonReason;

/// Tries repeated for EINTR, EAGAIN and the like: nothing is wrong with the file.
pub(crate) const INTERRUPTED_RETRIES: u32 = 8;
/// Tries repeated for any other error: one transient error must not kill a clone.
pub(crate) const ERROR_RETRIES: u32 = 1;

/// The longest pause before a failed try is repeated.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long a fault waits after its `attempts`th failed try: 1 ms, then twice as long each time.
/// What is short now may be there in a moment, and trying at once only adds to the pressure.
pub(crate) fn pause(attempts: u32) -> Duration {
    let doublings = attempts.saturating_sub(1).min(7);
    Duration::from_millis(1 << doublings).min(LONGEST_PAUSE)
}

/// How a read failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadFailure {
    /// The kernel said so.
    Errno(Errno),
    /// Fewer bytes than asked for: the file was cut.
    Short { expected: usize, actual: usize },
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Read again, for the asked page alone; counted under this reason.
    Again(RetryReason),
    /// Poison the page.
    GiveUp(PoisonReason),
}

/// Labels of `pando_pager_retries_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryReason {
    /// EINTR, EAGAIN, ENOMEM, ENOBUFS of a read.
    ReadAgain,
    /// Any other error of a read.
    ReadError,
    /// A read that ended early.
    ShortRead,
    /// EAGAIN or a short copy of an install.
    InstallAgain,
    /// ENOMEM of an install.
    InstallNoMemory,
    /// ENOENT of an install of several pages: done page by page.
    InstallSplit,
    /// ENOENT of an install of one page: who waited was woken and looks again.
    InstallUnmapped,
}

impl RetryReason {
    pub(crate) const ALL: [Self; 7] = [
        Self::ReadAgain,
        Self::ReadError,
        Self::ShortRead,
        Self::InstallAgain,
        Self::InstallNoMemory,
        Self::InstallSplit,
        Self::InstallUnmapped,
    ];

    /// The label.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ReadAgain => "read_again",
            Self::ReadError => "read_error",
            Self::ShortRead => "short_read",
            Self::InstallAgain => "install_again",
            Self::InstallNoMemory => "install_no_memory",
            Self::InstallSplit => "install_split",
            Self::InstallUnmapped => "install_unmapped",
        }
    }
}

impl ReadFailure {
    /// The reason that trying again is counted under.
    pub(crate) fn reason(self) -> RetryReason {
        match self {
            Self::Errno(Errno::INTR | Errno::AGAIN | Errno::NOMEM | Errno::NOBUFS) => {
                RetryReason::ReadAgain
            }
            Self::Errno(_) => RetryReason::ReadError,
            Self::Short { .. } => RetryReason::ShortRead,
        }
    }
}

/// Decides after `attempts` tries that failed before this one.
pub(crate) fn decide(failure: ReadFailure, attempts: u32) -> Decision {
    let reason = failure.reason();
    let limit = match reason {
        RetryReason::ReadAgain => INTERRUPTED_RETRIES,
        _ => ERROR_RETRIES,
    };
    if attempts < limit {
        return Decision::Again(reason);
    }
    Decision::GiveUp(match failure {
        ReadFailure::Errno(errno) => PoisonReason::Read {
            errno: errno.raw_os_error(),
        },
        ReadFailure::Short { expected, actual } => PoisonReason::Short { expected, actual },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        let pauses = [1, 2, 3, 7, 8, 9, u32::MAX].map(|attempts| pause(attempts).as_millis());
        assert_eq!(pauses, [1, 2, 4, 64, 100, 100, 100]);
    }

    #[test]
    fn transient_errors_are_forgiven_and_lasting_ones_are_not() {
        let io = ReadFailure::Errno(Errno::IO);
        assert_eq!(decide(io, 0), Decision::Again(RetryReason::ReadError));
        assert_eq!(
            decide(io, 1),
            Decision::GiveUp(PoisonReason::Read { errno: libc::EIO })
        );
        let again = ReadFailure::Errno(Errno::INTR);
        assert_eq!(decide(again, 7), Decision::Again(RetryReason::ReadAgain));
        assert!(matches!(decide(again, 8), Decision::GiveUp(_)));
        let short = ReadFailure::Short {
            expected: 16384,
            actual: 0,
        };
        assert_eq!(decide(short, 0), Decision::Again(RetryReason::ShortRead));
        assert!(matches!(
            decide(short, 1),
            Decision::GiveUp(PoisonReason::Short { .. })
        ));
    }
}
