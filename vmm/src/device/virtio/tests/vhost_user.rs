#![forbid(unsafe_code)]
//! A disk in another process, which is a real one: QEMU's storage daemon.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::driver::{ADDRESS, BUFFERS, Driver, RAM_BYTES, VERSION_1};
use super::requests::{ask_disk, data};
use crate::device::virtio::rng::device::Rng;
use crate::device::virtio::transport::pci::VirtioPci;
use crate::device::virtio::vhost_user::device::VhostUser;
use crate::memory::guest::{GuestRam, RamBacking};
use crate::memory::layout::RamLayout;

const SECTORS: u64 = 256;
const LIMIT: Duration = Duration::from_secs(20);

/// RAM that another process can map.
pub(super) fn shared_ram() -> Arc<GuestRam> {
    let file = tempfile::tempfile().unwrap();
    // It does not begin where the file does.
    file.set_len(RAM_BYTES + 4096).unwrap();
    let backing = RamBacking::shared_from(&file, 4096, RAM_BYTES).unwrap();
    let layout = RamLayout::new(&[RAM_BYTES]).unwrap();
    Arc::new(GuestRam::new(layout, vec![backing]).unwrap())
}

/// The daemon with one image, and a folder for both.
struct Daemon {
    folder: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sectors = 0..SECTORS * 512;
        let content: Vec<u8> = sectors.map(|at| (at / 512).to_le_bytes()[0]).collect();
        fs::write(folder.path().join("image"), content).unwrap();
        let child = daemon(folder.path());
        Self { folder, child }
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn connect(&self) -> VhostUser {
        VhostUser::block(&self.folder.path().join("socket")).unwrap()
    }

    fn driver(&self) -> Driver {
        Driver::of(
            VirtioPci::new("dev0", 1, ADDRESS, Box::new(self.connect())),
            shared_ram(),
        )
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        let _ = fs::remove_file(self.folder.path().join("socket"));
        self.child = daemon(self.folder.path());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn daemon(folder: &Path) -> Child {
    let child = Command::new("qemu-storage-daemon")
        .current_dir(folder)
        .args(["--blockdev", "file,node-name=disk,filename=image"])
        .args(["--export"])
        .arg("vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=socket,writable=on")
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-storage-daemon: run tests/setup");
    let until = Instant::now() + LIMIT;
    while !folder.join("socket").exists() {
        assert!(Instant::now() < until, "the daemon does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Resets the device and sets it up, with new rings.
fn set_up_again(driver: &mut Driver, features: u64) -> u64 {
    driver.write(20, 1, 0);
    driver.ram.write(0x1000, &[0; 0x3000]).unwrap();
    driver.set_up(features)
}

fn read_sector(driver: &mut Driver, sector: u64) -> u8 {
    assert_eq!(ask_disk(driver, 0, sector, Some((512, true))), 0);
    let read = data(driver, 512);
    assert!(read.iter().all(|byte| *byte == read[0]));
    read[0]
}

fn write_sector(driver: &mut Driver, sector: u64, byte: u8) {
    driver.ram.write(BUFFERS + 0x1000, &[byte; 512]).unwrap();
    assert_eq!(ask_disk(driver, 1, sector, Some((512, false))), 0);
}

#[test]
fn a_guest_reads_writes_and_flushes_a_disk_of_another_process() {
    let daemon = Daemon::start();
    let mut driver = daemon.driver();
    let features = driver.offered();
    assert_eq!(
        features & (1 << 30 | 1 << 26),
        0,
        "no features of the protocol"
    );
    for features in [features, features & !(1 << 29), VERSION_1] {
        assert_eq!(set_up_again(&mut driver, features), 0xf);
        assert_eq!(driver.read(0x2000, 8), SECTORS);
        for sector in 0..40 {
            assert_eq!(read_sector(&mut driver, sector), sector.to_le_bytes()[0]);
        }
        write_sector(&mut driver, 77, 0xab);
        assert_eq!(ask_disk(&mut driver, 4, 0, None), 0, "flush");
        let mut back = [0; 512];
        let image = fs::File::open(daemon.image()).unwrap();
        image.read_exact_at(&mut back, 77 * 512).unwrap();
        assert_eq!(back, [0xab; 512]);
        write_sector(&mut driver, 77, 77);
        // Outside the disk.
        assert_eq!(ask_disk(&mut driver, 0, SECTORS, Some((512, true))), 1);
    }
}

#[test]
fn a_disk_of_another_process_stands_still_in_a_pause_and_goes_on_where_it_was_saved() {
    let daemon = Daemon::start();
    let mut driver = daemon.driver();
    let features = driver.offered();
    driver.set_up(features);
    for sector in 0..20 {
        read_sector(&mut driver, sector);
    }
    for _ in 0..20 {
        driver.device.worker().pause();
        driver.device.worker().resume();
        assert_eq!(read_sector(&mut driver, 9), 9);
    }
    for _ in 0..20 {
        driver.device.worker().memory_changed();
        assert_eq!(read_sector(&mut driver, 9), 9);
    }
    driver.device.worker().pause();
    let state = driver.device.save();
    assert_eq!(state.queues[0].next_available, state.queues[0].next_used);
    assert_eq!(state.queues[0].next_used, 60);
    // The daemon serves one at a time.
    driver.device = VirtioPci::new("gone", 2, ADDRESS, Box::new(Rng::default()));
    let mut device = VirtioPci::new("dev0", 1, ADDRESS, Box::new(daemon.connect()));
    device.restore(&state).unwrap();
    let mut driver = driver.continued(device);
    // What is asked while it stands still is answered behind that, whatever memory comes in the meantime: as it
    // was restored, and in a pause.
    for _ in 0..2 {
        while driver.try_wait().is_ok() {}
        driver.device.worker().memory_changed();
        let standing = driver.device.save();
        driver.ram.write(BUFFERS, &[0; 16]).unwrap();
        driver.offer(&[
            (BUFFERS, 16, false),
            (BUFFERS + 0x1000, 512, true),
            (BUFFERS + 16, 1, true),
        ]);
        driver.kick();
        assert!(driver.is_quiet());
        assert_eq!(driver.used().len(), 0);
        assert_eq!(driver.device.save(), standing);
        driver.device.worker().resume();
        while driver.used().is_empty() {
            assert_eq!(driver.wait(), 0x41);
        }
        for sector in 0..20 {
            assert_eq!(read_sector(&mut driver, sector), sector.to_le_bytes()[0]);
        }
        driver.device.worker().pause();
    }
}

#[test]
fn a_saved_disk_is_not_restored_on_another_one() {
    let daemon = Daemon::start();
    let mut driver = daemon.driver();
    driver.set_up(VERSION_1);
    driver.device.worker().pause();
    let state = driver.device.save();
    drop(driver);
    let other = Daemon::start();
    fs::write(other.image(), [0; 1024]).unwrap();
    let mut other = other;
    other.kill();
    other.restart();
    let mut device = VirtioPci::new("dev0", 1, ADDRESS, Box::new(other.connect()));
    let error = device.restore(&state).unwrap_err().to_string();
    assert!(error.contains("knows a disk of 256 sectors"), "{error}");
    assert!(error.contains("has one of 2"), "{error}");
}

#[test]
fn a_daemon_that_is_killed_breaks_the_device_until_it_is_back_and_the_guest_resets() {
    let mut daemon = Daemon::start();
    let mut driver = daemon.driver();
    let features = driver.offered();
    driver.set_up(features);
    assert_eq!(read_sector(&mut driver, 3), 3);
    daemon.kill();
    // The guest is told, through the vector of the configuration.
    while driver.wait() != 0x40 {}
    assert_eq!(driver.read(20, 1), 0x4f, "it needs a reset");
    driver.kick();
    assert!(driver.is_quiet());
    // A reset alone does not bring it back, and takes no time.
    let begun = Instant::now();
    set_up_again(&mut driver, features);
    assert_eq!(driver.read(20, 1) & 0x40, 0x40);
    driver.device.worker().pause();
    let state = driver.device.save();
    assert!(state.is_broken);
    driver.device.worker().resume();
    assert!(begun.elapsed() < LIMIT);
    daemon.restart();
    while let Ok(0x40) = driver.try_wait() {}
    set_up_again(&mut driver, features);
    assert_eq!(driver.read(20, 1), 0xf);
    assert_eq!(read_sector(&mut driver, 5), 5);
}

#[test]
fn a_daemon_lets_go_of_memory_when_the_device_is_taken_out() {
    let daemon = Daemon::start();
    let mut driver = daemon.driver();
    driver.set_up(VERSION_1);
    assert_eq!(read_sector(&mut driver, 3), 3);
    let maps = format!("/proc/{}/maps", daemon.child.id());
    let has_memory = || {
        let maps = fs::read_to_string(&maps).unwrap();
        maps.lines()
            .any(|line| line.contains("rw-s") && line.ends_with("(deleted)"))
    };
    assert!(has_memory());
    driver.device.worker().detach();
    let until = Instant::now() + LIMIT;
    while has_memory() {
        assert!(Instant::now() < until, "it keeps the guest's memory");
        std::thread::sleep(Duration::from_millis(5));
    }
}
