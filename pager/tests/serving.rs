//! Pages come out right, whichever way they take.

mod common;

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use common::sys::memory::{read_page, read_word, split_mapping, write_word};
use common::{MODES, PAGE, Random, Template, options};
use pando_pager::source::faulty::{FaultPlan, Faulty};
use pando_pager::{Budget, Pager, PagerOptions, Verify};

fn every_third(page: u64) -> bool {
    page.is_multiple_of(3)
}

fn all(_: u64) -> bool {
    true
}

#[test]
fn data_zero_and_holes_are_served_and_the_file_stays_as_it_was() {
    let template = Template::new(64, every_third);
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

/// Every 64th page has data: 4096 distinct ones in a GiB.
fn sparse(page: u64) -> bool {
    page.is_multiple_of(64)
}

#[test]
fn a_gibibyte_under_32_threads_with_slow_and_failing_reads_is_right_to_the_byte() {
    const PAGES: u64 = 1 << 18;
    let template = Template::new(PAGES, sparse);
    for mode in MODES {
        let plan = FaultPlan {
            seed: 20_260,
            delayed_per_mille: 50,
            delay: Duration::from_millis(2),
            fail_once_per_10_000: 10,
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(options(mode), plan);
        thread::scope(|scope| {
            for number in 1..=32 {
                let (memory, template) = (&memory, &template);
                scope.spawn(move || {
                    let mut random = Random(number * 7919);
                    for step in 0..400 {
                        let mut page = random.below(PAGES);
                        // Every other one has data; 200 * 32 draws of 4096: many by several threads.
                        if step % 2 == 0 {
                            page -= page % 64;
                        }
                        let seen = read_page(memory, page);
                        assert!(seen == template.expected(page), "page {page} is wrong");
                    }
                });
            }
        });
        let counts = pager.stop().unwrap();
        assert_eq!(counts.poisoned, 0, "{counts:?}");
        assert!(counts.retries > 0, "{counts:?}");
        assert!(counts.pages_cache + counts.pages_disk > 2500, "{counts:?}");
        assert!(counts.pages_zero > 5000, "{counts:?}");
    }
}

#[test]
fn many_threads_on_one_page_share_one_read() {
    let template = Template::new(8, all);
    for mode in MODES {
        let plan = FaultPlan {
            delayed_per_mille: 1000,
            delay: Duration::from_millis(20),
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(options(mode), plan);
        let barrier = Barrier::new(32);
        thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| {
                    barrier.wait();
                    assert_eq!(read_page(&memory, 5), template.expected(5));
                });
            }
        });
        let counts = pager.stop().unwrap();
        assert_eq!((counts.reads, counts.poisoned), (1, 0), "{counts:?}");
        assert_eq!(counts.faults_data, 1, "{counts:?}");
    }
}

#[test]
fn neighbours_in_one_chunk_coalesce_on_one_read() {
    let template = Template::new(4, all);
    for mode in MODES {
        let plan = FaultPlan {
            delayed_per_mille: 1000,
            delay: Duration::from_millis(20),
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(options(mode), plan);
        thread::scope(|scope| {
            for page in 0..4 {
                let (memory, template) = (&memory, &template);
                scope.spawn(move || assert_eq!(read_page(memory, page), template.expected(page)));
            }
        });
        let counts = pager.stop().unwrap();
        assert!(counts.reads < 4, "{counts:?}");
        assert_eq!(counts.pages_cache + counts.pages_disk, 4, "{counts:?}");
    }
}

#[test]
fn a_walk_is_answered_in_windows_and_random_faults_page_by_page() {
    let template = Template::new(1024, |page| page < 512);
    for mode in MODES {
        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        for page in 0..1024 {
            assert_eq!(read_page(&memory, page), template.expected(page));
        }
        let counts = pager.stop().unwrap();
        assert!(counts.faults_data < 60, "{counts:?}");
        assert!(counts.faults_zero < 20, "{counts:?}");
        let ahead = 1024 - counts.faults_data - counts.faults_zero;
        let judged = counts.prefetch_useful + counts.prefetch_wasted + counts.prefetch_late;
        assert_eq!(judged, ahead, "{counts:?}");
        assert!(counts.prefetch_useful > 800, "{counts:?}");

        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        for page in (0..1024).step_by(7) {
            assert_eq!(read_word(&memory, page) != 0, page < 512);
        }
        let counts = pager.stop().unwrap();
        let installed = counts.pages_cache + counts.pages_disk + counts.pages_zero;
        assert_eq!(installed, 147, "{counts:?}");
    }
}

#[test]
fn memory_that_others_split_into_several_mappings_is_served_across_their_borders() {
    let template = Template::new(128, |page| page < 64);
    for mode in MODES {
        for write in [false, true] {
            let (pager, memory) = template.serve(options(mode), FaultPlan::default());
            for first in [21, 50, 70, 101] {
                split_mapping(&memory, first, 7);
            }
            for page in (0..100).chain((100..128).rev()) {
                if write {
                    write_word(&memory, page, page);
                    assert_eq!(read_word(&memory, page), page);
                } else {
                    assert_eq!(read_page(&memory, page), template.expected(page));
                }
            }
            let counts = pager.stop().unwrap();
            assert!(counts.poisoned == 0 && counts.retries >= 4, "{counts:?}");
            assert!(counts.faults < 100, "walks have windows: {counts:?}");
        }
    }
}

#[test]
fn zero_pages_can_be_written_first() {
    let template = Template::new(512, |page| page.is_multiple_of(100));
    for mode in MODES {
        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        for page in (0..256).chain((256..512).rev()) {
            write_word(&memory, page, page + 1);
        }
        for page in 0..512 {
            let mut expected = template.expected(page);
            expected[..8].copy_from_slice(&(page + 1).to_le_bytes());
            assert_eq!(read_page(&memory, page), expected, "page {page}");
        }
        let counts = pager.stop().unwrap();
        assert_eq!(counts.pages_zero, 506, "{counts:?}");
        assert!(counts.faults_zero < 80, "{counts:?}");
    }
}

#[test]
fn a_proven_chunk_is_not_read_whole_again() {
    let template = Template::new(4, all);
    for mode in MODES {
        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        for page in [3, 0] {
            read_word(&memory, page);
        }
        assert_eq!(pager.stop().unwrap().bytes_read, 5 * 4096);
        let unverified = PagerOptions {
            verify: Verify::Off,
            ..options(mode)
        };
        let (pager, memory) = template.serve(unverified, FaultPlan::default());
        for page in [3, 0] {
            assert_eq!(read_page(&memory, page), template.expected(page));
        }
        assert_eq!(pager.stop().unwrap().bytes_read, 2 * 4096);
    }
}

#[test]
fn the_smallest_budget_serves_too() {
    let template = Template::new(512, every_third);
    for mode in MODES {
        let small = PagerOptions {
            budget: Budget {
                read_chunks: 1,
                waiting_faults: 64,
                read_threads: 1,
                ..Budget::default()
            },
            ..options(mode)
        };
        let plan = FaultPlan {
            delayed_per_mille: 300,
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(small, plan);
        thread::scope(|scope| {
            for number in 0..8 {
                let (memory, template) = (&memory, &template);
                scope.spawn(move || {
                    for page in (number..512).step_by(8) {
                        assert_eq!(read_page(memory, page), template.expected(page));
                    }
                });
            }
        });
        let counts = pager.stop().unwrap();
        assert!(counts.waits_for_buffer > 0, "{counts:?}");
    }
}

#[test]
fn one_pager_serves_several_images_and_odd_sizes() {
    let first = Template::new(9, every_third);
    let second = Template::new(5, all);
    for mode in MODES {
        let mut pager = Pager::new(options(mode)).unwrap();
        let memories = [&first, &second].map(|template| {
            let memory = pager.attach(template.image()).unwrap();
            (template, memory)
        });
        let pager = pager.serve().unwrap();
        for (template, memory) in &memories {
            assert_eq!(memory.bytes(), template.pages * PAGE as u64);
            for page in 0..template.pages {
                assert_eq!(read_page(memory, page), template.expected(page));
            }
        }
        pager.stop().unwrap();
    }
}

#[test]
fn what_is_touched_before_serving_starts_is_served_then() {
    let template = Template::new(8, all);
    for mode in MODES {
        let (pager, memory) = template.attach(options(mode), FaultPlan::default());
        thread::scope(|scope| {
            let early = scope.spawn(|| read_page(&memory, 2));
            thread::sleep(Duration::from_millis(20));
            assert!(!early.is_finished());
            let pager = pager.serve().unwrap();
            assert_eq!(early.join().unwrap(), template.expected(2));
            pager.stop().unwrap();
        });
    }
}

#[test]
fn stopping_answers_the_faults_that_are_pending() {
    let template = Template::new(64, all);
    for mode in MODES {
        let plan = FaultPlan {
            delayed_per_mille: 1000,
            delay: Duration::from_millis(100),
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(options(mode), plan);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..64)
                .step_by(4)
                .map(|page| {
                    let memory = &memory;
                    (page, scope.spawn(move || read_page(memory, page)))
                })
                .collect();
            while pager.counts().faults < 16 {
                thread::sleep(Duration::from_millis(1));
            }
            let counts = pager.stop().unwrap();
            assert_eq!(counts.poisoned, 0);
            for (page, reader) in readers {
                assert_eq!(reader.join().unwrap(), template.expected(page));
            }
        });
    }
}

#[test]
fn a_transient_error_and_a_read_cut_short_once_are_forgiven() {
    let template = Template::new(8, all);
    for mode in MODES {
        let plan = FaultPlan {
            fail_calls: [0].into(),
            short_calls: [2].into(),
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(options(mode), plan);
        assert_eq!(read_page(&memory, 1), template.expected(1));
        assert_eq!(read_page(&memory, 6), template.expected(6));
        let counts = pager.stop().unwrap();
        assert_eq!((counts.retries, counts.poisoned), (2, 0), "{counts:?}");
    }
}

#[test]
fn memory_that_is_dropped_does_not_disturb_the_other_clone() {
    let template = Template::new(64, all);
    for mode in MODES {
        let mut pager = Pager::new(options(mode)).unwrap();
        let plan = FaultPlan {
            delayed_per_mille: 500,
            ..FaultPlan::default()
        };
        pager = pager.with_source(|inner| Box::new(Faulty::new(inner, plan)));
        let gone = pager.attach(template.image()).unwrap();
        let kept = pager.attach(template.image()).unwrap();
        let pager = pager.serve().unwrap();
        assert_eq!(read_page(&gone, 9), template.expected(9));
        drop(gone);
        for page in 0..64 {
            assert_eq!(read_page(&kept, page), template.expected(page));
        }
        assert_eq!(pager.health().failure(), None);
        pager.stop().unwrap();
    }
}

#[test]
fn a_recording_pager_keeps_every_first_touch_in_order_and_brings_nothing_ahead() {
    let template = Template::new(64, every_third);
    for mode in MODES {
        let record = |max_touches| PagerOptions {
            record: Some(max_touches),
            ..options(mode)
        };
        let (pager, memory) = template.serve(record(100), FaultPlan::default());
        let order: Vec<u64> = (8..40).chain((40..60).rev()).collect();
        for &page in &order {
            if page % 2 == 0 {
                write_word(&memory, page, page);
            } else {
                read_word(&memory, page);
            }
            read_word(&memory, 8);
        }
        let trace = pager.trace().unwrap();
        let touches: Vec<_> = trace
            .touches
            .iter()
            .map(|t| (t.page.get(), t.write))
            .collect();
        let expected: Vec<_> = order.iter().map(|&page| (page, page % 2 == 0)).collect();
        assert_eq!(touches, expected);
        assert!(trace.is_complete && trace.touches.iter().all(|touch| touch.image == 0));
        assert!(trace.touches.windows(2).all(|two| two[0].at <= two[1].at));
        let counts = pager.stop().unwrap();
        assert_eq!(
            counts.pages_zero + counts.pages_cache + counts.pages_disk,
            52
        );

        let (pager, memory) = template.serve(record(3), FaultPlan::default());
        for page in 0..3 {
            read_word(&memory, page);
        }
        assert!(pager.trace().unwrap().is_complete);
        read_word(&memory, 3);
        let trace = pager.trace().unwrap();
        assert_eq!((trace.touches.len(), trace.is_complete), (3, false));
        pager.stop().unwrap();
    }
    let (pager, _memory) = template.serve(options(MODES[0]), FaultPlan::default());
    assert_eq!(pager.trace(), None);
}
