#![forbid(unsafe_code)]
//! Devices that are taken out while they work: what they do is done or dropped, and nothing comes after it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::driver::{BUFFERS, Driver, RAM_BYTES, VERSION_1};
use super::requests::{block, image};
use crate::device::pci::bus::PciFunction;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::device::{DeviceType, VirtioDevice, VirtioStateError};
use crate::device::virtio::queue::Chain;
use crate::memory::guest::GuestRam;
use crate::spec::DiskAccess;

const LIMIT: Duration = Duration::from_secs(20);

static TYPE: DeviceType = DeviceType {
    number: 4,
    kind: "gate",
    version: 1,
    pci_class: 0,
    queues: &[64],
};

/// A device each of whose requests says that it has begun, and waits until it may go on.
#[derive(Debug)]
struct Gate {
    begun: Sender<()>,
    go: Receiver<()>,
}

impl VirtioDevice for Gate {
    fn device_type(&self) -> &'static DeviceType {
        &TYPE
    }
    fn features(&self) -> u64 {
        0
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn process(&mut self, _: usize, request: &Chain, ram: &GuestRam) -> u32 {
        self.begun.send(()).unwrap();
        self.go.recv_timeout(LIMIT).unwrap();
        request.write(ram, 0, &[7; 8]).unwrap();
        8
    }
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), VirtioStateError> {
        Ok(())
    }
}

fn all(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(RAM_BYTES).unwrap()];
    ram.read(0, &mut bytes).unwrap();
    bytes
}

/// Whatever a guest could still do to it.
fn poke(driver: &mut Driver) {
    driver.set_up(VERSION_1);
    driver.offer(&[(BUFFERS + 0x800, 16, true)]);
    driver.kick();
}

#[test]
fn the_request_of_the_moment_is_done_and_those_behind_it_are_not() {
    let (begun, has_begun) = channel();
    let (let_go, go) = channel();
    let mut driver = Driver::new(Box::new(Gate { begun, go }));
    driver.set_up(VERSION_1);
    for number in 0..3 {
        driver.offer(&[(BUFFERS + number * 64, 8, true)]);
    }
    driver.kick();
    has_begun.recv_timeout(LIMIT).unwrap();
    let (sender, is_out) = channel();
    let ram = thread::scope(|scope| {
        let out = scope.spawn(|| {
            driver.device.detach();
            sender.send(all(&driver.ram)).unwrap();
        });
        // It waits for the request: who has taken the device out can rely on that.
        is_out.recv_timeout(Duration::from_millis(50)).unwrap_err();
        for _ in 0..3 {
            let_go.send(()).unwrap();
        }
        out.join().unwrap();
        is_out.recv_timeout(LIMIT).unwrap()
    });
    assert_eq!(driver.used(), [(0, 8)]);
    assert!(has_begun.try_recv().is_err(), "another request began");
    poke(&mut driver);
    let mut rings = all(&driver.ram);
    let before = usize::try_from(BUFFERS).unwrap();
    let data = rings.split_off(before);
    assert!(data == ram[before..], "something was written");
    let Driver { device, ram, .. } = driver;
    drop(device);
    assert_eq!(
        std::sync::Arc::strong_count(&ram),
        1,
        "the memory is held still"
    );
}

#[test]
fn a_disk_that_is_taken_out_under_load_leaves_memory_and_its_file_alone() {
    let file = image();
    for round in 0..20 {
        let mut driver = Driver::new(block(&file, DiskAccess::Write));
        driver.set_up(VERSION_1);
        driver.ram.write(BUFFERS, &[0; 16]).unwrap();
        for _ in 0..4 {
            driver.offer(&[
                (BUFFERS, 16, false),
                (BUFFERS + 0x1000, 16384, true),
                (BUFFERS + 16, 1, true),
            ]);
        }
        driver.kick();
        if round % 2 == 0 {
            driver.wait();
        }
        driver.device.detach();
        let before = all(&driver.ram);
        driver.kick();
        let Driver { device, ram, .. } = driver;
        // Its thread has ended when this returns, and its file is closed.
        drop(device);
        let folder = std::env::temp_dir();
        Disk::open(file.path(), DiskAccess::Write, &folder).unwrap();
        let mut after = all(&ram);
        // Which answers this driver has seen is its own word in its own ring.
        let own = 0x2000..0x3000;
        after[own.clone()].copy_from_slice(&before[own]);
        assert!(after == before, "something was written");
    }
}
