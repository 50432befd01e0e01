//! How clients, pages and pagers end, when others go on.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::shared::{pidfd_of, shared_options, start, until};
use common::sys::guest::{Guest, page_map};
use common::sys::memory::{discard_page, read_page, write_word};
use common::{MODES, Template, options};
use pando_pager::source::faulty::FaultPlan;
use pando_pager::{
    ClientEvent, ClientId, ClientRegion, ClientSpec, ImageId, ImageRun, PageCount, PageIndex,
    PageRange, PagerOptions, PoisonMethod, PoisonReason, SharedOptions, SharedPager,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const PAGES: u64 = 64;

fn all(_: u64) -> bool {
    true
}

fn id(number: u64) -> ClientId {
    ClientId::new(number)
}

fn hang(page: u64) -> FaultPlan {
    FaultPlan {
        hang_pages: [PageIndex::new(page)].into(),
        ..FaultPlan::default()
    }
}

#[test]
fn faults_whose_messages_died_with_a_pager_are_served_by_the_next() {
    let template = Template::new(PAGES, all);
    for mode in MODES {
        let guest = Guest::new(PAGES);
        let (options, _) = shared_options(mode, hang(9));
        let (dead, told) = start(options);
        let image = dead.add_image(template.image(), "test").unwrap();
        dead.attach(id(1), guest.spec(image)).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| guest.read_page(9));
            until("the message is taken", || dead.counts().faults == 1);
            drop(dead);
            assert!(!reader.is_finished());
            let (options, _) = shared_options(mode, FaultPlan::default());
            let (pager, _) = start(options);
            let image = pager.add_image(template.image(), "test").unwrap();
            let spec = ClientSpec {
                wake: true,
                ..guest.spec(image)
            };
            pager.attach(id(1), spec).unwrap();
            assert_eq!(reader.join().unwrap(), template.expected(9));
            for page in (0..PAGES).rev() {
                assert_eq!(guest.read_page(page), template.expected(page));
            }
        });
        assert!(told.lock().unwrap().is_empty());
    }
}

#[test]
fn pages_that_another_pager_installed_are_no_obstacle() {
    let template = Template::new(PAGES, all);
    for mode in MODES {
        let guest = Guest::new(PAGES);
        let serve = |wake| {
            let (options, _) = shared_options(mode, FaultPlan::default());
            let (pager, _) = start(options);
            let image = pager.add_image(template.image(), "test").unwrap();
            let spec = ClientSpec {
                wake,
                ..guest.spec(image)
            };
            pager.attach(id(1), spec).unwrap();
            (pager, image)
        };
        let (first, _) = serve(false);
        (10..30).for_each(|page| guest.write_word(page, page));
        drop(first);
        let (second, image) = serve(true);
        // A walk meets what is there, and nothing of it is lost.
        for page in (0..10).chain(30..PAGES) {
            assert_eq!(guest.read_page(page), template.expected(page));
        }
        (10..30).for_each(|page| assert_eq!(guest.read_page(page)[..8], page.to_ne_bytes()));
        // It never saw these pages installed; given back, they come as in the template.
        let run = ImageRun {
            image,
            pages: PageRange::new(PageIndex::new(12), PageCount::new(4)),
        };
        second.forget(id(1), &[run]).unwrap();
        (12..16).for_each(|page| guest.discard(page));
        (12..16).for_each(|page| assert_eq!(guest.read_page(page), template.expected(page)));
        assert_eq!(second.counts().poisoned, 0);
    }
}

#[test]
fn a_page_that_cannot_be_had_is_told_before_anybody_wakes() {
    let template = Template::new(PAGES, all);
    for mode in MODES {
        let plan = FaultPlan {
            fail_pages: [PageIndex::new(9)].into(),
            ..FaultPlan::default()
        };
        let (options, _) = shared_options(mode, plan);
        let woken = Arc::new(AtomicBool::new(false));
        let told = Arc::new(Mutex::new(Vec::new()));
        let (seen, kept) = (Arc::clone(&woken), Arc::clone(&told));
        let listener = Arc::new(move |event| {
            // Whoever waits has every chance to come first, if it is woken first.
            thread::sleep(Duration::from_millis(30));
            kept.lock()
                .unwrap()
                .push((event, seen.load(Ordering::SeqCst)));
        });
        let pager = SharedPager::start(options, listener).unwrap();
        let image = pager.add_image(template.image(), "test").unwrap();
        let (guest, other) = (Guest::new(PAGES), Guest::new(PAGES));
        pager.attach(id(1), guest.spec(image)).unwrap();
        pager.attach(id(2), other.spec(image)).unwrap();
        let error = guest.try_read(9).unwrap_err();
        woken.store(true, Ordering::SeqCst);
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        let first = told.lock().unwrap().first().cloned();
        let Some((ClientEvent::Poisoned { client, page }, false)) = first else {
            panic!("{first:?}");
        };
        assert_eq!(
            (client, page.page.get(), page.image.as_str()),
            (id(1), 9, "ram")
        );
        assert_eq!(page.reason, PoisonReason::Read { errno: libc::EIO });
        // It is gone for that client, and nobody else is hurt.
        guest.try_read(9).unwrap_err();
        for page in (0..8).chain(12..PAGES) {
            assert_eq!(other.read_page(page), template.expected(page));
            assert_eq!(guest.read_page(page), template.expected(page));
        }
    }
}

#[test]
fn where_the_kernel_cannot_mark_a_page_who_waits_is_not_woken() {
    let template = Template::new(PAGES, all);
    let plan = FaultPlan {
        fail_pages: [PageIndex::new(9)].into(),
        ..FaultPlan::default()
    };
    let (options, _) = shared_options(MODES[0], plan);
    let (pager, told) = start(SharedOptions {
        poison: PoisonMethod::Protect,
        ..options
    });
    let image = pager.add_image(template.image(), "test").unwrap();
    let guest = Guest::new(PAGES);
    pager.attach(id(1), guest.spec(image)).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| guest.read_page(9));
        until("it is told", || !told.lock().unwrap().is_empty());
        assert_eq!(guest.read_page(20), template.expected(20));
        assert_eq!((guest.waiting(), reader.is_finished()), (1, false));
        // Its owner would end it now; here another pager brings the page after all.
        pager.detach(id(1));
        let (options, _) = shared_options(MODES[0], FaultPlan::default());
        let (next, _) = start(options);
        let image = next.add_image(template.image(), "test").unwrap();
        let spec = ClientSpec {
            wake: true,
            ..guest.spec(image)
        };
        next.attach(id(1), spec).unwrap();
        assert_eq!(reader.join().unwrap(), template.expected(9));
    });
}

#[test]
fn a_shard_that_dies_says_so_and_leaves_clients_asleep_for_the_next() {
    let template = Template::new(PAGES, all);
    let plan = FaultPlan {
        panic_at: Some(0),
        ..FaultPlan::default()
    };
    let (options, _) = shared_options(MODES[0], plan);
    let (pager, told) = start(options);
    let image = pager.add_image(template.image(), "test").unwrap();
    let guest = Guest::new(PAGES);
    pager.attach(id(1), guest.spec(image)).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| guest.read_page(5));
        until("it is told", || !told.lock().unwrap().is_empty());
        let event = told.lock().unwrap()[0].clone();
        assert!(
            matches!(&event, ClientEvent::ShardFailed { shard: 0, reason } if reason.contains("panic")),
            "{event:?}"
        );
        pager.attach(id(2), guest.spec(image)).unwrap_err();
        pager.detach(id(1));
        let (next, _) = start(SharedOptions::default());
        let image = next.add_image(template.image(), "test").unwrap();
        let spec = ClientSpec {
            wake: true,
            ..guest.spec(image)
        };
        next.attach(id(1), spec).unwrap();
        assert_eq!(reader.join().unwrap(), template.expected(5));
    });
}

#[test]
fn written_pages_are_told_from_clean_ones() {
    let template = Template::new(PAGES, |page| page < 32);
    for mode in MODES {
        let (options, _) = shared_options(mode, FaultPlan::default());
        let (pager, _) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let guest = Guest::tracked(PAGES);
        let spec = ClientSpec {
            track_writes: true,
            ..guest.spec(image)
        };
        pager.attach(id(1), spec).unwrap();
        for page in 0..20 {
            assert_eq!(guest.read_page(page), template.expected(page));
        }
        (0..5)
            .chain([25, 40])
            .for_each(|page| guest.write_word(page, 1));
        let protected: Vec<u64> = (0..PAGES)
            .filter(|&page| guest.is_protected(page))
            .collect();
        let clean: Vec<u64> = (5..20).collect();
        assert!(
            clean.iter().all(|page| protected.contains(page)),
            "{protected:?}"
        );
        let written = [0, 1, 2, 3, 4, 25, 40];
        assert!(
            written.iter().all(|page| !protected.contains(page)),
            "{protected:?}"
        );
        // Nothing but the first message of each page: a write is no fault of the pager's.
        assert_eq!(pager.counts().faults_stale, 0);
    }
}

#[test]
fn a_pager_of_this_process_forgets_and_tracks_too() {
    let template = Template::new(PAGES, all);
    for mode in MODES {
        let tracking = PagerOptions {
            track_writes: true,
            ..options(mode)
        };
        let (pager, memory) = template.serve(tracking, FaultPlan::default());
        assert!(pager.tracks_writes());
        for page in 0..PAGES {
            assert_eq!(read_page(&memory, page), template.expected(page));
        }
        (0..8).for_each(|page| write_word(&memory, page, 7));
        let is_clean = |page: u64| {
            let address = memory.host_address().addr() as u64 + page * 4096;
            page_map(address) >> 57 & 1 != 0
        };
        assert!((0..PAGES).all(|page| is_clean(page) == (page >= 8)));
        let run = ImageRun {
            image: ImageId::new(0),
            pages: PageRange::new(PageIndex::new(8), PageCount::new(PAGES - 8)),
        };
        pager.forget(&[run]).unwrap();
        (8..PAGES).for_each(|page| discard_page(&memory, page));
        for page in 8..PAGES {
            assert_eq!(read_page(&memory, page), template.expected(page));
        }
        assert_eq!(read_page(&memory, 3)[..8], 7_u64.to_ne_bytes());
        assert_eq!(pager.stop().unwrap().poisoned, 0);
    }
}

const SOCKET: &str = "PANDO_TEST_SOCKET";

/// This test again, in a process of its own, which connects to `socket`.
fn child(name: &str, socket: &std::path::Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(SOCKET, socket)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// The child: has its memory served, and touches page 9 until it is killed.
fn be_a_client(socket: &std::ffi::OsStr) {
    let guest = Guest::new(PAGES);
    let stream = UnixStream::connect(socket).unwrap();
    let uffd = guest.uffd();
    let fds = [uffd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let base = guest.base().to_ne_bytes();
    sendmsg(
        &stream,
        &[IoSlice::new(&base)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    drop(uffd);
    let _ = guest.read_page(9);
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

fn receive(stream: &UnixStream) -> (OwnedFd, u64) {
    let mut base = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut base)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (fds.next().unwrap(), u64::from_ne_bytes(base))
}

#[test]
fn a_client_that_dies_mid_fault_is_forgotten_and_others_go_on() {
    if let Some(socket) = std::env::var_os(SOCKET) {
        be_a_client(&socket);
    }
    let template = Template::new(PAGES, all);
    let directory = tempfile::tempdir().unwrap();
    for (number, mode) in MODES.into_iter().enumerate() {
        for watched in [true, false] {
            let socket = directory.path().join(format!("{number}-{watched}"));
            let listener = UnixListener::bind(&socket).unwrap();
            let name = "a_client_that_dies_mid_fault_is_forgotten_and_others_go_on";
            let mut process = child(name, &socket);
            let (uffd, base) = receive(&listener.accept().unwrap().0);
            // Watched: its read never ends. Else: it ends when the client is dead.
            let plan = if watched {
                hang(9)
            } else {
                common::shared::slow(Duration::from_millis(300))
            };
            let (options, _) = shared_options(mode, plan);
            let (pager, told) = start(options);
            let image = pager.add_image(template.image(), "test").unwrap();
            let region = ClientRegion {
                image,
                address: base,
                pages: PageRange::new(PageIndex::default(), PageCount::new(PAGES)),
            };
            let spec = ClientSpec {
                pidfd: watched.then(|| pidfd_of(process.id())),
                ..ClientSpec::new(uffd, vec![region])
            };
            pager.attach(id(1), spec).unwrap();
            until("it faults", || pager.counts().faults == 1);
            process.kill().unwrap();
            process.wait().unwrap();
            let gone = ClientEvent::Gone { client: id(1) };
            until("it is gone", || *told.lock().unwrap() == [gone.clone()]);
            assert_eq!(pager.clients(), 0);
            let guest = Guest::new(PAGES);
            pager.attach(id(1), guest.spec(image)).unwrap();
            assert_eq!(guest.read_page(20), template.expected(20));
            assert_eq!(pager.counts().poisoned, 0);
        }
    }
}

#[test]
fn a_client_that_makes_its_descriptor_block_stops_nobody() {
    let template = Template::new(PAGES, all);
    for mode in MODES {
        let (options, _) = shared_options(mode, FaultPlan::default());
        let (pager, _) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let (hostile, guest) = (Guest::new(PAGES), Guest::new(PAGES));
        pager.attach(id(1), hostile.spec(image)).unwrap();
        pager.attach(id(2), guest.spec(image)).unwrap();
        let shared = hostile.uffd();
        let flags = rustix::fs::fcntl_getfl(&shared).unwrap();
        rustix::fs::fcntl_setfl(&shared, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
        for page in 0..PAGES {
            assert_eq!(hostile.read_page(page), template.expected(page));
            assert_eq!(guest.read_page(page), template.expected(page));
        }
    }
}
