#![forbid(unsafe_code)]
//! Which descriptor of which clone is ready, in the 64 bits that epoll keeps with each.

/// Not of a clone: a signal came.
pub(super) const SIGNAL: u64 = u64::MAX;

/// Not of a clone: the root process has something to say.
pub(super) const ROOT: u64 = u64::MAX - 1;

/// Not of a clone: the pager process has something to say.
pub(super) const PAGER: u64 = u64::MAX - 2;

/// Which descriptor of a clone has something to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Control,
    Process,
    Console,
    /// Of a fork that is no clone yet; numbers of shells are their own.
    Shell,
}

/// What the kernel keeps for a descriptor of a clone.
pub(super) fn token(clone: usize, kind: Kind) -> u64 {
    (clone as u64) << 2 | kind as u64
}

/// Which descriptor of which clone a token is for.
pub(super) fn parse_token(token: u64) -> Option<(usize, Kind)> {
    let kind = [Kind::Control, Kind::Process, Kind::Console, Kind::Shell]
        .into_iter()
        .find(|kind| *kind as u64 == token & 3)?;
    Some((usize::try_from(token >> 2).ok()?, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_there_and_back() {
        for clone in [0, 1, 77, 1 << 40] {
            for kind in [Kind::Control, Kind::Process, Kind::Console, Kind::Shell] {
                assert_eq!(parse_token(token(clone, kind)), Some((clone, kind)));
            }
        }
        assert!(![SIGNAL, ROOT, PAGER].contains(&token(1 << 40, Kind::Shell)));
    }
}
