#![forbid(unsafe_code)]

use super::*;
use crate::image::FrameError;
use crate::image::frame::Frame;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

const FRAME: Frame = Frame {
    magic: *b"PANDOWS\0",
    version: 1,
};

/// The bytes of two small runs, as they must stay for ever: files out there have them.
const GOLDEN: &[u8] = include_bytes!("golden.working-set");

fn golden() -> WorkingSet {
    let index = two_backends();
    let first = trace(&[(0, 2, false), (0, 1, true), (1, 7, true)]);
    let mut second = trace(&[(0, 1, false), (0, 1800, false), (0, 2, true)]);
    second.is_complete = false;
    let mut set = WorkingSet::new(0x0123_4567_89ab_cdef, &index);
    for trace in [first, second] {
        set.merge(&trace, &index, &MergeRules::default());
    }
    set
}

/// The same by hand, after the table of the documentation.
fn by_hand() -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(0x0123_4567_89ab_cdef_u64.to_le_bytes());
    body.extend([2_u64, 1].iter().flat_map(|n| n.to_le_bytes()));
    body.extend([122_880_u32, 2].iter().flat_map(|n| n.to_le_bytes()));
    let page = |body: &mut Vec<u8>, page: u64, numbers: [u32; 3]| {
        body.extend(page.to_le_bytes());
        body.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    };
    body.extend(b"\x04\0ram0");
    body.extend([2000_u64, 3].iter().flat_map(|n| n.to_le_bytes()));
    page(&mut body, 1, [122_880, 57_344, 12]);
    page(&mut body, 2, [122_880, 65_536, 8]);
    page(&mut body, 1800, [65_536, 0, 16]);
    body.extend(b"\x04\0ram1");
    body.extend([200_u64, 1].iter().flat_map(|n| n.to_le_bytes()));
    page(&mut body, 7, [57_344, 57_344, 32]);
    let mut bytes = b"PANDOWS\0\x01\0\0\0\x20\0\0\0".to_vec();
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(xxh3_64(&body).to_le_bytes());
    bytes.extend(body);
    bytes
}

#[test]
fn the_bytes_are_those_of_the_golden_file() {
    assert_eq!(golden().encode(), by_hand());
    assert_eq!(GOLDEN, by_hand());
    assert_eq!(WorkingSet::decode(GOLDEN).unwrap(), golden());
}

#[test]
fn a_set_knows_its_template() {
    let set = golden();
    assert!(set.is_of(0x0123_4567_89ab_cdef, &two_backends()));
    assert!(!set.is_of(7, &two_backends()));
    assert!(!set.is_of(0x0123_4567_89ab_cdef, &only_data(2000)));
}

#[test]
fn the_longest_file_is_as_long_as_it_says() {
    let empty = WorkingSet::new(0, &Index::new(Vec::new())).encode().len();
    let backend = golden().encode().len() - empty - 4 * 20;
    assert_eq!((empty, backend), (64, 2 * (2 + 4 + 8 + 8)));
    let most = empty + 64 * (2 + 255 + 8 + 8) + MAX_PAGES * 20;
    assert_eq!(WorkingSet::MAX_FILE_BYTES, most);
}

#[test]
fn what_no_runs_give_is_refused_with_its_place() {
    let good = FRAME.body(GOLDEN).unwrap().to_vec();
    let reason = |at: usize, bytes: &[u8]| {
        let mut body = good.clone();
        body[at..at + bytes.len()].copy_from_slice(bytes);
        let error = WorkingSet::decode(&FRAME.encode(&body)).unwrap_err();
        error.to_string()
    };
    let first_page = 32 + 2 + 4 + 8 + 8;
    for (at, bytes, expected) in [
        (16, &[3_u8][..], "more runs were cut than there were"),
        (24, &[0xff; 4], "weight of all runs beyond its limit"),
        (28, &[3], "name of a backend"),
        (28, &[1], "bytes behind the last backend"),
        (34, &[0xff], "not utf-8"),
        (38, &[0; 8], "behind the end of its image"),
        (46, &[0xff; 8], "more pages than a working set has"),
        (46, &[50], "fewer pages than it promises"),
        (first_page, &[2], "not in ascending order"),
        (first_page + 8, &[0; 4], "hits that no runs give"),
        (first_page + 8, &[0xff; 3], "hits that no runs give"),
        (first_page + 12, &[0xff; 3], "hits that no runs give"),
        (first_page + 3 * 20 + 5, b"0", "two backends of one name"),
    ] {
        let found = reason(at, bytes);
        assert!(found.contains(expected), "{at}: {found}");
        assert!(found.contains("of its body"), "{found}");
    }
    let newer = Frame {
        version: 2,
        ..FRAME
    };
    let error = WorkingSet::decode(&newer.encode(&good)).unwrap_err();
    let (found, supported) = (2, 1);
    assert_eq!(
        error,
        WorkingSetError::Frame(FrameError::NewerVersion { found, supported })
    );
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(WorkingSet::decode(&bytes).is_err());
        // A right header in front of nonsense: refused or harmless, never a panic.
        let framed = FRAME.encode(&bytes);
        if let Ok(set) = WorkingSet::decode(&framed) {
            prop_assert_eq!(set.encode(), framed);
        }
    }

    #[test]
    fn a_body_with_any_bytes_changed_is_refused_or_harmless(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut body = FRAME.body(GOLDEN).unwrap().to_vec();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        let framed = FRAME.encode(&body);
        if let Ok(mut set) = WorkingSet::decode(&framed) {
            prop_assert_eq!(set.encode(), framed);
            // What was believed can be used.
            set.merge(&reads([0, 5, 1900]), &two_backends(), &MergeRules::default());
            let rules = PlanRules {
                share_pages: 100,
                private_pages: 100,
                zero_pages: 100,
                whole_ranges: true,
            };
            Plan::new(&set, &two_backends(), &rules);
        }
        body.truncate(cut.index(body.len()));
        prop_assert!(WorkingSet::decode(&FRAME.encode(&body)).is_err());
    }

    #[test]
    fn any_cut_or_flipped_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0..8) {
        let mut bytes = GOLDEN.to_vec();
        let at = at.index(bytes.len());
        prop_assert!(WorkingSet::decode(&bytes[..at]).is_err());
        bytes[at] ^= 1_u8 << bit;
        prop_assert!(WorkingSet::decode(&bytes).is_err());
    }
}
