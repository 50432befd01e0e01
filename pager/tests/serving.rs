//! Pages come out right, whichever way they take.

mod common;

use common::sys::memory::{read_page, read_word, write_word};
use common::{MODES, Random, Template, options};
use pando_pager::source::faulty::FaultPlan;
use pando_pager::{Budget, IoPath, PagerOptions, Verify};
use std::time::Duration;

#[test]
fn data_zero_and_holes_are_served_and_the_file_stays_as_it_was() {
    let template = Template::new(64, |page| page % 3 == 0);
    let before = std::fs::read(template.path()).unwrap();
    for mode in MODES {
        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        for page in (0..64).rev() {
            assert_eq!(
                read_page(&memory, page),
                template.expected(page),
                "page {page}"
            );
            write_word(&memory, page, page);
        }
        let counts = pager.stop().unwrap();
        assert_eq!(counts.pages_cache + counts.pages_disk, 22, "{counts:?}");
        assert_eq!(counts.pages_zero, 42);
        assert!(counts.bytes_read >= 22 * 4096);
        // A stopped pager does not take what is there away.
        assert_eq!(read_word(&memory, 5), 5);
    }
    assert_eq!(std::fs::read(template.path()).unwrap(), before);
}
