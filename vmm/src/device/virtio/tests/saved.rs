#![forbid(unsafe_code)]
//! Devices that are paused, saved, and go on.

use super::driver::{ADDRESS, BUFFERS, Driver, EVENT_INDEX, VERSION_1};
use super::requests::{ask_disk, block, image};
use crate::device::virtio::rng::device::Rng;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::spec::DiskAccess;

#[test]
fn what_was_asked_before_a_pause_is_answered_in_it_and_nothing_after() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX] {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.set_up(features);
        for piece in 0..8 {
            driver.offer(&[(BUFFERS + piece * 64, 64, true)]);
        }
        driver.kick();
        driver.device.worker().pause();
        assert_eq!(driver.used().len(), 8);
        driver.offer(&[(BUFFERS, 64, true)]);
        driver.kick();
        assert_eq!(driver.used().len(), 0);
        driver.device.worker().resume();
        while driver.used().is_empty() {
            driver.wait();
        }
    }
}

#[test]
fn no_moment_of_a_pause_loses_a_request() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    driver.set_up(VERSION_1);
    for round in 0..4000 {
        for piece in 0..8 {
            driver.offer(&[(BUFFERS + piece * 64, 64, true)]);
        }
        driver.kick();
        // Before the worker has woken, while it wakes, while it works.
        for _ in 0..round % 200 * 20 {
            std::hint::spin_loop();
        }
        driver.device.worker().pause();
        assert_eq!(driver.used().len(), 8, "round {round}");
        driver.device.worker().resume();
    }
}

#[test]
fn a_saved_disk_goes_on_with_its_queue_and_its_interrupts() {
    let file = image();
    let mut driver = Driver::new(block(&file, DiskAccess::Write));
    let features = driver.offered();
    driver.set_up(features);
    for sector in 0..20 {
        assert_eq!(ask_disk(&mut driver, 0, sector, Some((512, true))), 0);
    }
    driver.device.worker().pause();
    let state = driver.device.save();
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(
        postcard::from_bytes::<super::super::state::VirtioState>(&bytes).unwrap(),
        state
    );
    // The image is free again: another machine goes on.
    driver.device = VirtioPci::new("gone", 2, ADDRESS, Box::new(Rng::default()));
    let mut device = VirtioPci::new("dev0", 1, ADDRESS, block(&file, DiskAccess::Write));
    device.restore(&state).unwrap();
    let mut driver = driver.continued(device);
    driver.device.worker().resume();
    for sector in 0..20 {
        assert_eq!(ask_disk(&mut driver, 0, sector, Some((512, true))), 0);
    }
    driver.device.worker().pause();
    let again = driver.device.save();
    assert_eq!(again.function, state.function);
}

#[test]
fn state_of_another_device_is_refused_with_the_reason() {
    let file = image();
    let device = |access| VirtioPci::new("dev0", 1, ADDRESS, block(&file, access));
    let state = device(DiskAccess::Write).save();
    let refused = |change: &dyn Fn(&mut super::super::state::VirtioState)| {
        let mut state = state.clone();
        change(&mut state);
        device(DiskAccess::Write)
            .restore(&state)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&|s| s.function.slot = 3).contains("in PCI slot 3, the machine has it in 1"));
    assert!(refused(&|s| s.function.config[0] = 0).contains("PCI register 0x0"));
    assert!(refused(&|s| s.function.config.clear()).contains("of another device"));
    assert!(refused(&|s| s.queues.clear()).contains("0 queues instead of 1"));
    assert!(refused(&|s| s.queues[0].size = 3).contains("queue 0 cannot be like that"));
    assert!(refused(&|s| s.device.push(0)).contains("bytes too many"));
    assert!(refused(&|s| s.device.clear()).len() > 5);
    assert!(refused(&|s| s.function.msix.entries.clear()).contains("another size"));
    let feature = refused(&|s| (s.status, s.driver_features) = (0xf, 1 << 50));
    assert!(feature.contains("features 0x4000000000000"), "{feature}");
    let error = device(DiskAccess::Read).restore(&state).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a writable disk, its image is read-only")
    );
    std::fs::write(file.path(), [0; 512]).unwrap();
    let error = device(DiskAccess::Write).restore(&state).unwrap_err();
    assert!(
        error.to_string().contains("64 sectors, its image has 1"),
        "{error}"
    );
}
