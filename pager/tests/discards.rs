//! Pages that a clone discards for good are zero from then on, never the template's, whatever else happens.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::shared::{shared_options, start};
use common::sys::memory::{read_page, read_word, write_word};
use common::{MODES, PAGE, Random, Template, content, options};
use pando_pager::source::faulty::{FaultPlan, Faulty};
use pando_pager::{
    ClientId, ClientSpec, CloneMemory, PageCount, PageIndex, PageRange, Pager, PagerOptions,
    Registration, Serving, SharedPager,
};

fn every_third(page: u64) -> bool {
    page.is_multiple_of(3)
}

fn all(_: u64) -> bool {
    true
}

fn serve(
    template: &Template,
    options: PagerOptions,
    plan: FaultPlan,
) -> (Pager<Serving>, CloneMemory) {
    let pager = Pager::new(options).unwrap();
    let mut pager = pager.with_source(|inner| Box::new(Faulty::new(inner, plan)));
    let mut memory = pager.attach(template.image()).unwrap();
    pager.allow_discards(std::iter::once(&mut memory)).unwrap();
    (pager.serve().unwrap(), memory)
}

fn pages(start: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex::new(start), PageCount::new(count))
}

#[test]
fn memory_that_may_not_be_discarded_is_as_it_was() {
    let template = Template::new(8, all);
    let (pager, memory) = template.serve(options(MODES[0]), FaultPlan::default());
    assert_eq!(read_page(&memory, 3), content(3));
    let error = memory.discard_to_zero(pages(3, 1)).unwrap_err();
    assert!(error.to_string().contains("template"), "{error}");
    assert_eq!(read_page(&memory, 3), content(3));
    pager.stop().unwrap();
}

#[test]
fn discarded_pages_are_zero_whether_they_were_there_or_not() {
    let template = Template::new(64, every_third);
    for mode in MODES {
        let (pager, memory) = serve(&template, options(mode), FaultPlan::default());
        // There, written, and never touched.
        assert_eq!(read_page(&memory, 3), template.expected(3));
        write_word(&memory, 6, 77);
        memory.discard_to_zero(pages(0, 10)).unwrap();
        for page in 0..64 {
            let expected = if page < 10 {
                [0; PAGE]
            } else {
                template.expected(page)
            };
            assert_eq!(read_page(&memory, page), expected, "page {page}");
        }
        write_word(&memory, 6, 78);
        assert_eq!(read_word(&memory, 6), 78);
        memory.discard_to_zero(pages(6, 1)).unwrap();
        assert_eq!(read_word(&memory, 6), 0);
        assert!(memory.discard_to_zero(pages(63, 2)).is_err());
        pager.stop().unwrap();
    }
}

#[test]
fn a_long_range_goes_whole_and_what_is_beside_it_stays() {
    let template = Template::new(1400, every_third);
    let (pager, memory) = serve(&template, options(MODES[0]), FaultPlan::default());
    for page in (0..1400).step_by(7) {
        write_word(&memory, page, page + 1);
    }
    // Three pieces, of which the last is not whole.
    memory.discard_to_zero(pages(1, 1398)).unwrap();
    for page in 1..1399 {
        assert_eq!(read_page(&memory, page), [0; PAGE], "page {page}");
    }
    assert_eq!(read_word(&memory, 0), 1);
    assert_eq!(read_page(&memory, 1399), template.expected(1399));
    pager.stop().unwrap();
}

#[test]
fn a_page_is_never_the_templates_again_under_faults_of_others() {
    const PAGES: u64 = 96;
    let template = Template::new(PAGES, all);
    for mode in MODES {
        let plan = FaultPlan {
            seed: 7,
            delayed_per_mille: 300,
            delay: Duration::from_micros(300),
            ..FaultPlan::default()
        };
        let (pager, memory) = serve(&template, options(mode), plan);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for number in 1..=3 {
                let (memory, is_over) = (&memory, &is_over);
                scope.spawn(move || {
                    let mut random = Random(number * 104_729);
                    while !is_over.load(Ordering::Relaxed) {
                        read_word(memory, random.below(PAGES));
                    }
                });
            }
            // This thread alone writes and discards: it knows what each page holds.
            let mut model: Vec<Option<u64>> = vec![None; usize::try_from(PAGES).unwrap()];
            let mut random = Random(4_242);
            for round in 1..=1000_u64 {
                let start = random.below(PAGES);
                let count = 1 + random.below(8.min(PAGES - start));
                let range = start..start + count;
                if random.below(3) == 0 {
                    for page in range.clone() {
                        write_word(&memory, page, round);
                        model[usize::try_from(page).unwrap()] = Some(round);
                    }
                } else {
                    memory.discard_to_zero(pages(start, count)).unwrap();
                    for page in range.clone() {
                        model[usize::try_from(page).unwrap()] = Some(0);
                    }
                }
                for page in range {
                    let expected = model[usize::try_from(page).unwrap()].unwrap();
                    assert_eq!(
                        read_word(&memory, page),
                        expected,
                        "page {page} in round {round}"
                    );
                }
            }
            for (page, expected) in (0..).zip(&model) {
                match expected {
                    Some(0) => assert_eq!(read_page(&memory, page), [0; PAGE], "page {page}"),
                    Some(word) => assert_eq!(read_word(&memory, page), *word, "page {page}"),
                    None => assert_eq!(read_page(&memory, page), content(page), "page {page}"),
                }
            }
            is_over.store(true, Ordering::Relaxed);
        });
        let counts = pager.stop().unwrap();
        assert_eq!(counts.poisoned, 0, "{counts:?}");
    }
}

/// Has a pager of its own kind serve what is registered, as if nobody had before.
fn attach(pager: &SharedPager, template: &Template, registration: &Registration) {
    pager.add_image(template.image(), "test").unwrap();
    let uffd = registration.as_fd().try_clone_to_owned().unwrap();
    let map = registration.discard_map().unwrap();
    let spec = ClientSpec {
        wake: true,
        discards: Some(map.try_clone_to_owned().unwrap()),
        ..ClientSpec::new(uffd, registration.regions().to_vec())
    };
    pager.attach(ClientId::new(1), spec).unwrap();
}

#[test]
fn what_was_discarded_stays_so_when_another_pager_takes_over() {
    let template = Template::new(64, all);
    for mode in MODES {
        let mut registration = Registration::new().unwrap();
        let mut memory = registration.map(&template.image()).unwrap();
        registration
            .allow_discards(std::iter::once(&mut memory))
            .unwrap();
        let (first, _) = start(shared_options(mode, FaultPlan::default()).0);
        attach(&first, &template, &registration);
        assert_eq!(read_page(&memory, 5), content(5));
        memory.discard_to_zero(pages(4, 4)).unwrap();
        drop(first);
        // Nobody serves: what is discarded now is remembered all the same.
        memory.discard_to_zero(pages(20, 4)).unwrap();
        let (second, _) = start(shared_options(mode, FaultPlan::default()).0);
        attach(&second, &template, &registration);
        for page in (0..64).rev() {
            let is_zero = (4..8).contains(&page) || (20..24).contains(&page);
            let expected = if is_zero { [0; PAGE] } else { content(page) };
            assert_eq!(read_page(&memory, page), expected, "page {page}");
        }
    }
}

#[test]
fn a_map_of_another_size_is_refused_and_nothing_is_served() {
    let template = Template::new(64, all);
    let other = Template::new(65, all);
    let mut registration = Registration::new().unwrap();
    let mut memory = registration.map(&template.image()).unwrap();
    registration
        .allow_discards(std::iter::once(&mut memory))
        .unwrap();
    let (pager, _) = start(shared_options(MODES[0], FaultPlan::default()).0);
    pager.add_image(template.image(), "test").unwrap();
    pager.add_image(other.image(), "test").unwrap();
    let spec = ClientSpec {
        discards: Some(
            registration
                .discard_map()
                .unwrap()
                .try_clone_to_owned()
                .unwrap(),
        ),
        ..ClientSpec::new(
            registration.as_fd().try_clone_to_owned().unwrap(),
            registration.regions().to_vec(),
        )
    };
    let error = pager.attach(ClientId::new(1), spec).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("map of discarded pages"), "{source}");
}
