#![forbid(unsafe_code)]
//! The disk that tells a guest who it is.

use super::driver::{ADDRESS, Driver};
use super::requests::{ask_disk, data};
use crate::device::virtio::block::document::{Document, DocumentPort, MAX_DOCUMENT_BYTES};
use crate::device::virtio::transport::pci::VirtioPci;

/// Number of the vector of changed registers.
const CONFIG_VECTOR: u32 = 0x40;

fn document(content: &[u8]) -> (Driver, DocumentPort) {
    let port = DocumentPort::default();
    port.put(content.to_vec());
    let mut driver = Driver::new(Box::new(Document::new(port.clone())));
    driver.device.worker().resume();
    let features = driver.offered();
    driver.set_up(features);
    (driver, port)
}

/// Its size in sectors, as the guest reads it.
fn sectors(driver: &mut Driver) -> u64 {
    driver.read(0x2000, 8)
}

/// The first bytes of a sector.
fn sector(driver: &mut Driver, number: u64) -> Vec<u8> {
    assert_eq!(ask_disk(driver, 0, number, Some((512, true))), 0);
    data(driver, 8)
}

#[test]
fn it_is_a_disk_that_nobody_writes() {
    let (mut driver, _port) = document(b"template");
    assert_eq!(sectors(&mut driver), 1);
    assert_eq!(sector(&mut driver, 0), b"template");
    // A write, and a sector behind the end.
    assert_eq!(ask_disk(&mut driver, 1, 0, Some((512, false))), 1);
    assert_eq!(ask_disk(&mut driver, 0, 1, Some((512, true))), 1);
}

#[test]
fn a_clone_is_told_of_its_own() {
    for (content, expected) in [(&b"clone---"[..], 2), (&[b'x'; 1025], 3)] {
        let (driver, _port) = document(b"template");
        driver.device.worker().pause();
        let state = driver.device.save();
        let port = DocumentPort::default();
        let device = Box::new(Document::new(port.clone()));
        let mut device = VirtioPci::new("dev0", 1, ADDRESS, device);
        device.restore(&state).unwrap();
        let mut driver = driver.continued(device);
        port.put(content.to_vec());
        driver.device.worker().resume();
        assert_eq!(driver.wait(), CONFIG_VECTOR);
        assert_eq!(sectors(&mut driver), expected);
        assert_eq!(sector(&mut driver, 0), content[..8]);
        // It goes on with it, and is told nothing again.
        driver.device.worker().pause();
        driver.device.worker().resume();
        assert_eq!(sectors(&mut driver), expected);
    }
}

#[test]
fn a_machine_that_was_only_stopped_keeps_it() {
    let (mut driver, _port) = document(b"machine-");
    driver.device.worker().pause();
    driver.device.worker().resume();
    assert_eq!(sector(&mut driver, 0), b"machine-");
}

#[test]
fn a_size_that_no_document_has_is_refused() {
    let (driver, _port) = document(&vec![1; MAX_DOCUMENT_BYTES + 1]);
    driver.device.worker().pause();
    let mut state = driver.device.save();
    let device = || {
        let device = Box::new(Document::new(DocumentPort::default()));
        VirtioPci::new("dev0", 1, ADDRESS, device)
    };
    device().restore(&state).unwrap();
    for sectors in [0_u64, 1 << 40] {
        let saved = crate::device::virtio::block::state::BlockState {
            sectors,
            is_readonly: true,
        };
        state.device = postcard::to_stdvec(&saved).unwrap();
        let error = device().restore(&state).unwrap_err().to_string();
        assert!(error.contains("sectors: it has 1 to"), "{error}");
    }
}
