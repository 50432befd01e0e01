#![forbid(unsafe_code)]
//! Devices that are held up by a limit: what is too early stays in the queue, and nothing that comes to the
//! device from its machine waits for that.

use std::sync::Arc;
use std::time::Duration;

use super::driver::{BUFFERS, Driver, EVENT_INDEX, VERSION_1};
use super::net::{Guest, MAC, MERGE, Namespace, datagram};
use super::requests::image;
use crate::device::pci::bus::PciFunction;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::block::device::Block;
use crate::device::virtio::limit::tests::{SetClock, limits};
use crate::device::virtio::limit::{Clock, HostClock, Limiter};
use crate::device::virtio::net::backend::NetPort;
use crate::device::virtio::net::device::Net;
use crate::spec::{DiskAccess, Limits};

const SECOND: Duration = Duration::from_secs(1);

/// A disk with limits, set up, and its clock, which stands still.
fn disk(limits: &Limits, features: u64) -> (Driver, Arc<SetClock>, tempfile::NamedTempFile) {
    let clock = Arc::new(SetClock::default());
    let (mut driver, file) = disk_by(limits, clock.clone());
    driver.set_up(features);
    (driver, clock, file)
}

fn disk_by(limits: &Limits, clock: Arc<dyn Clock>) -> (Driver, tempfile::NamedTempFile) {
    let file = image();
    let disk = Disk::open(file.path(), DiskAccess::Write, &std::env::temp_dir()).unwrap();
    let block = Block::new(disk, "aspen").with_limiter(Limiter::new(limits, clock));
    (Driver::new(Box::new(block)), file)
}

/// Asks for two sectors, so many times.
fn ask(driver: &mut Driver, requests: u64) {
    driver.ram.write(BUFFERS, &[0; 16]).unwrap();
    for _ in 0..requests {
        driver.offer(&[
            (BUFFERS, 16, false),
            (BUFFERS + 0x1000, 1024, true),
            (BUFFERS + 16, 1, true),
        ]);
    }
    driver.kick();
}

/// Waits until so many more were answered.
fn answered(driver: &mut Driver, requests: usize) {
    let mut answers = 0;
    while answers < requests {
        answers += driver.used().len();
        driver.listen();
        let more = driver.used().len();
        answers += more;
        if more == 0 && answers < requests {
            driver.wait();
        }
    }
    assert_eq!(answers, requests);
}

/// Whether nothing more is answered, even if the guest asks for it again.
fn stands_still(driver: &mut Driver) -> bool {
    driver.kick();
    // Interrupts of answers that were seen already may come late.
    while !driver.is_quiet() {}
    driver.used().is_empty()
}

#[test]
fn requests_stay_in_the_queue_until_the_clock_goes_on() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX] {
        let (mut driver, clock, _file) = disk(&limits(None, Some((1, 2))), features);
        ask(&mut driver, 5);
        answered(&mut driver, 2);
        assert!(stands_still(&mut driver));
        clock.advance(SECOND);
        driver.kick();
        answered(&mut driver, 1);
        assert!(stands_still(&mut driver));
        // A long rest gives no more than a burst.
        clock.advance(SECOND * 100);
        driver.kick();
        answered(&mut driver, 2);
    }
}

#[test]
fn bytes_are_those_of_the_data() {
    let (mut driver, clock, _file) = disk(&limits(Some((512, 2048)), None), VERSION_1);
    ask(&mut driver, 4);
    answered(&mut driver, 2);
    assert!(stands_still(&mut driver));
    clock.advance(SECOND);
    assert!(stands_still(&mut driver), "half of a request");
    clock.advance(SECOND);
    driver.kick();
    answered(&mut driver, 1);
    // More than the burst can hold: it goes when that is full, and is paid for later.
    let (mut driver, clock, _file) = disk(&limits(Some((512, 512)), None), VERSION_1);
    ask(&mut driver, 2);
    answered(&mut driver, 1);
    clock.advance(SECOND);
    assert!(stands_still(&mut driver));
    clock.advance(SECOND);
    driver.kick();
    answered(&mut driver, 1);
}

#[test]
fn who_waits_is_woken_by_the_time_alone() {
    let limits = limits(Some((1 << 20, 1024)), Some((1000, 1)));
    let (mut driver, _file) = disk_by(&limits, Arc::new(HostClock::default()));
    driver.set_up(VERSION_1);
    for _ in 0..20 {
        ask(&mut driver, 5);
        answered(&mut driver, 5);
    }
}

#[test]
fn a_pause_does_what_was_asked_for_and_it_is_waited_for_later() {
    let (mut driver, clock, _file) = disk(&limits(None, Some((1, 1))), VERSION_1);
    ask(&mut driver, 5);
    answered(&mut driver, 1);
    driver.device.worker().pause();
    assert_eq!(driver.used().len(), 4);
    driver.device.worker().resume();
    ask(&mut driver, 1);
    while !driver.is_quiet() {}
    clock.advance(SECOND * 4);
    assert!(stands_still(&mut driver));
    clock.advance(SECOND);
    driver.kick();
    answered(&mut driver, 1);
}

#[test]
fn a_reset_ends_what_waits_and_gives_nothing_back() {
    let (mut driver, clock, _file) = disk(&limits(None, Some((1, 1))), VERSION_1);
    ask(&mut driver, 3);
    answered(&mut driver, 1);
    driver.write(20, 1, 0);
    assert_eq!(driver.read(20, 1), 0);
    // The driver's rings begin anew with it.
    driver.ram.write(0x2000, &[0; 64]).unwrap();
    driver.ram.write(0x3000, &[0; 256]).unwrap();
    driver.set_up(VERSION_1);
    ask(&mut driver, 1);
    assert!(stands_still(&mut driver));
    clock.advance(SECOND);
    driver.kick();
    answered(&mut driver, 1);
}

#[test]
fn a_device_that_waits_is_taken_out_and_dropped_at_once() {
    let (mut driver, clock, file) = disk(&limits(None, Some((1, 1))), VERSION_1);
    ask(&mut driver, 3);
    answered(&mut driver, 1);
    driver.device.detach();
    driver.device.worker().settle();
    clock.advance(SECOND * 100);
    assert!(stands_still(&mut driver));
    let Driver { device, .. } = driver;
    drop(device);
    Disk::open(file.path(), DiskAccess::Write, &std::env::temp_dir()).unwrap();
}

fn network(namespace: &Namespace, limits: &Limits, clock: Arc<dyn Clock>) -> Guest {
    let port = NetPort::default();
    port.put(namespace.connection());
    let net = Net::new(MAC.parse().unwrap(), port).with_limits(limits, clock);
    let mut guest = Guest {
        driver: Driver::new(Box::new(net)),
        next: [0; 3],
    };
    guest.set_up(MERGE);
    guest
}

/// Sends packets of the guest, with room for those of the host first.
fn exchange(guest: &mut Guest, namespace: &Namespace, packets: usize) {
    let packet = datagram(b"from the guest");
    guest.driver.ram.write(BUFFERS, &packet).unwrap();
    let place = (BUFFERS, u32::try_from(packet.len()).unwrap(), false);
    guest.offer(0, &vec![(BUFFERS + 0x1000, 2048, true); packets]);
    guest.offer(1, &vec![place; packets]);
    let socket = namespace.socket();
    for _ in 0..packets {
        socket.send_to(b"to the guest", ("10.55.0.2", 7)).unwrap();
    }
}

#[test]
fn each_way_of_a_network_has_the_whole_limit() {
    let namespace = Namespace::new();
    let clock = Arc::new(SetClock::default());
    let mut guest = network(&namespace, &limits(None, Some((1, 2))), clock.clone());
    exchange(&mut guest, &namespace, 4);
    for answers in [2, 3, 4] {
        guest.wait(0, answers);
        guest.wait(1, answers);
        guest.offer(0, &[]);
        assert!(guest.driver.is_quiet());
        assert_eq!(
            (guest.used(0).len(), guest.used(1).len()),
            (answers, answers)
        );
        clock.advance(SECOND);
        guest.offer(0, &[]);
    }
}

#[test]
fn packets_that_wait_go_by_the_time_alone() {
    let namespace = Namespace::new();
    let limits = limits(Some((1 << 20, 1)), Some((1000, 1)));
    let mut guest = network(&namespace, &limits, Arc::new(HostClock::default()));
    exchange(&mut guest, &namespace, 10);
    guest.wait(0, 10);
    guest.wait(1, 10);
    // Packets that wait at a pause go, those of the host stay where they are and come when it is over.
    guest.driver.device.worker().pause();
    guest.driver.device.worker().resume();
    exchange(&mut guest, &namespace, 5);
    guest.wait(0, 15);
    guest.wait(1, 15);
}
