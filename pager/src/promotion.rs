#![forbid(unsafe_code)]
//! Which holes of a root are worth filling, and what makes room for them. Pure.
//!
//! A fault of a clone costs some ten microseconds, and each clone to come pays it again. Filling a
//! range costs the root the read of 2 MiB and some milliseconds, once. So a range is worth it from a
//! number of faults on that one run of a clone reaches where it really uses the range, or several
//! clones that use a few pages of it.

use crate::root_memory::RootRange;

/// Fewer faults of all clones together do not make a range worth filling.
pub(crate) const MIN_FAULTS: u64 = 64;
/// Most ranges that one look at the faults promotes; the others come with the next one.
pub(crate) const MAX_AT_ONCE: usize = 64;

/// What clones asked for of one hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HoleDemand {
    /// Which hole.
    pub(crate) range: RootRange,
    /// How long it is.
    pub(crate) pages: u64,
    /// Pages of it that clones asked their pagers for, of all clones together.
    pub(crate) faults: u64,
}

/// The holes to fill, the one with the most faults first.
pub(crate) fn worth_it(holes: &[HoleDemand]) -> Vec<RootRange> {
    let mut worth: Vec<&HoleDemand> = holes
        .iter()
        // A short last range needs fewer.
        .filter(|hole| hole.faults >= MIN_FAULTS.min(hole.pages / 8).max(1))
        .collect();
    worth.sort_by_key(|hole| (std::cmp::Reverse(hole.faults), hole.range));
    worth.truncate(MAX_AT_ONCE);
    worth.iter().map(|hole| hole.range).collect()
}

/// What to give up so that `pages` become free, out of `unknown`, the first ones first; nothing if
/// all of them would not be enough.
pub(crate) fn victims(
    pages: u64,
    unknown: impl IntoIterator<Item = (RootRange, u64)>,
) -> Vec<RootRange> {
    let mut free = 0;
    let mut given_up = Vec::new();
    for (range, count) in unknown {
        if free >= pages {
            break;
        }
        free += count;
        given_up.push(range);
    }
    if free >= pages { given_up } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(unit: u64) -> RootRange {
        RootRange { backend: 0, unit }
    }

    fn hole(unit: u64, pages: u64, faults: u64) -> HoleDemand {
        HoleDemand {
            range: range(unit),
            pages,
            faults,
        }
    }

    #[test]
    fn what_is_asked_for_most_comes_first_and_little_does_not_count() {
        let holes = [
            hole(0, 512, MIN_FAULTS - 1),
            hole(1, 512, MIN_FAULTS),
            hole(2, 512, 500),
            hole(3, 80, 10),
            hole(4, 80, 9),
        ];
        assert_eq!(worth_it(&holes), [range(2), range(1), range(3)]);
        assert_eq!(worth_it(&[]), []);
        let many: Vec<_> = (0..1000).map(|unit| hole(unit, 512, 100 + unit)).collect();
        let worth = worth_it(&many);
        assert_eq!(worth.len(), MAX_AT_ONCE);
        assert_eq!(worth[0], range(999));
    }

    #[test]
    fn no_more_is_given_up_than_is_needed_and_nothing_for_nothing() {
        let unknown = [(range(7), 512), (range(5), 512), (range(3), 512)];
        assert_eq!(victims(0, unknown), []);
        assert_eq!(victims(1, unknown), [range(7)]);
        assert_eq!(victims(513, unknown), [range(7), range(5)]);
        assert_eq!(victims(2000, unknown), []);
    }
}
