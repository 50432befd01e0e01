#![forbid(unsafe_code)]

use super::*;
use crate::page::PageIndex;
use proptest::prelude::*;

fn kind() -> impl Strategy<Value = PageKind> {
    prop_oneof![
        Just(PageKind::Hole),
        Just(PageKind::Zero),
        Just(PageKind::Data)
    ]
}

/// An index of these pages whose checksums are their chunk's number plus 1000.
pub(crate) fn index_of(kinds: &[PageKind]) -> BackendIndex {
    let mut builder = Builder::default();
    for &kind in kinds {
        builder.page(kind);
    }
    for (number, chunk) in (1000..).zip(kinds.chunks(4)) {
        if chunk.contains(&PageKind::Data) {
            builder.checksum(number);
        }
    }
    builder.build().unwrap()
}

proptest! {
    #[test]
    fn every_page_and_checksum_is_found_again(kinds in prop::collection::vec(kind(), 0..300)) {
        let index = index_of(&kinds);
        for (page, &kind) in (0..).zip(&kinds) {
            prop_assert_eq!(index.kind(PageIndex::new(page)), kind);
        }
        for (number, chunk) in (0..).zip(kinds.chunks(4)) {
            let expected = chunk.contains(&PageKind::Data).then_some(number + 1000);
            prop_assert_eq!(index.checksum(ChunkIndex::new(number)), expected);
        }
        let flat: Vec<PageKind> = index
            .runs()
            .flat_map(|(run, kind)| run.iter().map(move |_| kind))
            .collect();
        prop_assert_eq!(&flat, &kinds);
        let total: u64 = [PageKind::Data, PageKind::Zero, PageKind::Hole]
            .map(|kind| index.count(kind).get())
            .iter()
            .sum();
        prop_assert_eq!(total, kinds.len() as u64);
        let whole = Index::new(vec![("ram0".into(), index.clone()), (String::new(), index)]);
        prop_assert_eq!(Index::decode(&whole.encode()).unwrap(), whole);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Index::decode(&bytes).is_err());
        let sealed = FRAME.encode(&bytes);
        // A right header in front of nonsense: refused or harmless, never a panic.
        if let Ok(index) = Index::decode(&sealed) {
            prop_assert_eq!(index.encode(), sealed);
        }
    }

    #[test]
    fn any_cut_or_flipped_bit_is_refused(
        kinds in prop::collection::vec(kind(), 1..100),
        at in any::<prop::sample::Index>(),
        bit in 0..8,
    ) {
        let bytes = Index::new(vec![("ram".into(), index_of(&kinds))]).encode();
        let at = at.index(bytes.len());
        prop_assert!(Index::decode(&bytes[..at]).is_err());
        let mut flipped = bytes;
        flipped[at] ^= 1u8 << bit;
        let error = Index::decode(&flipped).unwrap_err().to_string();
        prop_assert!(!error.is_empty());
    }
}

#[test]
fn long_runs_are_one_run() {
    let mut builder = Builder::default();
    builder.holes(1000);
    builder.page(PageKind::Data);
    builder.holes(262_144);
    builder.checksum(5);
    let index = builder.build().unwrap();
    let runs: Vec<_> = index
        .runs()
        .map(|(run, kind)| (run.start().get(), run.count().get(), kind))
        .collect();
    assert_eq!(
        runs,
        [
            (0, 1000, PageKind::Hole),
            (1000, 1, PageKind::Data),
            (1001, 262_144, PageKind::Hole)
        ]
    );
}

#[test]
fn kinds_and_checksums_that_disagree_are_refused() {
    let body = |pages: u64, sums: u64, words: &[u64]| {
        let mut body = 1u32.to_le_bytes().to_vec();
        body.extend_from_slice(&0u16.to_le_bytes());
        for number in [pages, sums].iter().chain(words) {
            body.extend_from_slice(&number.to_le_bytes());
        }
        Index::decode(&FRAME.encode(&body)).map_err(|error| error.to_string())
    };
    body(4, 1, &[2, 77]).unwrap();
    assert!(body(4, 0, &[3]).unwrap_err().contains("page kind 3"));
    assert!(body(4, 0, &[2]).unwrap_err().contains("checksums"));
    assert!(
        body(4, 0, &[1 << 8])
            .unwrap_err()
            .contains("behind the last page")
    );
    assert!(body(u64::MAX, 0, &[]).unwrap_err().contains("page kinds"));
    assert!(
        body(0, u64::MAX / 2, &[])
            .unwrap_err()
            .contains("checksums")
    );
    assert!(
        body(0, 0, &[1])
            .unwrap_err()
            .contains("behind the last backend")
    );
}
