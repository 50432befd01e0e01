#![forbid(unsafe_code)]
use std::io::Write;

use std::os::unix::fs::FileExt;

use super::inherited::joined;
use super::*;
use crate::image::BackendIndex;

const UNITS: u64 = 6;

/// Six ranges: data in 0 (one page), 2 (all) and 5 (short, last page); zeros elsewhere.
fn image() -> (tempfile::NamedTempFile, Image) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let pages = UNITS * UNIT_PAGES - 100;
    let mut bytes = vec![0_u8; usize::try_from(pages * PAGE_BYTES).unwrap()];
    let mut put = |page: u64, value: u8| {
        let start = usize::try_from(page * PAGE_BYTES).unwrap();
        bytes[start..start + 4096].fill(value);
    };
    put(7, 1);
    (2 * UNIT_PAGES..3 * UNIT_PAGES).for_each(|page| put(page, 2));
    put(pages - 1, 3);
    file.write_all(&bytes).unwrap();
    let index = BackendIndex::scan(file.as_file(), bytes.len() as u64, &mut |_, _| ()).unwrap();
    let image = Image::open(file.path(), "ram0", index).unwrap();
    (file, image)
}

fn byte(memory: &RootMemory, page: u64) -> u8 {
    memory.mapping.touch(PageIndex::new(page)).unwrap()
}

fn fill(image: Image, budget_pages: u64, first: &[u64]) -> Root {
    let first = first.iter().map(|&unit| range(unit)).collect();
    let plan = RootPlan {
        budget_pages,
        verify: true,
        first,
    };
    Root::fill(vec![image], plan, &mut |_| ()).unwrap()
}

fn range(unit: u64) -> RootRange {
    RootRange { backend: 0, unit }
}

fn holes(root: &Root) -> Vec<u64> {
    root.memories[0].holes.iter().copied().collect()
}

#[test]
fn what_clones_need_is_filled_first_and_what_they_ask_for_later() {
    let (_file, image) = image();
    let mut root = fill(image, UNIT_PAGES, &[2]);
    assert_eq!(holes(&root), [0, 5]);
    // The one range that is there is known to be needed: nothing makes room.
    root.note_faults(&BTreeMap::from([(range(0), 1000), (range(9), 1000)]));
    while root.promote_next() {}
    assert_eq!(holes(&root), [0, 5]);
    assert_eq!(byte(&root.memories[0], 2 * UNIT_PAGES), 2);

    let (_file, image) = self::image();
    let mut root = fill(image, UNIT_PAGES, &[]);
    assert_eq!(holes(&root), [2, 5]);
    while root.collapse_next() {}
    root.note_faults(&BTreeMap::from([(range(2), 1000), (range(0), 1000)]));
    while root.promote_next() {}
    assert_eq!(holes(&root), [0, 5]);
    assert_eq!(root.filled().pages, UNIT_PAGES);
    assert_eq!(root.filled().hole_pages, 2 * UNIT_PAGES - 100);
    assert_eq!(byte(&root.memories[0], 3 * UNIT_PAGES - 1), 2);
}

#[test]
fn a_root_holds_what_has_data_and_leaves_the_rest_to_the_kernel() {
    let (_file, image) = image();
    let mut root = fill(image, u64::MAX, &[]);
    let expected = Filled {
        pages: 3 * UNIT_PAGES - 100,
        ..Filled::default()
    };
    assert_eq!(root.filled(), expected);
    while root.collapse_next() {}
    let memory = &root.memories[0];
    assert!(memory.is_complete());
    let last = UNITS * UNIT_PAGES - 101;
    let seen: Vec<u8> = [7, 8, 2 * UNIT_PAGES, 3 * UNIT_PAGES - 1, last]
        .map(|page| byte(memory, page))
        .to_vec();
    assert_eq!(seen, [1, 0, 2, 2, 3]);
}

#[test]
fn what_is_beyond_the_budget_or_damaged_is_a_hole() {
    let (file, image) = image();
    let root = fill(image, UNIT_PAGES + 5, &[]);
    // The first range fits, the second does not, nor does the last.
    assert_eq!(root.filled().pages, UNIT_PAGES);
    assert_eq!(root.filled().hole_pages, 2 * UNIT_PAGES - 100);
    assert_eq!(holes(&root), [2, 5]);
    drop(root);
    // One byte of the second range is another now.
    let index = {
        let file = std::fs::File::open(file.path()).unwrap();
        let bytes = file.metadata().unwrap().len();
        BackendIndex::scan(&file, bytes, &mut |_, _| ()).unwrap()
    };
    let offset = 2 * HUGE_BYTES + 12345;
    file.as_file().write_all_at(&[9], offset).unwrap();
    let image = Image::open(file.path(), "ram0", index).unwrap();
    let root = fill(image, u64::MAX, &[]);
    assert_eq!(root.filled().failed_ranges, 1);
    assert_eq!(root.filled().hole_pages, UNIT_PAGES);
    assert_eq!(holes(&root), [2]);
    let memory = root.into_memories().remove(0);
    memory.into_complete().unwrap_err();
}

#[test]
fn neighbours_are_one_range() {
    let range = |start, count| PageRange::new(PageIndex::new(start), PageCount::new(count));
    let all = joined(&[range(0, 2), range(2, 3), range(9, 1)]);
    assert_eq!(all, [range(0, 5), range(9, 1)]);
}
