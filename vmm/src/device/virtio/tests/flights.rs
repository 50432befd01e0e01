#![forbid(unsafe_code)]
//! Requests of a disk that are under way at once: each has its own answer, whatever the order, and a disk on a
//! host without io_uring does the same.

use proptest::prelude::*;

use super::driver::{BUFFERS, Driver, EVENT_INDEX, VERSION_1};
use super::requests::image;
use crate::device::virtio::block::backend::Disk;
use crate::device::virtio::block::device::Block;
use crate::spec::DiskAccess;

const FLUSH: u64 = 1 << 9;
/// Requests that fit into the driver's queue at once.
const BATCH: usize = 5;
/// Sectors of each place among those: requests of guests that are under way at once do not overlap.
const PLACE_SECTORS: u64 = 12;
/// Memory of each request.
const STEP: u64 = 0x4000;
const READ: u32 = 0;
const WRITE: u32 = 1;
const DISCARD: u32 = 11;

/// A request: what, from which sector on, how many, and what is written.
#[derive(Debug, Clone, Copy)]
struct Asked {
    kind: u32,
    sector: u64,
    sectors: u32,
    byte: u8,
}

/// Asks for all at once; of each the status, and what was read.
fn ask(driver: &mut Driver, batch: &[Asked]) -> Vec<(u8, Vec<u8>)> {
    let place = |number: usize| BUFFERS + number as u64 * STEP;
    let mut heads = Vec::new();
    for (number, asked) in batch.iter().enumerate() {
        let at = place(number);
        let mut head = asked.kind.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend(asked.sector.to_le_bytes());
        driver.ram.write(at, &head).unwrap();
        driver.ram.write(at + 16, &[0xee]).unwrap();
        let (bytes, is_writable, content) = match asked.kind {
            READ => (
                asked.sectors * 512,
                true,
                vec![0xdd; asked.sectors as usize * 512],
            ),
            WRITE => (
                asked.sectors * 512,
                false,
                vec![asked.byte; asked.sectors as usize * 512],
            ),
            DISCARD => (
                16,
                false,
                [
                    &asked.sector.to_le_bytes()[..],
                    &asked.sectors.to_le_bytes(),
                    &[0; 4],
                ]
                .concat(),
            ),
            _ => (0, true, Vec::new()),
        };
        driver.ram.write(at + 0x1000, &content).unwrap();
        let data = (at + 0x1000, bytes, is_writable);
        let pieces = [(at, 16, false), data, (at + 16, 1, true)];
        heads.push(driver.offer(&pieces));
    }
    driver.kick();
    let mut used = Vec::new();
    while used.len() < batch.len() {
        used.extend(driver.used());
        driver.listen();
        let more = driver.used();
        if more.is_empty() && used.len() < batch.len() {
            driver.wait();
        }
        used.extend(more);
    }
    let answers = batch.iter().zip(heads).enumerate();
    answers
        .map(|(number, (asked, head))| {
            let of = used.iter().filter(|(first, _)| *first == u32::from(head));
            let lengths: Vec<_> = of.map(|&(_, length)| length).collect();
            let mut status = [0];
            driver.ram.read(place(number) + 16, &mut status).unwrap();
            let is_read = asked.kind == READ && status[0] == 0;
            let bytes = if is_read { asked.sectors * 512 } else { 0 };
            assert_eq!(lengths, [bytes + 1], "{asked:?}");
            let mut data = vec![0; asked.sectors as usize * 512];
            driver.ram.read(place(number) + 0x1000, &mut data).unwrap();
            (
                status[0],
                if asked.kind == READ { data } else { Vec::new() },
            )
        })
        .collect()
}

fn batches() -> impl Strategy<Value = Vec<Vec<Asked>>> {
    let asked = (
        prop_oneof![
            Just(READ),
            Just(WRITE),
            Just(WRITE),
            Just(4),
            Just(DISCARD),
            Just(77)
        ],
        0..PLACE_SECTORS,
        1_u32..12,
        any::<u8>(),
    );
    let batch = proptest::collection::vec(asked, 1..=BATCH).prop_map(|batch| {
        let places = batch.into_iter().enumerate();
        let asked = places.map(|(place, (kind, sector, sectors, byte))| Asked {
            kind,
            sector: place as u64 * PLACE_SECTORS + sector,
            sectors: sectors.min(u32::try_from(PLACE_SECTORS - sector).unwrap()),
            byte,
        });
        asked.collect()
    });
    proptest::collection::vec(batch, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_ring_changes_nothing_that_a_guest_sees(
        batches in batches(),
        access in prop_oneof![Just(DiskAccess::Write), Just(DiskAccess::Snapshot)],
        features in prop_oneof![Just(FLUSH), Just(0), Just(EVENT_INDEX | FLUSH)],
    ) {
        let mut seen = Vec::new();
        for has_ring in [true, false] {
            let file = image();
            let disk = Disk::open(file.path(), access, &std::env::temp_dir()).unwrap();
            let block = Block::new(disk.clone(), "aspen").with_ring(has_ring);
            let mut driver = Driver::new(Box::new(block));
            driver.set_up(VERSION_1 | features);
            let answers: Vec<_> = batches.iter().map(|batch| ask(&mut driver, batch)).collect();
            let mut content = vec![0; 64 * 512];
            disk.read_at(0, &mut content).unwrap();
            driver.device.worker().pause();
            prop_assert!(!disk.has_pending_writes() || access == DiskAccess::Snapshot);
            prop_assert_eq!(disk.failed_writes(), 0);
            seen.push((answers, content, std::fs::read(file.path()).unwrap()));
        }
        prop_assert!(seen[0] == seen[1]);
    }
}

#[test]
fn an_error_is_that_of_its_request() {
    let file = image();
    // Opened to be read.
    let unwritable = std::fs::File::open(file.path()).unwrap();
    let folder = std::env::temp_dir();
    let disk = Disk::from_file(unwritable, file.path(), DiskAccess::Write, &folder).unwrap();
    let block = Block::new(disk.clone(), "aspen").with_ring(true);
    let mut driver = Driver::new(Box::new(block));
    driver.set_up(VERSION_1 | FLUSH);
    let asked = |kind, sector| Asked {
        kind,
        sector,
        sectors: 2,
        byte: 9,
    };
    let answers = ask(
        &mut driver,
        &[
            asked(READ, 3),
            asked(WRITE, 8),
            asked(READ, 64),
            asked(4, 0),
            asked(READ, 20),
        ],
    );
    let statuses: Vec<_> = answers.iter().map(|(status, _)| *status).collect();
    assert_eq!(statuses, [0, 1, 1, 0, 0]);
    assert_eq!(answers[0].1, [[3; 512], [4; 512]].concat());
    assert_eq!(answers[4].1, [[20; 512], [21; 512]].concat());
    assert_eq!(disk.failed_writes(), 1);
    // An image that was cut meanwhile: what is left of it is read.
    std::fs::write(file.path(), [7; 1024]).unwrap();
    let answers = ask(&mut driver, &[asked(READ, 1), asked(READ, 0)]);
    assert_eq!((answers[0].0, answers[1].0), (1, 0));
    assert_eq!(answers[1].1, [7; 1024]);
}

#[test]
fn a_pause_and_a_reset_leave_nothing_under_way() {
    let file = image();
    let disk = Disk::open(file.path(), DiskAccess::Write, &std::env::temp_dir()).unwrap();
    let block = Block::new(disk.clone(), "aspen").with_ring(true);
    let mut driver = Driver::new(Box::new(block));
    driver.set_up(VERSION_1 | FLUSH);
    let mut head = WRITE.to_le_bytes().to_vec();
    head.extend([0; 12]);
    driver.ram.write(BUFFERS, &head).unwrap();
    for round in 0..200_u32 {
        for _ in 0..BATCH {
            let data = (BUFFERS + 0x1000, 8192, false);
            driver.offer(&[(BUFFERS, 16, false), data, (BUFFERS + 16, 1, true)]);
        }
        driver.kick();
        if round % 2 == 0 {
            driver.device.worker().pause();
            assert_eq!(driver.used().len(), BATCH);
            assert!(!disk.has_pending_writes());
            driver.device.worker().resume();
        } else {
            driver.write(20, 1, 0);
            // Whatever was under way writes no answer into rings that begin anew.
            driver.ram.write(0x2000, &[0; 64]).unwrap();
            driver.ram.write(0x3000, &[0; 256]).unwrap();
            driver.set_up(VERSION_1 | FLUSH);
            assert!(driver.used().is_empty());
        }
    }
}
