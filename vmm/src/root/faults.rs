#![forbid(unsafe_code)]
//! What pagers report of faults in holes of a root, on its way to the supervisor: bounded, and proven
//! before it counts.

use pando_pager::working_set::HUGE_RANGE_PAGES;
use pando_pager::{ImageId, PageCount, RangeFaults as Counted};
use serde::{Deserialize, Serialize};

use super::protocol::RangeFaults;
use crate::clone::control::MAX_MESSAGE_BYTES;

/// Most ranges of one report; a pager that has more says them in several.
pub const MAX_REPORTED_RANGES: usize = 4096;
/// Most bytes that a range takes in a message: two numbers of 32 bits and one of 64.
const MAX_RANGE_BYTES: usize = 5 + 10 + 5;
const _: () = assert!(MAX_REPORTED_RANGES * MAX_RANGE_BYTES + 64 <= MAX_MESSAGE_BYTES);

/// Faults of one range since the last report; not proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawRangeFaults {
    /// Which image of the pager, from 0.
    pub image: u32,
    /// Which range of 2 MiB of it, from 0.
    pub unit: u64,
    /// How many.
    pub faults: u32,
}

/// What was counted, in as many reports as it takes; none for nothing.
pub fn reports(counted: &[Counted]) -> impl Iterator<Item = Vec<RawRangeFaults>> {
    let raw = |range: &Counted| RawRangeFaults {
        image: range.image.number(),
        unit: range.unit,
        faults: range.faults,
    };
    counted
        .chunks(MAX_REPORTED_RANGES)
        .map(move |part| part.iter().map(raw).collect())
}

/// Proves a report. `backend_of` says which backend an image is, and how many pages it has. `None` if
/// anything in it cannot be.
pub fn prove(
    report: &[RawRangeFaults],
    backend_of: impl Fn(ImageId) -> Option<(u32, PageCount)>,
) -> Option<Vec<RangeFaults>> {
    if report.len() > MAX_REPORTED_RANGES {
        return None;
    }
    let ranges = report.iter().map(|raw| {
        let (backend, pages) = backend_of(ImageId::new(raw.image))?;
        let units = pages.get().div_ceil(HUGE_RANGE_PAGES);
        (raw.unit < units).then_some(RangeFaults {
            backend,
            unit: raw.unit,
            faults: raw.faults.into(),
        })
    });
    ranges.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Image 5 is backend 0 with three ranges, image 2 is backend 1 with one.
    fn backend_of(image: ImageId) -> Option<(u32, PageCount)> {
        match image.number() {
            5 => Some((0, PageCount::new(2 * HUGE_RANGE_PAGES + 1))),
            2 => Some((1, PageCount::new(9))),
            _ => None,
        }
    }

    fn raw(image: u32, unit: u64, faults: u32) -> RawRangeFaults {
        RawRangeFaults {
            image,
            unit,
            faults,
        }
    }

    #[test]
    fn images_become_backends_and_what_does_not_exist_is_refused() {
        let proven = prove(&[raw(5, 2, 7), raw(2, 0, 1)], backend_of).unwrap();
        let of = |backend, unit, faults| RangeFaults {
            backend,
            unit,
            faults,
        };
        assert_eq!(proven, [of(0, 2, 7), of(1, 0, 1)]);
        assert_eq!(prove(&[raw(5, 0, 1), raw(5, 3, 1)], backend_of), None);
        assert_eq!(prove(&[raw(2, 1, 1)], backend_of), None);
        assert_eq!(prove(&[raw(0, 0, 1)], backend_of), None);
        let long = vec![raw(5, 0, 1); MAX_REPORTED_RANGES + 1];
        assert_eq!(prove(&long, backend_of), None);
    }

    #[test]
    fn a_report_is_as_long_as_a_message_may_be() {
        let worst = Counted {
            image: ImageId::new(u32::MAX),
            unit: u64::MAX,
            faults: u32::MAX,
        };
        assert_eq!(reports(&[]).count(), 0);
        let all: Vec<_> = reports(&vec![worst; 2 * MAX_REPORTED_RANGES + 1]).collect();
        assert_eq!(all.len(), 3);
        let bytes = postcard::to_allocvec(&all[0]).unwrap().len();
        assert!(
            bytes <= MAX_REPORTED_RANGES * MAX_RANGE_BYTES + 64,
            "{bytes}"
        );
    }

    proptest! {
        #[test]
        fn what_is_proven_exists(image in 0_u32..8, unit in prop_oneof![0_u64..5, any::<u64>()], faults: u32) {
            if let Some(proven) = prove(&[raw(image, unit, faults)], backend_of) {
                prop_assert!(proven[0].backend < 2 && unit < 3);
                prop_assert_eq!(proven[0].faults, u64::from(faults));
            }
        }
    }
}
