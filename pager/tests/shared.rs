//! Many clients of one pager: right bytes for all, one read for many, nobody starved.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use std::error::Error;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use common::shared::{shared_options, slow, start, until};
use common::sys::guest::Guest;
use common::{MODES, Random, Template};
use pando_pager::source::faulty::FaultPlan;
use pando_pager::{
    Budget, ClientId, ClientRegion, ClientSpec, ImageId, ImageRun, IoMode, MAX_FORGOTTEN_PAGES,
    PageCount, PageIndex, PageRange, PagerError, SharedOptions, SharedPager, SpecError,
};

fn all(_: u64) -> bool {
    true
}

fn every_third(page: u64) -> bool {
    page.is_multiple_of(3)
}

fn pages(start: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex::new(start), PageCount::new(count))
}

fn id(number: u64) -> ClientId {
    ClientId::new(number)
}

/// Pages of an image in an order of their own.
fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut random = Random(seed);
    for at in (1..order.len()).rev() {
        let other = usize::try_from(random.below(at as u64 + 1)).unwrap();
        order.swap(at, other);
    }
    order
}

#[test]
fn a_hundred_clients_at_once_get_the_right_bytes_and_share_reads() {
    const CLIENTS: u64 = 100;
    let template = Template::new(400, every_third);
    for mode in MODES {
        let (options, _) = shared_options(mode, slow(Duration::from_millis(3)));
        let (pager, _) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let guests: Vec<Guest> = (0..CLIENTS).map(|_| Guest::new(400)).collect();
        for (number, guest) in (0..).zip(&guests) {
            pager.attach(id(number), guest.spec(image)).unwrap();
        }
        assert_eq!(pager.clients(), 100);
        let common: Vec<u64> = shuffled(40, 77).iter().map(|page| page * 9).collect();
        let barrier = Barrier::new(guests.len());
        thread::scope(|scope| {
            for (number, guest) in (1..).zip(&guests) {
                let (common, barrier, template) = (&common, &barrier, &template);
                scope.spawn(move || {
                    barrier.wait();
                    for &page in common {
                        assert!(
                            guest.read_page(page) == template.expected(page),
                            "page {page}"
                        );
                    }
                    let mut random = Random(number * 7919);
                    for _ in 0..20 {
                        let page = random.below(400);
                        assert!(
                            guest.read_page(page) == template.expected(page),
                            "page {page}"
                        );
                    }
                });
            }
        });
        let counts = pager.counts();
        let installed = counts.pages_cache + counts.pages_disk;
        assert!(installed >= 100 * 40, "{counts:?}");
        assert!(
            counts.reads * 3 < installed,
            "one read for many: {counts:?}"
        );
        assert_eq!(counts.poisoned, 0, "{counts:?}");
    }
}

#[test]
fn clients_of_one_chunk_share_one_read() {
    let template = Template::new(4, all);
    for mode in MODES {
        let (options, log) = shared_options(mode, slow(Duration::from_millis(300)));
        let (pager, _) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let guests: Vec<Guest> = (0..20).map(|_| Guest::new(4)).collect();
        for (number, guest) in (0..).zip(&guests) {
            pager.attach(id(number), guest.spec(image)).unwrap();
        }
        thread::scope(|scope| {
            for (number, guest) in (0..).zip(&guests) {
                let template = &template;
                let page = number % 4;
                scope.spawn(move || assert_eq!(guest.read_page(page), template.expected(page)));
            }
        });
        // The last one wakes before it is counted.
        let installed = || pager.counts().pages_cache + pager.counts().pages_disk;
        until("all are counted", || installed() == 20);
        let reads = log.lock().unwrap().len();
        assert!(reads < 10, "{reads}");
    }
}

#[test]
fn a_client_that_floods_does_not_starve_another() {
    let template = Template::new(800, |page| page.is_multiple_of(8));
    for mode in MODES {
        let (options, log) = shared_options(mode, slow(Duration::from_millis(2)));
        let (pager, _) = start(SharedOptions {
            budget: Budget {
                read_chunks: 4,
                client_reads: 3,
                ..Budget::shared()
            },
            ..options
        });
        // Two images of the same file, so that the log tells whose read it was.
        let (noisy, quiet) = (template.image(), template.image());
        let noisy = pager.add_image(noisy, "test").unwrap();
        let quiet = pager.add_image(quiet, "test").unwrap();
        let (flooder, other) = (Guest::new(800), Guest::new(800));
        thread::scope(|scope| {
            for (guest, count) in [(&flooder, 100), (&other, 10)] {
                for number in 0..count {
                    let template = &template;
                    scope.spawn(move || {
                        let page = number * 8;
                        assert_eq!(guest.read_page(page), template.expected(page));
                    });
                }
                until("all faults raised", || guest.waiting() == count);
            }
            pager.attach(id(1), flooder.spec(noisy)).unwrap();
            pager.attach(id(2), other.spec(quiet)).unwrap();
        });
        let log = log.lock().unwrap();
        let quiet = quiet.number() as usize;
        let first = log.iter().position(|&image| image == quiet).unwrap();
        assert!(first < 60, "it had to wait for {first} reads of the other");
        let turns = log[first..].iter().take(20);
        let its = turns.filter(|&&image| image == quiet).count();
        assert!(its >= 9, "{its} of 20 turns: {log:?}");
    }
}

fn refusal(pager: &SharedPager, number: u64, spec: ClientSpec) -> String {
    let error = pager.attach(id(number), spec).unwrap_err();
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn what_cannot_be_served_is_refused_by_name_and_harms_nobody() {
    let template = Template::new(16, all);
    let (pager, told) = start(SharedOptions::default());
    let image = pager.add_image(template.image(), "test").unwrap();
    let guest = Guest::new(16);
    let at = |address, pages| ClientRegion {
        image,
        address,
        pages,
    };
    let base = guest.base();
    let spec = |regions| ClientSpec::new(guest.uffd(), regions);
    let cases = [
        (spec(vec![]), "no regions"),
        (spec(vec![at(base + 8, pages(0, 1))]), "multiple of 4096"),
        (spec(vec![at(base, pages(0, 0))]), "has no pages"),
        (spec(vec![at(base, pages(10, 7))]), "has 16 pages"),
        (
            spec(vec![at(base, pages(0, 4)), at(base + 4096, pages(8, 1))]),
            "over each other",
        ),
        (
            spec(vec![ClientRegion {
                image: ImageId::new(9),
                ..at(base, pages(0, 1))
            }]),
            "no image 9",
        ),
        (
            ClientSpec {
                shard: Some(3),
                ..spec(vec![at(base, pages(0, 1))])
            },
            "no shard 3",
        ),
        (
            ClientSpec {
                ahead: vec![ImageRun {
                    image: ImageId::new(7),
                    pages: pages(0, 1),
                }],
                ..spec(vec![at(base, pages(0, 1))])
            },
            "no image 7",
        ),
        (
            ClientSpec {
                track_writes: true,
                ..spec(vec![at(base, pages(0, 1))])
            },
            "not registered for write protection",
        ),
        (
            ClientSpec::new(
                std::fs::File::open("/dev/null").unwrap().into(),
                vec![at(base, pages(0, 1))],
            ),
            "no userfaultfd",
        ),
    ];
    for (spec, why) in cases {
        let text = refusal(&pager, 5, spec);
        assert!(
            text.contains("client 5") && text.contains(why),
            "{why}: {text}"
        );
    }
    assert_eq!(pager.clients(), 0);
    pager.attach(id(5), guest.spec(image)).unwrap();
    let again = refusal(&pager, 5, guest.spec(image));
    assert!(again.contains("in use"), "{again}");
    assert_eq!(guest.read_page(3), template.expected(3));
    let unknown = pager.forget(id(6), &[]).unwrap_err();
    assert!(
        unknown
            .source()
            .unwrap()
            .to_string()
            .contains("no such client")
    );
    pager.detach(id(6));
    pager.detach(id(5));
    assert_eq!(pager.clients(), 0);
    assert!(told.lock().unwrap().is_empty());
}

#[test]
fn the_limit_of_clients_is_said() {
    let template = Template::new(4, all);
    let (pager, _) = start(SharedOptions {
        budget: Budget {
            clients: 2,
            ..Budget::shared()
        },
        ..SharedOptions::default()
    });
    let image = pager.add_image(template.image(), "test").unwrap();
    let guests: Vec<Guest> = (0..3).map(|_| Guest::new(4)).collect();
    pager.attach(id(0), guests[0].spec(image)).unwrap();
    pager.attach(id(1), guests[1].spec(image)).unwrap();
    let full = refusal(&pager, 2, guests[2].spec(image));
    assert!(full.contains("2 clients"), "{full}");
    pager.detach(id(0));
    pager.attach(id(2), guests[2].spec(image)).unwrap();
    assert_eq!(guests[2].read_page(1), template.expected(1));
}

#[test]
fn a_forgotten_page_comes_back_as_in_the_template() {
    let template = Template::new(64, every_third);
    for mode in MODES {
        let (options, _) = shared_options(mode, FaultPlan::default());
        let (pager, _) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let guest = Guest::new(64);
        pager.attach(id(1), guest.spec(image)).unwrap();
        for round in 0..3 {
            for page in 0..64 {
                assert_eq!(
                    guest.read_page(page),
                    template.expected(page),
                    "round {round}"
                );
                guest.write_word(page, !page);
            }
            let run = |start, count| ImageRun {
                image,
                pages: pages(start, count),
            };
            pager.forget(id(1), &[run(0, 30), run(34, 30)]).unwrap();
            // Until they are discarded the pages are what they were.
            assert_eq!(guest.read_page(9)[..8], (!9_u64).to_ne_bytes());
            (0..30).chain(34..64).for_each(|page| guest.discard(page));
            for page in 30..34 {
                assert_eq!(guest.read_page(page)[..8], (!page).to_ne_bytes());
            }
            // For the next round.
            pager.forget(id(1), &[run(30, 4)]).unwrap();
            (30..34).for_each(|page| guest.discard(page));
        }
        assert_eq!(pager.counts().poisoned, 0);
    }
}

#[test]
fn a_touch_between_forgetting_and_discarding_loses_nothing() {
    let template = Template::new(64, all);
    let (pager, _) = start(SharedOptions::default());
    let image = pager.add_image(template.image(), "test").unwrap();
    let guest = Guest::new(64);
    pager.attach(id(1), guest.spec(image)).unwrap();
    (0..32).for_each(|page| _ = guest.read_page(page));
    let runs = [ImageRun {
        image,
        pages: pages(8, 16),
    }];
    pager.forget(id(1), &runs).unwrap();
    // A walk that would bring them ahead, were they taken for absent.
    (32..64).for_each(|page| _ = guest.read_page(page));
    (8..24).for_each(|page| guest.discard(page));
    for page in (8..24).rev() {
        assert_eq!(guest.read_page(page), template.expected(page));
    }
    assert_eq!(pager.counts().poisoned, 0);
}

#[test]
fn an_order_to_forget_too_much_is_refused_and_forgets_nothing() {
    let template = Template::new(64, all);
    let (pager, _) = start(SharedOptions::default());
    let image = pager.add_image(template.image(), "test").unwrap();
    let guest = Guest::new(64);
    pager.attach(id(1), guest.spec(image)).unwrap();
    assert_eq!(guest.read_page(9), template.expected(9));
    let whole = ImageRun {
        image,
        pages: pages(0, 64),
    };
    let too_many = usize::try_from(MAX_FORGOTTEN_PAGES / 64).unwrap() + 1;
    let error = pager.forget(id(1), &vec![whole; too_many]).unwrap_err();
    let PagerError::Client { reason, .. } = &error else {
        panic!("{error}");
    };
    assert!(
        matches!(reason, SpecError::TooManyForgotten { pages } if *pages > MAX_FORGOTTEN_PAGES)
    );
    pager.forget(id(1), &[whole]).unwrap();
}

#[test]
fn regions_of_several_images_and_parts_of_them_are_told_apart() {
    let (first, second) = (Template::new(40, all), Template::new(30, every_third));
    for mode in MODES {
        let (options, _) = shared_options(mode, FaultPlan::default());
        let (pager, _) = start(options);
        let images = [&first, &second].map(|t| pager.add_image(t.image(), "test").unwrap());
        let guest = Guest::new(60);
        let at = |image: usize, page: u64, part| ClientRegion {
            image: images[image],
            address: guest.base() + page * 4096,
            pages: part,
        };
        let regions = vec![
            at(1, 50, pages(20, 10)),
            at(0, 0, pages(30, 10)),
            at(0, 20, pages(5, 25)),
        ];
        let spec = ClientSpec::new(guest.uffd(), regions);
        pager.attach(id(1), spec).unwrap();
        for page in 0..10 {
            assert_eq!(guest.read_page(page), first.expected(30 + page));
            assert_eq!(guest.read_page(50 + page), second.expected(20 + page));
        }
        for page in (0..25).rev() {
            assert_eq!(guest.read_page(20 + page), first.expected(5 + page));
        }
    }
}

#[test]
fn a_thousand_clients_fit_one_shard_and_leave_nothing_behind() {
    let template = Template::new(16, all);
    let limit = rustix::process::Resource::Nofile;
    let mut rlimit = rustix::process::getrlimit(limit);
    rlimit.current = rlimit.maximum;
    rustix::process::setrlimit(limit, rlimit).unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for mode in MODES {
        let before = open();
        {
            let (pager, _) = start(SharedOptions {
                io: mode,
                ..SharedOptions::default()
            });
            let image = pager.add_image(template.image(), "test").unwrap();
            for round in 0..2 {
                let guests: Vec<Guest> = (0..1000).map(|_| Guest::new(16)).collect();
                for (number, guest) in (0..).zip(&guests) {
                    let spec = ClientSpec {
                        pidfd: Some(common::shared::pidfd_of(std::process::id())),
                        ..guest.spec(image)
                    };
                    pager.attach(id(number), spec).unwrap();
                }
                for (number, guest) in (0..).zip(&guests) {
                    let page = (number + round) % 16;
                    assert_eq!(guest.read_page(page), template.expected(page));
                }
                (0..1000).for_each(|number| pager.detach(id(number)));
                assert_eq!(pager.clients(), 0);
            }
        }
        assert_eq!(open(), before, "{mode:?}");
    }
}

#[test]
fn shards_share_the_clients() {
    let template = Template::new(64, every_third);
    let (pager, _) = start(SharedOptions {
        shards: vec![None, Some(0)],
        io: IoMode::Auto,
        ..SharedOptions::default()
    });
    let image = pager.add_image(template.image(), "test").unwrap();
    let guests: Vec<Guest> = (0..6).map(|_| Guest::new(64)).collect();
    let shards: Vec<usize> = (0..)
        .zip(&guests)
        .map(|(number, guest)| pager.attach(id(number), guest.spec(image)).unwrap().shard)
        .collect();
    assert_eq!(shards, [0, 1, 0, 1, 0, 1]);
    thread::scope(|scope| {
        for guest in &guests {
            let template = &template;
            scope.spawn(move || {
                for page in 0..64 {
                    assert_eq!(guest.read_page(page), template.expected(page));
                }
            });
        }
    });
    let asked = ClientSpec {
        shard: Some(1),
        ..guests[0].spec(image)
    };
    pager.detach(id(0));
    assert_eq!(pager.attach(id(9), asked).unwrap().shard, 1);
}
