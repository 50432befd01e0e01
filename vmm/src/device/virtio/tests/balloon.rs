#![forbid(unsafe_code)]
//! A balloon: pages that are given away, reported free, and statistics, with a gate that lets them go and one
//! that does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::driver::{ADDRESS, Driver, EVENT_INDEX, RAM_BYTES, VERSION_1, ram};
use super::rings::Rings;
use crate::device::virtio::balloon::backend::{BalloonPort, STATS};
use crate::device::virtio::balloon::device::Balloon;
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::memory::discard::{BackendDiscards, DiscardGate, DiscardSource, Discards};
use crate::memory::guest::{GuestRam, RamBacking};
use crate::memory::layout::RamLayout;
use crate::spec::BalloonParts;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTS: usize = 3;
const PAGE: u64 = 4096;
/// Where page numbers and statistics are.
const REQUEST: u64 = 0x2_0000;
/// Where the device's own registers are.
const REGISTERS: u64 = 0x2000;
/// Pages that are given away and reported.
const FIRST_PAGE: u64 = 0x80;
const PAGES: u64 = 16;
const LIMIT: Duration = Duration::from_secs(20);
const REPORTING: u64 = 1 << 5;
const ALL: BalloonParts = BalloonParts {
    deflate_on_oom: true,
    free_page_reporting: true,
};

/// Memory of which pages hold their numbers.
fn memory(discards: Discards) -> Arc<GuestRam> {
    let ram = if discards == Discards::Allowed {
        ram()
    } else {
        let layout = RamLayout::new(&[RAM_BYTES]).unwrap();
        let ram = GuestRam::new(layout, vec![RamBacking::anonymous(RAM_BYTES).unwrap()]).unwrap();
        let backend = BackendDiscards {
            id: "pc.ram".to_owned(),
            discards,
        };
        Arc::new(ram.with_gate(DiscardGate::new(vec![backend])))
    };
    for page in FIRST_PAGE..FIRST_PAGE + PAGES {
        ram.write(page * PAGE, &page.to_le_bytes()).unwrap();
    }
    ram
}

/// A guest with a balloon that is set up.
fn guest(parts: BalloonParts, port: &BalloonPort, ram: Arc<GuestRam>) -> Rings {
    let device = Box::new(Balloon::new(parts, port.clone()));
    let queues = device.device_type().queues.len();
    let device = VirtioPci::new("dev0", 1, ADDRESS, device);
    let mut rings = Rings::of(Driver::of(device, ram), queues);
    let features = rings.driver.offered();
    rings.driver.device.worker().resume();
    assert_eq!(rings.set_up(features | VERSION_1 | EVENT_INDEX), 0xf);
    rings
}

fn ask(rings: &mut Rings, queue: usize, pieces: &[(u64, u32, bool)]) {
    let head = rings.offer(queue, pieces);
    rings.kick(queue);
    assert_eq!(rings.wait(queue), (head, 0));
}

/// Names pages in a queue.
fn name(rings: &mut Rings, queue: usize, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    rings.driver.ram.write(REQUEST, &bytes).unwrap();
    ask(
        rings,
        queue,
        &[(REQUEST, u32::try_from(bytes.len()).unwrap(), false)],
    );
}

/// Which of the pages still hold their numbers.
fn kept(rings: &Rings) -> Vec<u64> {
    (FIRST_PAGE..FIRST_PAGE + PAGES)
        .filter(|page| {
            let mut word = [0; 8];
            rings.driver.ram.read(page * PAGE, &mut word).unwrap();
            let word = u64::from_le_bytes(word);
            assert!(word == *page || word == 0, "page {page} holds {word}");
            word == *page
        })
        .collect()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} never comes");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn pages_that_are_given_away_are_zero_and_others_stay() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    // In no order, one twice, and one that is no RAM.
    name(&mut rings, INFLATE, &[0x83, 0x80, 0x81, 0x83, 0xffff_fff0]);
    let expected: Vec<u64> = (0x80..0x90)
        .filter(|page| ![0x80, 0x81, 0x83].contains(page))
        .collect();
    assert_eq!(kept(&rings), expected);
    name(&mut rings, DEFLATE, &[0x80, 0x84]);
    assert_eq!(
        kept(&rings),
        expected,
        "what comes back is what was left there"
    );
    // Free memory: from within a page to within another.
    let pieces = [(0x88 * PAGE + 7, 3 * 4096, true), (0x8d * PAGE, 4096, true)];
    ask(&mut rings, REPORTS, &pieces);
    let expected: Vec<u64> = expected
        .into_iter()
        .filter(|page| ![0x89, 0x8a, 0x8d].contains(page))
        .collect();
    assert_eq!(kept(&rings), expected);
}

#[test]
fn a_templates_pages_stay_and_each_attempt_counts() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Refused));
    for _ in 0..3 {
        name(&mut rings, INFLATE, &[0x80, 0x82, 0x83, 0x84]);
    }
    let pieces = [(0x88 * PAGE, 2 * 4096, true), (0x8c * PAGE, 4096, true)];
    ask(&mut rings, REPORTS, &pieces);
    assert_eq!(kept(&rings).len() as u64, PAGES);
    let gate = rings.driver.ram.gate();
    assert_eq!(gate.refused(DiscardSource::Balloon), 12, "as many as pages");
    assert_eq!(
        gate.refused(DiscardSource::FreePageReporting),
        2,
        "as many as ranges"
    );
}

#[test]
fn free_pages_that_the_guest_fills_with_something_are_let_be() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    rings.driver.write(REGISTERS + 12, 4, 0xaaaa_aaaa);
    ask(&mut rings, REPORTS, &[(0x88 * PAGE, 4096, true)]);
    assert_eq!(kept(&rings).len() as u64, PAGES);
    rings.driver.write(REGISTERS + 12, 4, 0);
    ask(&mut rings, REPORTS, &[(0x88 * PAGE, 4096, true)]);
    assert_eq!(kept(&rings).len() as u64, PAGES - 1);
}

#[test]
fn a_report_may_name_more_memory_than_any_device_copies() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    // Most of it is no RAM.
    ask(
        &mut rings,
        REPORTS,
        &[(0x80 * PAGE, 8192, true), (1 << 40, u32::MAX, true)],
    );
    assert_eq!(kept(&rings).len() as u64, PAGES - 2);
}

#[test]
fn the_guest_hears_of_a_new_size_and_says_what_it_has_given() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    let heard = Arc::new(AtomicU32::new(0));
    let hear = Arc::clone(&heard);
    port.on_change(Box::new(move |pages| hear.store(pages, Ordering::SeqCst)));
    assert_eq!(rings.driver.read(REGISTERS, 4), 0);
    port.set_target(77);
    eventually("the new size", || rings.driver.read(REGISTERS, 4) == 77);
    // Vector 0 is of the registers.
    assert_eq!(rings.driver.wait(), 0x40);
    rings.driver.write(REGISTERS + 4, 4, 50);
    assert_eq!(
        (port.actual_pages(), heard.load(Ordering::SeqCst)),
        (50, 50)
    );
    // The target is the host's.
    rings.driver.write(REGISTERS, 4, 1);
    assert_eq!(rings.driver.read(REGISTERS, 4), 77);
    rings.driver.write(REGISTERS + 4, 8, u64::MAX);
    assert_eq!(
        rings.driver.read(REGISTERS + 8, 4),
        0,
        "no command was offered"
    );
}

#[test]
fn a_size_that_is_wanted_while_the_machine_stands_is_heard_when_it_runs() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    rings.driver.device.worker().pause();
    port.set_target(5);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(rings.driver.read(REGISTERS, 4), 0);
    rings.driver.device.worker().resume();
    assert_eq!(rings.driver.read(REGISTERS, 4), 5);
    assert_eq!(rings.driver.wait(), 0x40);
}

fn statistic(tag: u16, value: u64) -> Vec<u8> {
    let mut bytes = tag.to_le_bytes().to_vec();
    bytes.extend(value.to_le_bytes());
    bytes
}

#[test]
fn statistics_are_asked_for_as_often_as_it_is_wanted() {
    let port = BalloonPort::default();
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    assert_eq!(port.stats().last_update, 0);
    let mut tell = |value: u64| {
        let bytes = [statistic(4, value), statistic(5, 1 << 20), statistic(99, 3)].concat();
        rings.driver.ram.write(REQUEST, &bytes).unwrap();
        let head = rings.offer(STATISTICS, &[(REQUEST, 30, false)]);
        rings.kick(STATISTICS);
        let free = |stats: [Option<u64>; STATS.len()]| stats[4];
        eventually("what the guest said", || {
            free(port.stats().values) == Some(value)
        });
        assert!(port.stats().last_update > 0);
        assert_eq!(port.stats().values[5], Some(1 << 20));
        assert_eq!(port.stats().values[0], None);
        thread::sleep(Duration::from_millis(10));
        assert_eq!(rings.next(STATISTICS), None, "nobody has asked");
        port.set_interval(Duration::from_millis(5));
        assert_eq!(rings.wait(STATISTICS), (head, 0));
        port.set_interval(Duration::ZERO);
    };
    for value in [4096, 8192] {
        tell(value);
    }
}

#[test]
fn a_saved_balloon_goes_on_as_it_was() {
    let port = BalloonPort::default();
    port.set_target(9);
    let mut rings = guest(ALL, &port, memory(Discards::Allowed));
    rings.driver.write(REGISTERS + 4, 4, 8);
    rings.driver.device.worker().pause();
    // Of this the guest has not heard yet.
    port.set_target(11);
    let state = rings.driver.device.save();
    let other = |parts| {
        let port = BalloonPort::default();
        let device = Box::new(Balloon::new(parts, port.clone()));
        (VirtioPci::new("dev0", 1, ADDRESS, device), port)
    };
    let (mut plain, _) = other(BalloonParts {
        free_page_reporting: false,
        ..ALL
    });
    plain.restore(&state).unwrap_err();
    let (mut device, port) = other(ALL);
    device.restore(&state).unwrap();
    assert_eq!(port.actual_pages(), 8);
    assert_eq!(port.restored_target_pages(), Some(11));
    let mut rings = rings.continued(device);
    rings.driver.device.worker().resume();
    assert_eq!(rings.driver.wait(), 0x40);
    assert_eq!(rings.driver.read(REGISTERS, 4), 11);
    assert_eq!(rings.driver.read(REGISTERS + 4, 4), 8);
    name(&mut rings, INFLATE, &[0x80]);
    assert_eq!(kept(&rings).len() as u64, PAGES - 1);
}

#[test]
fn what_is_not_offered_has_no_queue() {
    let plain = Balloon::new(BalloonParts::default(), BalloonPort::default());
    assert_eq!(plain.device_type().queues.len(), 3);
    assert_eq!(plain.features() & REPORTING, 0);
    let all = Balloon::new(ALL, BalloonPort::default());
    assert_eq!(all.device_type().queues.len(), 4);
    assert_ne!(all.features() & REPORTING, 0);
}
