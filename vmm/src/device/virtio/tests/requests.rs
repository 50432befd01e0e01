#![forbid(unsafe_code)]
//! What devices answer.

use super::driver::{BUFFERS, Driver, EVENT_INDEX, RAM_BYTES, VERSION_1};
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::block::device::Block;
use crate::device::virtio::rng::device::Rng;
use crate::spec::DiskAccess;

const SECTORS: u64 = 64;

/// A disk whose sector `n` is full of `n`.
pub(super) fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..SECTORS * 512)
        .map(|at| (at / 512).to_le_bytes()[0])
        .collect();
    std::fs::write(file.path(), content).unwrap();
    file
}

pub(super) fn block(file: &tempfile::NamedTempFile, access: DiskAccess) -> Box<Block> {
    let disk = Disk::open(file.path(), access, &std::env::temp_dir()).unwrap();
    Box::new(Block::new(disk, "aspen"))
}

/// A request of a disk with its data at one place; the status.
pub(super) fn ask_disk(
    driver: &mut Driver,
    kind: u32,
    sector: u64,
    data: Option<(u32, bool)>,
) -> u8 {
    let mut head = kind.to_le_bytes().to_vec();
    head.extend([0; 4]);
    head.extend(sector.to_le_bytes());
    driver.ram.write(BUFFERS, &head).unwrap();
    driver.ram.write(BUFFERS + 16, &[0xee]).unwrap();
    let mut pieces = vec![(BUFFERS, 16, false)];
    if let Some((bytes, is_writable)) = data {
        pieces.push((BUFFERS + 0x1000, bytes, is_writable));
    }
    pieces.push((BUFFERS + 16, 1, true));
    driver.ask(&pieces);
    let mut status = [0];
    driver.ram.read(BUFFERS + 16, &mut status).unwrap();
    status[0]
}

pub(super) fn data(driver: &Driver, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    driver.ram.read(BUFFERS + 0x1000, &mut data).unwrap();
    data
}

#[test]
fn a_device_is_set_up_only_with_features_that_it_has() {
    let mut driver = Driver::new(Box::new(Rng::default()));
    assert_eq!(driver.offered(), VERSION_1 | EVENT_INDEX | 1 << 28);
    assert_eq!(driver.set_up(VERSION_1 | 1 << 5) & 8, 0, "no such feature");
    assert_eq!(driver.set_up(0) & 8, 0, "not modern");
    assert_eq!(driver.set_up(VERSION_1), 0xf);
    driver.write(28, 2, 1);
    driver.write(32, 4, 0x5000);
    assert_eq!(driver.read(32, 8), 0x1000, "a queue that is complete stays");
    driver.write(20, 1, 0);
    assert_eq!((driver.read(20, 1), driver.read(28, 2)), (0, 0));
}

#[test]
fn entropy_fills_what_it_is_given() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX] {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.set_up(features);
        assert_eq!(
            driver.ask(&[(BUFFERS, 300, true), (BUFFERS + 0x1000, 100, true)]),
            400
        );
        let mut bytes = [0; 300];
        driver.ram.read(BUFFERS, &mut bytes).unwrap();
        assert!(bytes[200..].iter().any(|&byte| byte != 0));
        assert_eq!(driver.ask(&[(BUFFERS, 16, false)]), 0);
        assert_eq!(driver.ask(&[(RAM_BYTES - 8, 16, true)]), 0, "outside RAM");
        assert_eq!(driver.ask(&[(BUFFERS, 16, true)]), 16);
    }
}

#[test]
fn sectors_are_read_and_written() {
    let file = image();
    let mut driver = Driver::new(block(&file, DiskAccess::Write));
    let features = driver.offered();
    driver.set_up(features);
    assert_eq!(driver.read(0x2000, 8), SECTORS);
    assert_eq!(ask_disk(&mut driver, 0, 5, Some((1024, true))), 0);
    assert_eq!(data(&driver, 1024), [[5; 512], [6; 512]].concat());
    driver.ram.write(BUFFERS + 0x1000, &[9; 512]).unwrap();
    assert_eq!(ask_disk(&mut driver, 1, 6, Some((512, false))), 0);
    assert_eq!(ask_disk(&mut driver, 4, 0, None), 0);
    let written = std::fs::read(file.path()).unwrap();
    assert_eq!(
        written[5 * 512..8 * 512],
        [[5; 512], [9; 512], [7; 512]].concat()
    );
    assert_eq!(ask_disk(&mut driver, 8, 0, Some((20, true))), 0);
    assert_eq!(data(&driver, 20), *b"aspen\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    // Sectors 1 and 2, no flags: first discarded, then made zero.
    let range = [&1_u64.to_le_bytes()[..], &2_u32.to_le_bytes(), &[0; 4]].concat();
    for kind in [11, 13] {
        driver.ram.write(BUFFERS + 0x1000, &range).unwrap();
        assert_eq!(ask_disk(&mut driver, kind, 0, Some((16, false))), 0);
    }
    let written = std::fs::read(file.path()).unwrap();
    assert_eq!(
        written[..4 * 512],
        [[0; 512], [0; 512], [0; 512], [3; 512]].concat()
    );
}

#[test]
fn what_cannot_be_done_fails_and_nothing_else() {
    let file = image();
    let before = std::fs::read(file.path()).unwrap();
    let mut driver = Driver::new(block(&file, DiskAccess::Write));
    driver.set_up(VERSION_1);
    let far = [
        &(SECTORS - 1).to_le_bytes()[..],
        &2_u32.to_le_bytes(),
        &[0; 4],
    ]
    .concat();
    driver.ram.write(BUFFERS + 0x1000, &far).unwrap();
    for (kind, sector, data, status) in [
        (0, SECTORS, Some((512, true)), 1),
        (0, SECTORS - 1, Some((1024, true)), 1),
        (0, u64::MAX, Some((512, true)), 1),
        (0, u64::MAX / 512, Some((512, true)), 1),
        (0, 0, Some((511, true)), 1),
        (0, 0, None, 1),
        (1, SECTORS, Some((512, false)), 1),
        (1, 0, Some((512, true)), 1),
        (11, 0, Some((16, false)), 1),
        (13, 0, Some((16, false)), 1),
        (13, 0, Some((15, false)), 1),
        (13, 0, None, 1),
        (2, 0, None, 2),
        (77, 0, None, 2),
    ] {
        let found = ask_disk(&mut driver, kind, sector, data);
        assert_eq!(found, status, "{kind} at {sector}: {data:?}");
    }
    // No status, no head, a status outside RAM: there is nobody to tell.
    assert_eq!(driver.ask(&[(BUFFERS, 16, false)]), 0);
    assert_eq!(
        driver.ask(&[(BUFFERS, 8, false), (BUFFERS + 16, 1, true)]),
        1
    );
    assert_eq!(
        driver.ask(&[(BUFFERS, 16, false), (u64::MAX - 3, 1, true)]),
        0
    );
    // More bytes than a request may have.
    let huge = [
        (BUFFERS, 16, false),
        (BUFFERS, u32::MAX, true),
        (BUFFERS, 1, true),
    ];
    assert_eq!(driver.ask(&huge), 0);
    assert!(std::fs::read(file.path()).unwrap() == before);
    assert_eq!(ask_disk(&mut driver, 0, 0, Some((512, true))), 0);
}

#[test]
fn a_disk_that_is_read_only_says_so() {
    let file = image();
    let mut driver = Driver::new(block(&file, DiskAccess::Read));
    let features = driver.offered();
    assert_eq!((features >> 5 & 1, features >> 13 & 3), (1, 0));
    driver.set_up(features);
    assert_eq!(ask_disk(&mut driver, 1, 0, Some((512, false))), 1);
    assert_eq!(ask_disk(&mut driver, 0, 0, Some((512, true))), 0);
}

#[test]
fn registers_are_reached_through_configuration_too() {
    use crate::device::pci::bus::PciFunction;
    let file = image();
    let mut driver = Driver::new(block(&file, DiskAccess::Read));
    // The last capability of the list.
    let mut at = 0x34;
    loop {
        let mut next = [0];
        driver.device.read_config(at, &mut next);
        if next[0] == 0 {
            break;
        }
        at = usize::from(next[0]) + 1;
    }
    let access = at - 1;
    let mut kind = [0; 4];
    driver.device.read_config(access, &mut kind);
    assert_eq!((kind[0], kind[2], kind[3]), (9, 20, 5));
    let mut describe = |offset: u32, bytes: u32| {
        driver
            .device
            .write_config(access + 8, &offset.to_le_bytes());
        driver
            .device
            .write_config(access + 12, &bytes.to_le_bytes());
        let mut data = [0; 4];
        driver.device.read_config(access + 16, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(u64::from(describe(0x2000, 4)), SECTORS);
    describe(20, 1);
    driver.device.write_config(access + 16, &[1]);
    assert_eq!(driver.read(20, 1), 1);
}

#[test]
fn what_a_guest_takes_to_be_durable_is() {
    const FLUSH: u64 = 1 << 9;
    for flushes in [true, false] {
        let file = image();
        let disk = Disk::open(file.path(), DiskAccess::Write, &std::env::temp_dir()).unwrap();
        let mut driver = Driver::new(Box::new(Block::new(disk.clone(), "aspen")));
        let features = driver.offered();
        assert_ne!(features & FLUSH, 0);
        let declined = if flushes { 0 } else { FLUSH };
        driver.set_up(features & !declined);
        assert_eq!(ask_disk(&mut driver, 1, 6, Some((512, false))), 0);
        assert_eq!(disk.has_pending_writes(), flushes);
        // A state that is saved now is nothing without what is on the disk.
        driver.device.worker().pause();
        assert!(!disk.has_pending_writes());
        assert_eq!(disk.failed_writes(), 0);
    }
}

#[test]
fn writes_that_fail_are_counted_and_those_that_may_not_be_are_none() {
    let file = image();
    let folder = std::env::temp_dir();
    // Opened to be read.
    let unwritable = std::fs::File::open(file.path()).unwrap();
    let disk = Disk::from_file(unwritable, file.path(), DiskAccess::Write, &folder).unwrap();
    let mut driver = Driver::new(Box::new(Block::new(disk.clone(), "aspen")));
    let features = driver.offered();
    driver.set_up(features);
    assert_eq!(ask_disk(&mut driver, 0, 6, Some((512, true))), 0);
    assert_eq!(disk.failed_writes(), 0);
    assert_eq!(ask_disk(&mut driver, 1, 6, Some((512, false))), 1);
    assert_eq!(disk.failed_writes(), 1);
    let disk = Disk::open(file.path(), DiskAccess::Read, &folder).unwrap();
    let mut driver = Driver::new(Box::new(Block::new(disk.clone(), "aspen")));
    let features = driver.offered();
    driver.set_up(features);
    assert_eq!(ask_disk(&mut driver, 1, 6, Some((512, false))), 1);
    assert_eq!(disk.failed_writes(), 0);
}
