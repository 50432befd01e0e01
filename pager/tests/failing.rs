//! Pages that cannot be had are errors: reported, counted, never zero, never a hang.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::sys::memory::{discard_page, map_over, read_page, read_word, try_read_page};
use common::{MODES, Template, options};
use pando_pager::source::faulty::FaultPlan;
use pando_pager::{
    CloneMemory, IoMode, PageIndex, Pager, PagerOptions, PoisonMethod, PoisonReason, Serving,
};

const METHODS: [PoisonMethod; 2] = [PoisonMethod::Marker, PoisonMethod::Protect];

fn all(_: u64) -> bool {
    true
}

fn serve(
    template: &Template,
    options: PagerOptions,
    plan: FaultPlan,
    method: PoisonMethod,
) -> (Pager<Serving>, CloneMemory) {
    let (pager, memory) = template.attach(options, plan);
    (pager.with_poison_method(method).serve().unwrap(), memory)
}

/// Reads a page that cannot be had: an error, whoever listens to `Health` knows it before.
fn must_fail(pager: &Pager<Serving>, memory: &CloneMemory, page: u64) -> PoisonReason {
    let told = Arc::new(Mutex::new(Vec::new()));
    let listener = Arc::clone(&told);
    pager.health().set_on_poison(Box::new(move |page| {
        listener.lock().unwrap().push(page.clone());
    }));
    let error = try_read_page(memory, page).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].image.as_str(), told[0].page.get()), ("ram", page));
    assert_eq!(pager.health().poisoned().last(), told.first());
    // It stays so.
    try_read_page(memory, page).unwrap_err();
    told[0].reason
}

#[test]
fn a_page_whose_read_always_fails_is_poisoned_alone() {
    let template = Template::new(64, all);
    for mode in MODES {
        for method in METHODS {
            let plan = FaultPlan {
                fail_pages: [PageIndex::new(9)].into(),
                ..FaultPlan::default()
            };
            let (pager, memory) = serve(&template, options(mode), plan, method);
            assert_eq!(read_page(&memory, 4), template.expected(4));
            let reason = must_fail(&pager, &memory, 9);
            assert_eq!(reason, PoisonReason::Read { errno: libc::EIO });
            assert_eq!(pager.health().poison_method(), method);
            for page in (12..64).chain(0..8) {
                assert_eq!(read_page(&memory, page), template.expected(page));
            }
            let counts = pager.stop().unwrap();
            // Walks that reached for the page are narrowed to what was asked for.
            assert!(counts.poisoned == 1 && counts.retries >= 1, "{counts:?}");
        }
    }
}

#[test]
fn a_read_that_never_ends_is_ended_by_the_deadline() {
    let template = Template::new(64, all);
    for mode in MODES {
        let plan = FaultPlan {
            hang_pages: [PageIndex::new(20)].into(),
            ..FaultPlan::default()
        };
        let limit = Duration::from_millis(50);
        let short = PagerOptions {
            fault_deadline: limit,
            ..options(mode)
        };
        let (pager, memory) = serve(&template, short, plan, PoisonMethod::Marker);
        assert_eq!(
            must_fail(&pager, &memory, 20),
            PoisonReason::Deadline { limit }
        );
        assert_eq!(read_page(&memory, 30), template.expected(30));
        assert_eq!(pager.stop().unwrap().poisoned, 1);
    }
}

#[test]
fn a_read_that_ends_after_its_deadline_changes_nothing() {
    let template = Template::new(64, all);
    for mode in MODES {
        let plan = FaultPlan {
            delayed_per_mille: 1000,
            delay: Duration::from_millis(150),
            ..FaultPlan::default()
        };
        let limit = Duration::from_millis(30);
        let short = PagerOptions {
            fault_deadline: limit,
            ..options(mode)
        };
        let (pager, memory) = serve(&template, short, plan, PoisonMethod::Marker);
        assert_eq!(
            must_fail(&pager, &memory, 20),
            PoisonReason::Deadline { limit }
        );
        std::thread::sleep(Duration::from_millis(250));
        try_read_page(&memory, 20).unwrap_err();
        let counts = pager.stop().unwrap();
        assert_eq!(counts.pages_cache + counts.pages_disk, 0, "{counts:?}");
        assert_eq!(
            counts.bytes_read,
            4 * 4096,
            "the late read was seen: {counts:?}"
        );
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_served_gives_errors_and_no_zeros() {
    for mode in MODES {
        let template = Template::new(64, all);
        let (pager, memory) = serve(
            &template,
            options(mode),
            FaultPlan::default(),
            PoisonMethod::Marker,
        );
        assert_eq!(read_page(&memory, 60), template.expected(60));
        template.writable().set_len(30 * 4096).unwrap();
        assert_eq!(read_page(&memory, 20), template.expected(20));
        let reason = must_fail(&pager, &memory, 40);
        let expected = PoisonReason::Short {
            expected: 4 * 4096,
            actual: 0,
        };
        assert_eq!(reason, expected);
        // Half of this chunk is left; what is left of it cannot be proven.
        assert!(matches!(
            must_fail(&pager, &memory, 29),
            PoisonReason::Short { actual: 8192, .. }
        ));
        assert_eq!(read_page(&memory, 60), template.expected(60));
        assert_eq!(pager.stop().unwrap().poisoned, 2);
    }
}

#[test]
fn a_flipped_bit_is_seen_at_the_first_read_of_its_chunk() {
    for mode in MODES {
        let template = Template::new(64, all);
        let image = template.image();
        let mut byte = [0];
        let file = std::fs::File::open(template.path()).unwrap();
        file.read_exact_at(&mut byte, 17 * 4096 + 5).unwrap();
        template
            .writable()
            .write_all_at(&[byte[0] ^ 0x10], 17 * 4096 + 5)
            .unwrap();
        let mut pager = Pager::new(options(mode)).unwrap();
        let memory = pager.attach(image).unwrap();
        let pager = pager.serve().unwrap();
        // The page itself, and its neighbour: the whole chunk is in doubt.
        for page in [17, 18] {
            let reason = must_fail(&pager, &memory, page);
            assert!(matches!(reason, PoisonReason::Checksum { .. }), "{reason}");
        }
        assert_eq!(read_page(&memory, 20), template.expected(20));
        let counts = pager.stop().unwrap();
        assert_eq!((counts.poisoned, counts.verify_failures), (2, 2));
    }
}

#[test]
fn a_walk_into_a_bad_chunk_keeps_the_good_ones() {
    for mode in MODES {
        let template = Template::new(64, all);
        let image = template.image();
        template.writable().write_all_at(b"?", 33 * 4096).unwrap();
        let mut pager = Pager::new(options(mode)).unwrap();
        let memory = pager.attach(image).unwrap();
        let pager = pager.serve().unwrap();
        for page in (0..64).filter(|page| !(32..36).contains(page)) {
            assert_eq!(read_page(&memory, page), template.expected(page));
        }
        must_fail(&pager, &memory, 32);
        assert!(pager.stop().unwrap().verify_failures >= 1);
    }
}

#[test]
fn a_page_that_is_discarded_behind_the_pagers_back_is_an_error_and_not_a_zero() {
    let template = Template::new(64, all);
    for mode in MODES {
        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        assert_eq!(read_page(&memory, 9), template.expected(9));
        discard_page(&memory, 9);
        assert_eq!(must_fail(&pager, &memory, 9), PoisonReason::Discarded);
        assert_eq!(pager.stop().unwrap().poisoned, 1);
    }
}

#[test]
fn discarded_pages_that_fault_in_turn_do_not_hide_each_other() {
    let template = Template::new(64, all);
    let (pager, memory) = template.serve(options(IoMode::Auto), FaultPlan::default());
    let pages = [3, 9, 40];
    for page in pages {
        assert_eq!(read_page(&memory, page), template.expected(page));
        discard_page(&memory, page);
    }
    std::thread::scope(|scope| {
        for page in pages {
            let memory = &memory;
            scope.spawn(move || try_read_page(memory, page).unwrap_err());
        }
    });
    let poisoned = pager.health().poisoned();
    let reasons: Vec<_> = poisoned.iter().map(|page| page.reason).collect();
    assert_eq!(reasons, [PoisonReason::Discarded; 3]);
    assert_eq!(pager.stop().unwrap().poisoned, 3);
}

#[test]
fn who_waits_for_a_page_that_is_mapped_over_is_woken() {
    let template = Template::new(64, all);
    for mode in MODES {
        let plan = FaultPlan {
            delayed_per_mille: 1000,
            delay: Duration::from_millis(300),
            ..FaultPlan::default()
        };
        let (pager, memory) = template.serve(options(mode), plan);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| try_read_page(&memory, 9).unwrap_err());
            while pager.counts().reads == 0 {
                std::thread::yield_now();
            }
            map_over(&memory, 9);
            let error = waiter.join().unwrap();
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
        });
        assert_eq!(read_page(&memory, 10), template.expected(10));
        let counts = pager.stop().unwrap();
        assert_eq!((counts.poisoned, counts.retries), (0, 1), "{counts:?}");
    }
}

/// Runs the test `name` again in a process of its own, which may die.
fn child(name: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env("PANDO_TEST_CHILD", name)
        .output()
        .unwrap()
}

fn is_child(name: &str) -> bool {
    std::env::var_os("PANDO_TEST_CHILD").is_some_and(|child| child == name)
}

#[test]
fn touching_a_poisoned_page_raises_sigbus_in_that_process_only() {
    let name = "touching_a_poisoned_page_raises_sigbus_in_that_process_only";
    if !is_child(name) {
        let output = child(name);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
        assert!(
            text.contains("told: page 9 of ram: cannot be read"),
            "{text}"
        );
        return;
    }
    let template = Template::new(64, all);
    let plan = FaultPlan {
        fail_pages: [PageIndex::new(9)].into(),
        ..FaultPlan::default()
    };
    let (pager, memory) = template.serve(options(IoMode::Auto), plan);
    let told = |page: &pando_pager::PoisonedPage| println!("told: {page}");
    pager.health().set_on_poison(Box::new(told));
    read_word(&memory, 4);
    read_word(&memory, 9);
    unreachable!("a poisoned page was read");
}

#[test]
fn a_pager_that_dies_leaves_neither_sleepers_nor_zeros() {
    let name = "a_pager_that_dies_leaves_neither_sleepers_nor_zeros";
    if !is_child(name) {
        let output = child(name);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
        assert!(
            text.contains("failed: panic: planned panic at read 1"),
            "{text}"
        );
        assert!(text.contains("waiter got an error"), "{text}");
        return;
    }
    let template = Template::new(64, all);
    let plan = FaultPlan {
        panic_at: Some(1),
        ..FaultPlan::default()
    };
    let (pager, memory) = template.serve(options(IoMode::Auto), plan);
    let told = |reason: &str| println!("failed: {reason}");
    pager.health().set_on_failure(Box::new(told));
    assert_eq!(read_page(&memory, 4), template.expected(4));
    let error: io::Error = try_read_page(&memory, 9).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    println!("waiter got an error");
    assert!(pager.health().failure().is_some());
    assert!(
        pager
            .stop()
            .unwrap_err()
            .to_string()
            .contains("planned panic")
    );
    read_word(&memory, 50);
    unreachable!("memory without a pager was read");
}

#[test]
fn a_stopped_pager_leaves_no_thread_descriptor_or_mapping() {
    let name = "a_stopped_pager_leaves_no_thread_descriptor_or_mapping";
    if !is_child(name) {
        let output = child(name);
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let count = |directory: &str| std::fs::read_dir(directory).unwrap().count();
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let large = 64 << 20;
        let length = |line: &str| -> Option<u64> {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some(number(end)? - number(start)?)
        };
        maps.lines()
            .filter(|line| length(line) == Some(large))
            .count()
    };
    let template = Template::new((64 << 20) / 4096, |page| page < 100);
    let round = |mode| {
        let (pager, memory) = template.serve(options(mode), FaultPlan::default());
        assert_eq!(mappings(), 1);
        for page in 0..200 {
            read_word(&memory, page);
        }
        drop(memory);
        pager.stop().unwrap();
    };
    MODES.into_iter().for_each(round);
    let before = (count("/proc/self/fd"), count("/proc/self/task"), mappings());
    MODES.into_iter().for_each(round);
    MODES.into_iter().for_each(round);
    assert_eq!(before.2, 0);
    // io_uring ends its own work, and the kernel a thread that is over, a moment later.
    common::shared::until("what was there before is all there is", || {
        before == (count("/proc/self/fd"), count("/proc/self/task"), mappings())
    });
}
